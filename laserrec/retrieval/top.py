"""The k best of many scores."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor


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
