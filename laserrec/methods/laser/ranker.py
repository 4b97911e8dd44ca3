"""A small network that ranks items anew by the parts of their scores (not in the paper).

Stacking (Wolpert 1992, "Stacked Generalization"): what the parts are worth together is learnt on validation users, whom
none of them was trained on. A weighted sum can't say that a high cosine means less for an item that everybody buys, or
that the regression is to be trusted more in a short history.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from functools import cached_property

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from laserrec.data.histories import Histories
from laserrec.methods.terms import AtPairs, Inheriting

_LONGEST = 50
"""Items of a history; longer ones count as so long."""
_DROPOUT, _LOG_TEMPERATURE = 0.2, -3.0
_LEAST_DEVIATION = 1e-5
"""A feature that deviates less is the same for all but for rounding."""


@dataclass(frozen=True)
class Parts:
    """What scores of items are made of, for one user or several."""

    text: Float[Tensor, "*users items"]
    """What the text parts add to the cosine."""
    ids: Float[Tensor, "*users items"]
    """What the ID parts add to it."""
    last_text: Float[Tensor, "*users items"]
    """The same with the history's newest item in the user's place."""
    last_ids: Float[Tensor, "*users items"]
    """The same of the ID parts."""
    boosts: Float[Tensor, "*users items"]
    """Sums of neighbour weights."""
    last_boosts: Float[Tensor, "*users items"]
    """Neighbour weights of the newest item alone."""
    seen: Bool[Tensor, "*users items"]
    """Items of the history."""
    popularity: Float[Tensor, "*users items"]
    """Training interactions of the item."""
    recency: Float[Tensor, "*users items"]
    """Of the item; see the function."""
    lengths: Int[Tensor, "*users 1"]
    """Items of the history."""

    def features(self) -> Float[Tensor, "*users items features"]:
        """What the network reads, before it is standardised."""
        boosts, last = self.boosts.clamp(min=0), self.last_boosts.clamp(min=0)
        columns = (self.text, self.ids, self.last_text, self.last_ids, boosts.sqrt(), (boosts > 0).float(), last.sqrt(),
                   self.seen.float(), self.popularity.log1p(), self.recency, self.lengths.clamp(1, _LONGEST).log())
        return torch.stack(torch.broadcast_tensors(*columns), dim=-1)


_COSINES, _BOOST, _LAST_BOOST, _SEEN, _ITEM, _LENGTH = slice(0, 4), slice(4, 6), 6, 7, slice(8, 10), 10
"""Columns of the features."""
FEATURES = len(fields(Parts)) + 1  # boosts make two


def recency(sequences: Histories, n_items: int) -> Float[Tensor, "n_items"]:
    """Where items stand in the sequences on average, from 0 (first) to 1 (last); an item of few sequences is drawn
    towards the middle. What people took last is what is taken now: it tells new items from those that have been."""
    place = (sequences.lengths[sequences.users] - sequences.ages) / sequences.lengths[sequences.users]
    total = torch.zeros(n_items).index_add_(0, sequences.items, place.float())
    return (total + 0.5) / (torch.bincount(sequences.items, minlength=n_items) + 1)


class Ranker(Inheriting, nn.Module):
    """score + temperature * network(features): one hidden layer beside a linear map.

    Parameters: `n_items`: those that the model was fitted on; later ones inherit (`inherit`). `hidden`: units.
    """

    popularity: Float[Tensor, "n_items"]
    recency: Float[Tensor, "n_items"]
    mean: Float[Tensor, "features"]
    deviation: Float[Tensor, "features"]

    def __init__(self, n_items: int, hidden: int):
        super().__init__()
        self.register_buffer("popularity", torch.zeros(n_items))
        self.register_buffer("recency", torch.zeros(n_items))
        self.register_buffer("mean", torch.zeros(FEATURES))
        self.register_buffer("deviation", torch.ones(FEATURES))
        self.direct = nn.Linear(FEATURES, 1, bias=False)
        self.hidden, self.out = nn.Linear(FEATURES, hidden), nn.Linear(hidden, 1, bias=False)
        self.log_temperature = nn.Parameter(torch.tensor(_LOG_TEMPERATURE))
        self.reset()

    @torch.no_grad()
    def reset(self) -> None:
        """Weights as before any training: nothing is added to the scores."""
        self.hidden.reset_parameters()
        self.direct.weight.zero_()
        self.out.weight.zero_()
        self.log_temperature.fill_(_LOG_TEMPERATURE)

    def standardise(self, features: Float[Tensor, "some features"]) -> None:
        """Set mean and deviation by these. What is the same for all of them, as lengths may be, is left out: nothing
        can be learnt of other values, which would be millions of deviations away."""
        deviation = features.std(dim=0)
        self.mean.copy_(features.mean(dim=0))
        self.deviation.copy_(deviation.where(deviation > _LEAST_DEVIATION, torch.inf))

    def standardised(self, features: Float[Tensor, "*some features"]) -> Float[Tensor, "*some features"]:
        """With mean zero and deviation one."""
        return (features - self.mean) / self.deviation

    def forward(self, features: Float[Tensor, "*some features"]) -> Float[Tensor, "*some"]:
        """What is added to the scores, in units of the temperature. features: standardised."""
        hidden = F.dropout(torch.relu(self.hidden(features)), _DROPOUT, self.training)
        return (self.direct(features) + self.out(hidden))[..., 0]

    def folded(self) -> tuple[Float[Tensor, "units features"], Float[Tensor, "units"]]:
        """Weights and biases of the linear map and, behind it, of the hidden units, for features as they are."""
        weights = torch.cat([self.direct.weight, self.hidden.weight]) / self.deviation
        biases = torch.cat([self.hidden.bias.new_zeros(1), self.hidden.bias])
        return weights, biases - weights @ self.mean

    def popularities(self) -> Float[Tensor, "items"]:
        """Of all items; new ones count as popular as their parents, by weight, and not at all without any."""
        return self._with_new(self.popularity, 0.0)

    def recencies(self) -> Float[Tensor, "items"]:
        """Of all items; new ones stand where their parents do, by weight, and in the middle without any."""
        return self._with_new(self.recency, 0.5)

    def _with_new(self, known: Float[Tensor, "n_items"], without: float) -> Float[Tensor, "items"]:
        if self._parents is None:
            return known
        rows, weights = self._parents
        return torch.cat([known, torch.where(weights.any(dim=1), (known[rows] * weights).sum(dim=1), without)])


@dataclass(frozen=True)
class Newest:
    """The newest items of some histories, in the users' place."""

    vectors: Float[Tensor, "users d_out"]
    """Zeros for an empty history."""
    boosts: AtPairs | None
    """Their neighbours."""


