"""Is one model better than another on the same users? Paired differences and their bootstrap interval."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import polars as pl
from jaxtyping import Float


def user_ndcg(ranks: Float[np.ndarray, "cases"], k: int = 10) -> Float[np.ndarray, "cases"]:
    """NDCG@k of each case from its target's rank."""
    return np.where(ranks <= k, 1 / np.log2(1 + ranks), 0.0)


def read_ranks(file: Path) -> Float[np.ndarray, "cases"]:
    """The unfiltered ranks of a file that `evaluate.save_ranks` wrote."""
    return pl.read_parquet(file)["rank"].to_numpy()


def bootstrap_interval(difference: Float[np.ndarray, "cases"], draws: int = 2000) -> tuple[float, float]:
    """95% interval of the mean, by resampling cases (Efron & Tibshirani 1993); the same for the same input."""
    rng = np.random.default_rng(0)
    means = [difference[rng.integers(0, len(difference), len(difference))].mean() for _ in range(draws)]
    return float(np.quantile(means, 0.025)), float(np.quantile(means, 0.975))
