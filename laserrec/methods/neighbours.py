"""Items that stand together in histories, as a closed-form item-to-item regression: EASE (Steck 2019, "Embarrassingly
Shallow Autoencoders for Sparse Data") with the items' texts as further rows (Jeunen, Van Balen & Goethals 2020,
"Closed-Form Models for Collaborative Filtering with Side-Information").

Not in the paper. Where histories are short it finds more than a transformer over item IDs does, in seconds, and each
item keeps only its strongest neighbours.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from laserrec.config import NeighboursConfig
from laserrec.util.errors import UserError

Pull = tuple[Int[Tensor, "found"], Float[Tensor, "found"]]
"""Dense items, ascending, and how strongly a history's items pull them."""
_LEAST_SUM = 0.01
"""Of the mean sum of a row: items that nothing is known of are not blown up further."""
_LAST = 50
"""Items of a history that are looked at, the newest."""


def check_size(n_items: int, config: NeighboursConfig) -> None:
    """Raises UserError where the regression would not fit into this machine's memory."""
    needed, memory = 3 * 4 * n_items**2, os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if config.count and needed > memory:
        raise UserError(f"neighbours of {n_items:,} items take {needed / 1e9:,.0f} GB and this machine has "
                        f"{memory / 1e9:,.0f} GB; leave them off: --neighbours.count 0")


def weigh(history: np.ndarray, recency: float) -> tuple[np.ndarray, np.ndarray]:
    """The distinct items of a history and their weights: recency ** (items behind it), an item's newest place."""
    newest, age = np.unique(history[::-1][:_LAST], return_index=True)
    return newest, recency ** age.astype(np.float32)


def weighed_sums(
    histories: Sequence[np.ndarray], rows: Callable[[Int[Tensor, "some"]], Float[Tensor, "some d"]], recency: float
) -> Float[Tensor, "histories d"]:
    """The histories' items, as unit rows, summed with the weights of `weigh`. rows: dense items -> their rows."""
    weighed = [weigh(h, recency) for h in histories]
    items, place = np.unique(np.concatenate([i for i, _ in weighed]), return_inverse=True)
    user = torch.as_tensor(np.repeat(np.arange(len(weighed)), [len(i) for i, _ in weighed]))
    weights = torch.zeros(len(weighed), len(items))
    weights[user, torch.as_tensor(place)] = torch.as_tensor(np.concatenate([w for _, w in weighed]))
    return weights @ F.normalize(rows(torch.as_tensor(items.astype(np.int64))), dim=-1)


def regress(
    sequences: Sequence[np.ndarray], n_items: int, config: NeighboursConfig,
    text: Float[Tensor, "n_items d_text"] | None = None,
) -> Float[Tensor, "n_items n_items"]:
    """The regression's weights B: row i says how much each item gains where i stands in a history.

    B minimises ||X - XB||^2 + text_weight ||T - TB||^2 + l2 ||B||^2 over B with a zero diagonal. X has a row per
    sequence of dense items, ones where an item stands in it, weighed by length ** (-length_power / 2) at mean weight
    one; T has the unit text vectors' dimensions as rows. Rows of B are then evened out by row_power. Time n_items ** 3,
    memory 3 n_items ** 2 floats.
    """
    rows = [np.unique(s) for s in sequences if len(s)]
    weights = np.array([len(s) for s in rows], dtype=np.float32)
    weights = (weights / weights.mean()) ** -config.length_power if len(rows) else weights
    gram = torch.zeros(n_items, n_items)
    for row, weight in zip(rows, weights.tolist(), strict=True):
        index = torch.as_tensor(row.astype(np.int64)) - 1
        gram[index[:, None], index[None]] += weight
    if text is not None and config.text_weight:
        unit = F.normalize(text, dim=-1)
        gram.addmm_(unit, unit.T, alpha=config.text_weight)
    gram.diagonal().add_(config.l2)
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(gram))
    weights_of = inverse / -inverse.diagonal()
    weights_of.fill_diagonal_(0.0)
    if config.row_power:
        sums = weights_of.clamp(min=0).sum(dim=1, keepdim=True)
        mean = sums.mean().clamp(min=1e-8)
        weights_of /= (sums / mean).clamp(min=_LEAST_SUM) ** config.row_power
    return weights_of


