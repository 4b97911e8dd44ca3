"""The target's rank and the metrics of one rank (paper, 4.1.3).

Tie rule: the target's rank is the mean of the places that it and its equals would take, 1 + better + (equals - 1) / 2,
`equals` counting the target itself. A model that scores everything alike thus gets the middle rank, not the first.
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
    """Rank of column `targets[i]` in row i, 1 = best, under the tie rule above; float64.

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
    """`mean_ranks` had the excluded (row, column) pairs not been ranked. An excluded target can never be recommended:
    its rank is the last, `items`."""
    own, others = scores.gather(1, targets[:, None])[excluded.users, 0], scores[excluded.users, excluded.items]
    ahead = (others > own).double() + (others == own).double() / 2
    out = ranks.index_add(0, excluded.users, -ahead)
    lost = excluded.users[excluded.items == targets[excluded.users]]
    out[lost] = float(scores.shape[1])
    return out


@dataclass(frozen=True)
class Metrics:
    """Means over users. MRR is over the full ranking, uncut."""

    k: int
    recall: float
    """Share of targets with rank <= k."""
    ndcg: float
    """Mean of 1 / log2(1 + rank) where rank <= k, else 0 (one relevant item, so the ideal DCG is 1)."""
    mrr: float
    users: int

    @staticmethod
    def from_ranks(ranks: np.ndarray, k: int = 10) -> Metrics:
        """Raises UserError for no ranks at all."""
        if len(ranks) == 0:
            raise UserError("there is no case to evaluate: no user of this split has an item before the target")
        hit = ranks <= k
        gain = np.where(hit, 1 / np.log2(1 + ranks), 0.0)
        return Metrics(k, float(hit.mean()), float(gain.mean()), float((1 / ranks).mean()), len(ranks))

    def as_dict(self) -> dict[str, float | int]:
        """`recall@k`, `ndcg@k`, `mrr`, `users`."""
        return {f"recall@{self.k}": self.recall, f"ndcg@{self.k}": self.ndcg, "mrr": self.mrr, "users": self.users}
