"""A request for the k best items, and the k best of many scores."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor


@dataclass(frozen=True)
class Ask:
    """The k best next items of one history."""

    history: Int[np.ndarray, "history"]
    """Item rows, oldest first. An empty one is answered with nothing."""
    k: int
    exclude_seen: bool = False
    candidates: Int[np.ndarray, "candidates"] | None = None
    """Distinct item rows that alone may be recommended; None: all."""
    exclude: Int[np.ndarray, "exclude"] | None = None
    """Item rows that may not be recommended; None: none."""


def top(scores: Float[Tensor, "n"], rows: Int[Tensor, "n"], k: int) -> tuple[Int[Tensor, "m"], Float[Tensor, "m"]]:
    """The k best rows, fewer where scores are -inf, and their scores, best first, ties by the smaller row. All that
    are equal to the k-th score are sorted, so that the tie rule holds at the edge too."""
    if not len(scores):
        return rows, scores
    edge = scores.topk(min(k, len(scores))).values[-1]
    best = ((scores >= edge) & (scores > -torch.inf)).nonzero()[:, 0]
    best = best[rows[best].argsort()]
    best = best[scores[best].argsort(descending=True, stable=True)][:k]
    return rows[best], scores[best]
