"""Paired comparison of two models on the same users: differences and their bootstrap interval."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import polars as pl
from jaxtyping import Float, Int


def user_ndcg(ranks: Float[np.ndarray, "cases"], k: int = 10) -> Float[np.ndarray, "cases"]:
    """NDCG@k of each case from its target's rank."""
    return np.where(ranks <= k, 1 / np.log2(1 + ranks), 0.0)


def read_ranks(file: Path) -> Float[np.ndarray, "cases"]:
    """Read the unfiltered ranks from a file of `evaluate.save_ranks`."""
    return pl.read_parquet(file)["rank"].to_numpy()


def read_users(file: Path) -> Int[np.ndarray, "cases"]:
    """The user of each case of such a file, as a number; after a temporal split a user may have several cases."""
    return pl.read_parquet(file)["user_id"].rank("dense").cast(pl.Int64).to_numpy()


def bootstrap_interval(difference: Float[np.ndarray, "cases"], users: Int[np.ndarray, "cases"] | None = None,
                       draws: int = 2000) -> tuple[float, float]:
    """95% bootstrap interval of the mean difference over cases, by resampling users with all their cases, which are not
    independent (Efron & Tibshirani 1993). users: of each case; None: each has one. Deterministic."""
    sums, counts = difference, np.ones(len(difference))
    if users is not None:
        _, first, own = np.unique(users, return_index=True, return_inverse=True)
        order = first.argsort()  # users as they come, whatever numbers they have
        sums, counts = np.bincount(own, difference)[order], np.bincount(own)[order]
    rng, means = np.random.default_rng(0), []
    for _ in range(draws):
        drawn = rng.integers(0, len(sums), len(sums))
        means.append(sums[drawn].sum() / counts[drawn].sum())
    return float(np.quantile(means, 0.025)), float(np.quantile(means, 0.975))
