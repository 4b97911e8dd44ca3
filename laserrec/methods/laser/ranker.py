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
    boosts: Float[Tensor, "*users items"]
    """Sums of neighbour weights."""
    seen: Bool[Tensor, "*users items"]
    """Items of the history."""
    popularity: Float[Tensor, "*users items"]
    """Training interactions of the item."""
    lengths: Int[Tensor, "*users 1"]
    """Items of the history."""

    def features(self) -> Float[Tensor, "*users items features"]:
        """What the network reads, before it is standardised."""
        boosts = self.boosts.clamp(min=0)
        columns = (self.text, self.ids, boosts.sqrt(), (boosts > 0).float(), self.seen.float(), self.popularity.log1p(),
                   self.lengths.clamp(1, _LONGEST).log())
        return torch.stack(torch.broadcast_tensors(*columns), dim=-1)


FEATURES = len(fields(Parts)) + 1  # boosts make two


class Ranker(Inheriting, nn.Module):
    """score + temperature * network(features): one hidden layer beside a linear map.

    Parameters: `n_items`: those that the model was fitted on; later ones inherit (`inherit`). `hidden`: units.
    """

    popularity: Float[Tensor, "n_items"]
    mean: Float[Tensor, "features"]
    deviation: Float[Tensor, "features"]

    def __init__(self, n_items: int, hidden: int):
        super().__init__()
        self.register_buffer("popularity", torch.zeros(n_items))
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
        """Of all items; new ones count as popular as their parents, by weight."""
        if self._parents is None:
            return self.popularity
        rows, weights = self._parents
        return torch.cat([self.popularity, (self.popularity[rows] * weights).sum(dim=1)])


@dataclass(frozen=True)
class AppliedRanker:
    """The terms of a score and the network behind them, for one batch of histories."""

    ranker: Ranker
    terms: Sequence[AtPairs]
    """Applied to the cosines one after another, before the network."""
    boosts: AtPairs | None
    seen: AtPairs
    id_users: Float[Tensor, "users d_id"]
    id_items: Float[Tensor, "items d_id"]
    lengths: Int[Tensor, "users"]

    def to_all(self, scores: Float[Tensor, "users items"]) -> Float[Tensor, "users items"]:
        """Cosines -> new scores."""
        ids = self.id_users @ self.id_items.T
        text, boosts, seen = scores - ids, torch.zeros_like(scores), torch.zeros_like(scores)
        for term, dense in ((self.boosts, boosts), (self.seen, seen)):
            if term is not None:
                dense[term.pairs.users, term.pairs.items] = term.values
        for term in self.terms:
            scores = term.to_all(scores)
        by_item = self._by_item(self.ranker.popularities())
        for user, row in enumerate(scores):
            row += self._added(user, by_item, text[user], ids[user], boosts[user], seen[user])
        return scores

    def to_some(self, user: int, rows: Int[Tensor, "some"], scores: Float[Tensor, "some"]) -> Float[Tensor, "some"]:
        """The same for some items of one user."""
        ids = self.id_items[rows] @ self.id_users[user]
        boosts = torch.zeros_like(scores) if self.boosts is None else self.boosts.at(user, rows)
        by_item = self._by_item(self.ranker.popularities()[rows])
        added = self._added(user, by_item, scores - ids, ids, boosts, self.seen.at(user, rows))
        for term in self.terms:
            scores = term.to_some(user, rows, scores)
        return scores + added

    def _added(self, user: int, by_item: Float[Tensor, "items units"], text: Float[Tensor, "items"],
               ids: Float[Tensor, "items"], boosts: Float[Tensor, "items"], seen: Float[Tensor, "items"]
               ) -> Float[Tensor, "items"]:
        """What `Ranker.forward` would give for `Parts.features`. Few items have a boost or are seen, so that these
        features are not written out for all."""
        weights, ranker = self._folded[0], self.ranker
        length = self.lengths[user].clamp(1, _LONGEST).float().log()
        added = torch.addmm(by_item + length * weights[:, 6], torch.stack([text, ids], dim=1), weights[:, :2].T)
        boosted, own = (boosts > 0).nonzero()[:, 0], seen.nonzero()[:, 0]
        added.index_add_(0, boosted, boosts[boosted, None].sqrt() * weights[:, 2] + weights[:, 3])
        added.index_add_(0, own, weights[:, 4].expand(len(own), -1))
        network = added[:, 0] + torch.relu(added[:, 1:]) @ ranker.out.weight[0]
        return ranker.log_temperature.exp() * network

    @cached_property
    def _folded(self) -> tuple[Tensor, Tensor]:
        return self.ranker.folded()

    def _by_item(self, popularity: Float[Tensor, "items"]) -> Float[Tensor, "items units"]:
        """What depends on the item alone."""
        weights, biases = self._folded
        return torch.addcmul(biases, popularity.log1p()[:, None], weights[:, 5])

    def rows(self, user: int) -> Int[Tensor, "changed"]:
        """Items that a term changes. The network changes all; `Laser.depth` tells how many are looked at for it."""
        return torch.unique(torch.cat([term.rows(user) for term in (*self.terms, self.seen)]))
