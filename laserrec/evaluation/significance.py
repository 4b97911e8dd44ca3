"""Paired comparison of two models on the same users: differences and their bootstrap interval."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import polars as pl
from jaxtyping import Float


def user_ndcg(ranks: Float[np.ndarray, "cases"], k: int = 10) -> Float[np.ndarray, "cases"]:
    """NDCG@k of each case from its target's rank."""
    return np.where(ranks <= k, 1 / np.log2(1 + ranks), 0.0)


def read_ranks(file: Path) -> Float[np.ndarray, "cases"]:
    """Read the unfiltered ranks from a file of `evaluate.save_ranks`."""
    return pl.read_parquet(file)["rank"].to_numpy()


def bootstrap_interval(difference: Float[np.ndarray, "cases"], draws: int = 2000) -> tuple[float, float]:
    """95% bootstrap interval of the mean difference, by resampling cases (Efron & Tibshirani 1993). Deterministic."""
    rng = np.random.default_rng(0)
    means = [difference[rng.integers(0, len(difference), len(difference))].mean() for _ in range(draws)]
    return float(np.quantile(means, 0.025)), float(np.quantile(means, 0.975))
