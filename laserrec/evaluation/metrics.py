"""Ranks of the target items and the metrics made from them (paper, 4.1.3).

Tied items share the mean of their ranks: rank = 1 + better + (equal - 1) / 2, where `equal` counts the target itself. A
model that gives all items the same score thus gets the middle rank, not the first.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from laserrec.data.histories import Pairs
from laserrec.util.errors import UserError


def mean_ranks(
    scores: Float[Tensor, "batch items"], targets: Int[Tensor, "batch"]
) -> Float[Tensor, "batch"]:
    """Rank of column `targets[i]` in row i, 1 = best, ties at their mean rank. Float64.

    Raises ValueError for a NaN score.
    """
    if bool(torch.isnan(scores).any()):
        raise ValueError("scores contain NaN; a rank among them would mean nothing")
    own = scores.gather(1, targets[:, None])
    better = torch.count_nonzero(scores > own, dim=1).double()
    equal = torch.count_nonzero(scores == own, dim=1).double()
    return 1.0 + better + (equal - 1) / 2


def ranks_without(
    ranks: Float[Tensor, "batch"],
    scores: Float[Tensor, "batch items"],
    targets: Int[Tensor, "batch"],
    excluded: Pairs,
) -> Float[Tensor, "batch"]:
    """`mean_ranks` with the excluded (row, column) pairs left out of the ranking.

    An excluded target can never be recommended and gets the last rank, `items`. `ranks` are those of `mean_ranks`.
    """
    own, others = scores.gather(1, targets[:, None])[excluded.users, 0], scores[excluded.users, excluded.items]
    ahead = (others > own).double() + (others == own).double() / 2
    out = ranks.index_add(0, excluded.users, -ahead)
    lost = excluded.users[excluded.items == targets[excluded.users]]
    out[lost] = float(scores.shape[1])
    return out


@dataclass(frozen=True)
class Metrics:
    """Recall@k, NDCG@k and MRR, averaged over cases: one a user, or, after a temporal split, one an interaction. MRR
    uses the full ranking, without a cut-off."""

    k: int
    recall: float
    """Recall@k: share of the targets with rank <= k."""
    ndcg: float
    """NDCG@k: mean of 1 / log2(1 + rank) where rank <= k, else 0. With one relevant item the ideal DCG is 1."""
    mrr: float
    users: int
    """Number of cases."""

    @staticmethod
    def from_ranks(ranks: np.ndarray, k: int = 10) -> Metrics:
        """Compute the metrics of ranks (1 = best). Raises UserError if there are none."""
        if len(ranks) == 0:
            raise UserError("there is no case to evaluate: no user of this split has an item before the target")
        hit = ranks <= k
        gain = np.where(hit, 1 / np.log2(1 + ranks), 0.0)
        return Metrics(k, float(hit.mean()), float(gain.mean()), float((1 / ranks).mean()), len(ranks))

    def as_dict(self) -> dict[str, float | int]:
        """As {recall@k, ndcg@k, mrr, users}."""
        return {f"recall@{self.k}": self.recall, f"ndcg@{self.k}": self.ndcg, "mrr": self.mrr, "users": self.users}