class Neighbours(nn.Module):
    """Each item's strongest neighbours, and how their pull joins a cosine. Nothing here is trained by gradient.

    Parameters: `n_items`: the known items.
    """

    def __init__(self, config: NeighboursConfig, n_items: int):
        super().__init__()
        self.config, self.temperature = config, config.temperature
        count = min(config.count, max(1, n_items - 1))
        self.register_buffer("items", torch.zeros(n_items, count, dtype=torch.int32))
        self.register_buffer("weights", torch.zeros(n_items, count))
        self.register_buffer("log_scale", torch.zeros(()))
        self._lenders: tuple[Tensor, Tensor] | None = None

    @torch.no_grad()
    def fit(self, sequences: Sequence[np.ndarray], text: Float[Tensor, "n_items d_text"]) -> None:
        """Keep the largest positive weights of `regress`."""
        n_items, count = self.items.shape
        top = regress(sequences, n_items, self.config, text).topk(count, dim=1)
        self.items.copy_((top.indices + 1).to(torch.int32))
        self.weights.copy_(top.values.clamp(min=0))

    @torch.no_grad()
    def scale_to(self, cosines: Float[Tensor, "users n_items"]) -> None:
        """Weigh neighbours against these users' cosines: the softmax over a user's cosines counts `share` times as much
        as the neighbours' weights, which like it are about a probability. One scale for all users, so that a score
        needs no sum over all items."""
        self.log_scale.copy_((cosines / self.temperature).logsumexp(dim=1).mean() - np.log(self.config.share))

    def lend(self, rows: Int[Tensor, "new lenders"], weights: Float[Tensor, "new lenders"]) -> None:
        """Items behind the known ones, that were never regressed, take their place from known ones (rows, from 0): in a
        history they pull what those pull; they are pulled as those are, and by those themselves as a strongest
        neighbour would be. None: `rows` is empty."""
        self._lenders = (rows, weights) if len(rows) else None

    def pull(self, history: np.ndarray) -> Pull:
        """Dense items that the history's items pull, and how strongly, ascending; none of the history itself."""
        items, weights = weigh(history, self.config.recency)
        rows, strength = self._as_known(torch.as_tensor(items.astype(np.int64)) - 1, torch.as_tensor(weights))
        found, place = torch.unique(self.items[rows].flatten().long(), return_inverse=True)
        total = torch.zeros(len(found)).index_add_(0, place, (self.weights[rows] * strength[:, None]).flatten())
        if self._lenders is not None:
            new, pulls = self._pulled_new(found, total, rows, strength)
            found, total = torch.cat([found, new]), torch.cat([total, pulls])
        real = (total > 0) & ~torch.isin(found, torch.as_tensor(items.astype(np.int64)))
        return found[real], total[real]

    def _as_known(self, rows: Tensor, strength: Tensor) -> tuple[Tensor, Tensor]:
        """Known rows and their weights in place of a history's rows; without lenders new items say nothing."""
        known = rows < len(self.items)
        if self._lenders is None or known.all():
            return rows[known], strength[known]
        lenders, shares = (x[rows[~known] - len(self.items)] for x in self._lenders)
        return (torch.cat([rows[known], lenders.flatten()]),
                torch.cat([strength[known], (shares * strength[~known][:, None]).flatten()]))

    def _pulled_new(self, found: Tensor, total: Tensor, rows: Tensor, strength: Tensor) -> tuple[Tensor, Tensor]:
        """All new items and how they are pulled."""
        lenders, shares = self._lenders
        known = torch.zeros(len(self.items)).index_add_(0, found - 1, total)
        known.index_add_(0, rows, self.weights[rows].amax(dim=1) * strength)
        return torch.arange(len(lenders)) + len(self.items) + 1, (known[lenders] * shares).sum(dim=1)

    def join(self, cosines: Float[Tensor, "n"], pulls: Float[Tensor, "n"]) -> Float[Tensor, "n"]:
        """Scores of pulled items, on the cosines' scale: the cosine whose softmax weight is the item's own plus the
        neighbours', tau log(exp(cosine / tau) + scale x pull). An item that nothing pulls keeps its cosine."""
        return self.temperature * torch.logaddexp(cosines / self.temperature, pulls.log() + self.log_scale)
