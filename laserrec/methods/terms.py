"""Parts of a score beside the product of two vectors, and the weights of a history's items."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from laserrec.data.histories import Histories, Pairs

_NEWEST = 50
"""Items of a history that a decayed sum reads; older ones weigh next to nothing."""


@dataclass(frozen=True)
class AtPairs:
    """A score term for one batch that changes the scores at some pairs (user, item)."""

    pairs: Pairs
    values: Float[Tensor, "pairs"]
    change: Callable[[Tensor, Tensor], Tensor]
    """(scores, values) of some pairs -> their new scores."""

    def to_all(self, scores: Float[Tensor, "users items"]) -> Float[Tensor, "users items"]:
        """Changed in place."""
        at = self.pairs.users, self.pairs.items
        scores[at] = self.change(scores[at], self.values)
        return scores

    def to_some(self, user: int, rows: Int[Tensor, "some"], scores: Float[Tensor, "some"]) -> Float[Tensor, "some"]:
        """A new tensor."""
        own, values = self.rows(user), self.values[self._slice(user)]
        if not len(own):
            return scores
        place = torch.searchsorted(own, rows).clamp(max=len(own) - 1)
        hit = own[place] == rows
        return torch.where(hit, self.change(scores, torch.where(hit, values[place], 1.0)), scores)

    def at(self, user: int, rows: Int[Tensor, "some"]) -> Float[Tensor, "some"]:
        """One user's values at these items; zero where there is none."""
        taken = replace(self, change=lambda scores, values: values)
        return taken.to_some(user, rows, torch.zeros(len(rows), device=self.values.device))

    def rows(self, user: int) -> Int[Tensor, "changed"]:
        """Items of one user whose score changes, ascending."""
        return self.pairs.items[self._slice(user)]

    def _slice(self, user: int) -> slice:
        bounds = torch.tensor([user, user + 1], device=self.pairs.users.device)
        return slice(*torch.searchsorted(self.pairs.users, bounds).tolist())


class Inheriting:
    """A part of a model that knows items up to some row; later ones take after parents among these, by weight."""

    _parents: tuple[Tensor, Tensor] | None = None

    def inherit(self, rows: Int[Tensor, "new parents"], weights: Float[Tensor, "new parents"]) -> None:
        """Parents of all items behind the known ones."""
        self._parents = (rows, weights) if len(rows) else None

    def inherit_behind(self, rows: Int[Tensor, "new parents"], weights: Float[Tensor, "new parents"]) -> None:
        """Give parents to items behind those that have some already."""
        if self._parents is not None:
            rows, weights = (torch.cat(pair) for pair in zip(self._parents, (rows, weights), strict=True))
        self.inherit(rows, weights)


class SeenOffset(nn.Module):
    """One number added to the scores of items that stand in the history already (not in the paper).

    How often people buy the same item again differs between shops, and the seen items are often the nearest by text.
    """

    def __init__(self, start: float, learnt: bool = True):
        super().__init__()
        self.offset = nn.Parameter(torch.tensor(start), requires_grad=learnt)

    def on(self, histories: Histories, users: Tensor | None = None) -> AtPairs:
        """As `ScoreTerm.on`."""
        pairs = histories.distinct().to(self.offset.device)
        return AtPairs(pairs, self.offset.detach().expand(len(pairs.users)), torch.add)


def decayed_pairs(histories: Histories, decay: float) -> tuple[Pairs, Float[Tensor, "pairs"]]:
    """The distinct items of each history and their weights: decay ** (steps back in time), of an item's newest
    place."""
    newest = histories.last(_NEWEST)
    width = int(newest.items.max()) + 1 if len(newest.items) else 1
    keys, place = torch.unique(newest.users * width + newest.items, return_inverse=True)
    weights = torch.zeros(len(keys), device=keys.device)
    weights.scatter_reduce_(0, place, decay ** newest.ages.float(), "amax")
    return Pairs(keys // width, keys % width), weights


def decayed_sums(
    histories: Histories, vectors: Callable[[Int[Tensor, "some"]], Float[Tensor, "some d"]], decay: float
) -> Float[Tensor, "users d"]:
    """The unit vectors of each history's items, summed with the weights of `decayed_pairs`; zeros for an empty history.
    vectors: item rows -> their vectors of any length."""
    pairs, weights = decayed_pairs(histories, decay)
    items, place = torch.unique(pairs.items, return_inverse=True)
    unit = F.normalize(vectors(items), dim=-1)
    sums = torch.zeros(len(histories), unit.shape[1], device=unit.device)
    return sums.index_add_(0, pairs.users.to(unit.device), (weights[:, None].to(unit.device) * unit[place]))
