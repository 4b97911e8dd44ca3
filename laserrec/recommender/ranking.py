"""One request for recommendations in dense items, and its answer. What `recommend` and the server share."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor


@dataclass(frozen=True)
class Ask:
    """The k best next items of one history."""

    history: np.ndarray
    """Int32[history], dense items, oldest first, not empty."""
    k: int
    exclude_seen: bool = False
    candidates: np.ndarray | None = None
    """Int32[candidates], distinct dense items that alone may be recommended; None: all."""


@dataclass(frozen=True)
class Ranked:
    """The answer to one `Ask`, best first."""

    items: np.ndarray
    """Int32[at most k], dense items."""
    scores: np.ndarray
    """Float32[at most k]."""
    expert: int | None
    """The query expert (from 0) that the router chose; None where the model has no router."""


def best(scores: Float[Tensor, "n_items"], ask: Ask, expert: int | None) -> Ranked:
    """The best of one row of scores (column j is item j + 1), which is changed in place. Items of score -inf are
    never among them."""
    if ask.exclude_seen:
        scores[torch.as_tensor(ask.history, dtype=torch.long) - 1] = -torch.inf
    if ask.candidates is None:
        items = torch.arange(1, len(scores) + 1)
    else:
        items = torch.as_tensor(ask.candidates, dtype=torch.long)
        scores = scores[items - 1]
    return ranked(*top(scores, items, ask.k), expert)


def top(scores: Float[Tensor, "n"], items: Int[Tensor, "n"], k: int) -> tuple[Int[Tensor, "m"], Float[Tensor, "m"]]:
    """The k best items, fewer where scores are -inf, and their scores, best first, ties by the smaller item. All that
    are equal to the k-th score are sorted, so that the tie rule holds at the edge too."""
    if not len(scores):
        return items, scores
    edge = scores.topk(min(k, len(scores))).values[-1]
    rows = ((scores >= edge) & (scores > -torch.inf)).nonzero()[:, 0]
    rows = rows[items[rows].argsort()]
    rows = rows[scores[rows].argsort(descending=True, stable=True)][:k]
    return items[rows], scores[rows]


def ranked(items: Int[Tensor, "m"], scores: Float[Tensor, "m"], expert: int | None) -> Ranked:
    """What `top` found, as an answer."""
    return Ranked(items.to(torch.int32).numpy(), scores.numpy(), expert)