@dataclass(frozen=True)
class AppliedRanker:
    """The terms of a score and the network behind them, for one batch of histories."""

    ranker: Ranker
    terms: Sequence[AtPairs]
    """Applied to the cosines one after another, before the network."""
    boosts: AtPairs | None
    seen: AtPairs
    newest: Newest
    id_users: Float[Tensor, "users d_id"]
    items: Float[Tensor, "items d_out"]
    """Their vectors, whose ID part is the end."""
    lengths: Int[Tensor, "users"]

    def to_all(self, scores: Float[Tensor, "users items"]) -> Float[Tensor, "users items"]:
        """Cosines -> new scores."""
        cosines = self._cosines(scores, slice(None), self.items)
        sparse = [torch.zeros_like(scores) for _ in range(3)]
        for term, dense in zip(self._sparse, sparse, strict=True):
            if term is not None:
                dense[term.pairs.users, term.pairs.items] = term.values
        for term in self.terms:
            scores = term.to_all(scores)
        by_item = self._by_item(self.ranker.popularities(), self.ranker.recencies())
        for user, row in enumerate(scores):
            row += self._added(user, by_item, cosines[:, user], [dense[user] for dense in sparse])
        return scores

    def to_some(self, user: int, rows: Int[Tensor, "some"], scores: Float[Tensor, "some"]) -> Float[Tensor, "some"]:
        """The same for some items of one user."""
        cosines = self._cosines(scores[None], slice(user, user + 1), self.items[rows])
        sparse = [torch.zeros_like(scores) if term is None else term.at(user, rows) for term in self._sparse]
        by_item = self._by_item(self.ranker.popularities()[rows], self.ranker.recencies()[rows])
        added = self._added(user, by_item, cosines[:, 0], sparse)
        for term in self.terms:
            scores = term.to_some(user, rows, scores)
        return scores + added

    @property
    def _sparse(self) -> tuple[AtPairs | None, AtPairs | None, AtPairs]:
        return self.boosts, self.newest.boosts, self.seen

    def _cosines(self, scores: Float[Tensor, "users items"], users: slice, items: Float[Tensor, "items d_out"]
                 ) -> Float[Tensor, "4 users items"]:
        """text, ids, last_text and last_ids of `Parts`. scores: cosines of whole vectors."""
        d = self.items.shape[1] - self.id_users.shape[1]
        ids, last = self.id_users[users] @ items[:, d:].T, self.newest.vectors[users]
        return torch.stack([scores - ids, ids, last[:, :d] @ items[:, :d].T, last[:, d:] @ items[:, d:].T])

    def _added(self, user: int, by_item: Float[Tensor, "items units"], cosines: Float[Tensor, "4 items"],
               sparse: Sequence[Float[Tensor, "items"]]) -> Float[Tensor, "items"]:
        """What `Ranker.forward` would give for `Parts.features`. sparse: boosts, last boosts and seen. Few items have
        any, so that these features are not written out for all."""
        weights, (boosts, last, seen) = self._folded[0], sparse
        length = self.lengths[user].clamp(1, _LONGEST).float().log()
        added = torch.addmm(by_item + length * weights[:, _LENGTH], cosines.T, weights[:, _COSINES].T)
        boosted, near, own = (part.nonzero()[:, 0] for part in (boosts > 0, last > 0, seen))
        columns = torch.stack([boosts[boosted].sqrt(), torch.ones_like(boosts[boosted])], dim=1)
        added.index_add_(0, boosted, columns @ weights[:, _BOOST].T)
        added.index_add_(0, near, last[near, None].sqrt() * weights[:, _LAST_BOOST])
        added.index_add_(0, own, weights[:, _SEEN].expand(len(own), -1))
        network = added[:, 0] + torch.relu(added[:, 1:]) @ self.ranker.out.weight[0]
        return self.ranker.log_temperature.exp() * network

    @cached_property
    def _folded(self) -> tuple[Tensor, Tensor]:
        return self.ranker.folded()

    def _by_item(self, popularity: Float[Tensor, "items"], recency: Float[Tensor, "items"]
                 ) -> Float[Tensor, "items units"]:
        """What depends on the item alone."""
        weights, biases = self._folded
        return torch.addmm(biases, torch.stack([popularity.log1p(), recency], dim=1), weights[:, _ITEM].T)

    def rows(self, user: int) -> Int[Tensor, "changed"]:
        """Items that a term changes. The network changes all; `Laser.depth` tells how many are looked at for it."""
        return torch.unique(torch.cat([term.rows(user) for term in (*self.terms, self.seen)]))
