"""The answer to one request for recommendations, in item rows. What `recommend` and the server share."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from laserrec.retrieval.top import Ask, top


@dataclass(frozen=True)
class Ranked:
    """The answer to one `Ask`, best first."""

    items: Int[np.ndarray, "found"]
    """Item rows, at most k."""
    scores: Float[np.ndarray, "found"]
    expert: int | None = None
    """The query expert (from 0) that the router chose; None where the model has no router."""


NOTHING = Ranked(np.zeros(0, np.int64), np.zeros(0, np.float32))


def best(scores: Float[Tensor, "n_items"], ask: Ask, expert: int | None) -> Ranked:
    """The best of one row of scores, which is changed in place. Items of score -inf are never among them."""
    for rows in (ask.history if ask.exclude_seen else None, ask.exclude):
        if rows is not None:
            scores[torch.as_tensor(rows, dtype=torch.long, device=scores.device)] = -torch.inf
    if ask.candidates is None:
        items = torch.arange(len(scores), device=scores.device)
    else:
        items = torch.as_tensor(ask.candidates, dtype=torch.long, device=scores.device)
        scores = scores[items]
    return ranked(*top(scores, items, ask.k), expert)


def ranked(items: Int[Tensor, "m"], scores: Float[Tensor, "m"], expert: int | None) -> Ranked:
    """What `top` found, as an answer."""
    return Ranked(items.cpu().numpy(), scores.float().cpu().numpy(), expert)
