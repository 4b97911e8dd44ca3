"""One request for recommendations in dense items, and its answer. What `recommend` and the server share."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
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
    rows = None if ask.candidates is None else torch.as_tensor(ask.candidates, dtype=torch.long) - 1
    if rows is not None:
        scores = scores[rows]
    values, index = scores.topk(min(ask.k, len(scores)))
    real = int((values > -torch.inf).sum())
    index = index[:real] if rows is None else rows[index[:real]]
    return Ranked((index + 1).to(torch.int32).numpy(), values[:real].numpy(), expert)
