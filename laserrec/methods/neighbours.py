"""Item-to-item weights in closed form: EASE (Steck 2019, "Embarrassingly Shallow Autoencoders for Sparse Data") with
the items' texts as further rows (Jeunen, Van Balen & Goethals 2020, "Closed-Form Models for Collaborative Filtering
with Side-Information") and with what follows what (Choi et al. 2021, "Session-aware Linear Item-Item Models for
Session-based Recommendation": SLIST).

Not in the paper. Where histories are short it finds more than a transformer over item IDs does, in seconds. Two forms:
exact, one regression over all items, and local, one over each item's own candidates
(laserrec.methods.local_regression).
"""

from __future__ import annotations

import math

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from scipy import sparse
from torch import Tensor, nn

from laserrec.config import NeighboursConfig, RegressionForm
from laserrec.data.histories import Histories, Pairs
from laserrec.methods.local_regression import largest, local_weights
from laserrec.methods.terms import AtPairs, Inheriting, decayed_pairs
from laserrec.util.errors import UserError
from laserrec.util.memory import available_bytes

EXACT_ITEMS = 20_000
"""With form auto, the most items of the exact form, whose two matrices then take 3.2 GB."""
_LEAST_SUM = 0.01
"""Of the mean sum of a row's weights: rows below it are not scaled up further."""
_NEWEST, _LEAST_WEIGHT = 50, 0.01
"""Items on each side of a step that are read: at most so many, and none that weighs less."""
_DENSE = 32
"""A matrix of which more than one entry in so many is not zero is multiplied as a dense one."""
_MOST_PAIRS = 100_000_000
"""Of places in the sequences, which bound the memory of `step_products`."""


def is_local(config: NeighboursConfig, n_items: int) -> bool:
    """Whether the regression of so many items has the local form. By the number alone, so that a fit has the same
    result on every machine."""
    return config.form == RegressionForm.LOCAL or (config.form == RegressionForm.AUTO and n_items > EXACT_ITEMS)


def check_size(n_items: int, config: NeighboursConfig) -> None:
    """Raises UserError where the regression would not fit into the memory that is free."""
    local = is_local(config, n_items)
    needed, free = n_items * (20 * config.candidates + 2_000) if local else 2 * 4 * n_items**2, available_bytes()
    if needed > free:
        way = "turn it off (setting neighbours.count = 0)" if local else "take setting neighbours.form = local"
        raise UserError(f"the item-to-item regression of {n_items:,} items takes {needed / 1e9:,.1f} GB and "
                        f"{free / 1e9:,.1f} GB are free; {way} or use a larger machine")


def multiplications(n_items: int, config: NeighboursConfig, d_text: int) -> float:
    """About what one regression costs; the local form does them at half the speed."""
    if is_local(config, n_items):
        return 2.0 * n_items * config.candidates**2 * (config.candidates / 3 + d_text)
    return float(n_items) ** 3


def _sequence_weights(sequences: Histories, pairs: Pairs, length_power: float) -> Float[Tensor, "sequences"]:
    """By the number of distinct items. pairs: those of the sequences."""
    sizes = torch.bincount(pairs.users, minlength=len(sequences)).double()
    mean = sizes.sum() / max(1, int((sizes > 0).sum()))
    return (sizes.clamp(min=1) / mean) ** -length_power


def _weighted(sequences: Histories, n_items: int, length_power: float) -> sparse.csr_array:
    """[sequences n_items]: where an item stands in a sequence, the root of the sequence's weight."""
    pairs = sequences.distinct()
    weights = _sequence_weights(sequences, pairs, length_power)
    return sparse.csr_array((weights[pairs.users].sqrt().numpy(), (pairs.users.numpy(), pairs.items.numpy())),
                            shape=(len(sequences), n_items))


def step_products(sequences: Histories, n_items: int, decay: float, length_power: float
                  ) -> tuple[sparse.csr_array, sparse.csr_array]:
    """P^T P and P^T F [n_items n_items], weighted as in `regress`. Between two neighbouring items of a sequence there
    is a step; its row in P holds the items before it, decay ** (items between) each, and its row in F those behind it.
    Only as many items on each side are read as weigh .01 or more, at most 50, and fewer of very many interactions.

    Not by a product of the two: two items at places a <= b of a sequence of n have in common the steps behind b, whose
    products are decay ** (b - a), decay ** (b - a + 2), ... And between a and b lie b - a steps, each of which gives
    decay ** (b - a - 1).
    """
    reach = _NEWEST if decay == 1 else min(_NEWEST, math.ceil(math.log(_LEAST_WEIGHT) / math.log(decay)))
    reach = max(1, min(reach, _MOST_PAIRS // (2 * max(1, len(sequences.items)))))
    weights = _sequence_weights(sequences, sequences.distinct(), length_power)[sequences.users].numpy()
    items, left = sequences.items.numpy(), sequences.ages.numpy()  # items behind each
    total = [sparse.csr_array((n_items, n_items)) for _ in range(2)]
    for gap in range(2 * reach):
        at = np.flatnonzero(left >= gap)
        ends = at + gap
        in_common = np.minimum(left[ends], reach - gap)
        powers = in_common if decay == 1 else (1 - decay ** (2.0 * in_common)) / (1 - decay**2)
        between = min(gap, 2 * reach - gap)
        for product, values in ((0, decay**gap * powers * (in_common > 0)),
                                (1, np.full(len(at), between * float(decay) ** (gap - 1)))):
            if (kept := values > 0).any():
                pairs = items[at[kept]], items[ends[kept]]
                total[product] += sparse.csr_array((values[kept] * weights[at[kept]], pairs), shape=(n_items, n_items))
        if gap == 0:
            diagonal = total[0]
    past, crossed = total
    return (past + past.T - diagonal).tocsr(), crossed


def regress(
    sequences: Histories, n_items: int, config: NeighboursConfig, text: Float[Tensor, "n_items d_text"] | None = None,
    device: torch.device | None = None,
) -> Float[Tensor, "n_items n_items"]:
    """The exact form's weights B: entry (i, j) is what item i in a history adds to the score of item j.

    B minimises (1 - order) ||X - XB||^2 + order ||F - PB||^2 + text_weight ||T - TB||^2 + l2 ||B||^2 over B with a zero
    diagonal. X has a row per sequence, ones where an item stands in it; P and F have a row per step, of what is before
    and behind it (`step_products`). Rows are weighted by the sequence's length ** -length_power at mean weight one; T
    has the unit text vectors' dimensions as rows. Rows of B are then evened out by row_power. Time n_items ** 3,
    memory 2 n_items ** 2 floats. Raises UserError where that is not free.

    With G the products of the rows that are read (text's among them) and G + D those with what is to be told, the
    solution is (G + l2)^-1 (G + D) and of each column of the inverse as much as makes the diagonal zero. That takes out
    the l2 that G lacks too, so only the inverse and its product with D are needed. D holds the pairs of items that
    stand near each other in a sequence, so few of all that the product costs little.
    """
    check_size(n_items, config.model_copy(update={"form": RegressionForm.EXACT}))
    gram, told = _products(sequences, n_items, config, device)
    if text is not None and config.text_weight:
        unit = F.normalize(text, dim=-1)
        gram.addmm_(unit, unit.T, alpha=config.text_weight)
    gram.diagonal().add_(config.l2)
    factor = torch.linalg.cholesky(gram)
    del gram
    inverse = torch.cholesky_inverse(factor)
    del factor
    if told is None:
        weights = inverse.div_(-inverse.diagonal().clone())
    else:
        columns = _times(told.T.tocsr(), inverse)  # by rows, since the inverse is symmetric
        columns.addcmul_(inverse, ((1 + columns.diagonal()) / inverse.diagonal())[:, None], value=-1)
        del inverse
        weights = columns.T
    weights.fill_diagonal_(0.0)
    if config.row_power:
        weights *= _row_factors(weights.clamp(min=0).sum(dim=1, keepdim=True), config.row_power)
    return weights


def _products(sequences: Histories, n_items: int, config: NeighboursConfig, device: torch.device | None
              ) -> tuple[Tensor, sparse.csr_array | None]:
    """What the rows of the regression's input have in common with each other, and how much more with what is to be
    told; None where that is the same."""
    x = _weighted(sequences, n_items, config.length_power)
    gram, told = (x.T @ x).tocsr(), None
    if config.order:
        past, crossed = step_products(sequences, n_items, config.decay, config.length_power)
        gram = (1 - config.order) * gram + config.order * past
        told = (config.order * (crossed - past)).astype(np.float32).tocsr()
    return _dense(gram, device), told


def _dense(matrix: sparse.csr_array, device: torch.device | None) -> Tensor:
    return torch.from_numpy(matrix.astype(np.float32).toarray()).to(device)


def _times(few: sparse.csr_array, many: Float[Tensor, "n n"]) -> Float[Tensor, "n n"]:
    """Their product. For each number a sparse product takes as long as a dense one does for some tens."""
    if many.device.type != "cpu" or _DENSE * few.nnz > many.numel():
        return _dense(few, many.device) @ many
    return torch.from_numpy(few @ many.numpy())


def _row_factors(sums: Tensor, power: float) -> Tensor:
    """What rows are multiplied with, by the sums of their positive weights."""
    mean = sums.mean().clamp(min=1e-8)
    return (sums / mean).clamp(min=_LEAST_SUM) ** -power


def sparse_regress(
    sequences: Histories, n_items: int, config: NeighboursConfig, text: Float[Tensor, "n_items d_text"] | None = None,
    device: torch.device | None = None, positive: bool = False,
) -> sparse.csr_array:
    """The local form's weights, entry for entry as those of `regress` (laserrec.methods.local_regression). positive:
    leave out the weights below zero. Raises UserError where the memory is not free."""
    check_size(n_items, config.model_copy(update={"form": RegressionForm.LOCAL}))
    steps = None
    if config.order:
        steps = step_products(sequences, n_items, config.decay, config.length_power)
    x = _weighted(sequences, n_items, config.length_power)
    weights = local_weights(x, config, text, device, positive, steps)
    if config.row_power:
        sums = torch.from_numpy(np.asarray(weights.maximum(0).sum(axis=1), dtype=np.float32))
        weights.data *= np.repeat(_row_factors(sums, config.row_power).numpy(), np.diff(weights.indptr))
    return weights


class Neighbours(Inheriting, nn.Module):
    """Each item's strongest neighbours, as a score term. Nothing here is trained by gradient.

    With boost b of an item, the sum of the weights of the history's items for it, its cosine c becomes
    tau log(exp(c / tau) + scale b): the cosine whose softmax weight is the item's own plus its neighbours'. An item
    without a boost keeps its cosine.

    Items that the regression never saw count in a history as their parents do (`inherit`), and their boost is the
    weighted mean of their parents' boosts, where a parent in the history counts as the strongest neighbour would.

    Parameters: `n_items`: the items of the regression; later ones inherit.
    """

    items: Int[Tensor, "n_items count"]
    weights: Float[Tensor, "n_items count"]
    log_scale: Float[Tensor, ""]

    def __init__(self, config: NeighboursConfig, n_items: int):
        super().__init__()
        self.config = config
        count = min(config.count, max(1, n_items - 1))
        self.register_buffer("items", torch.zeros(n_items, count, dtype=torch.int32))
        self.register_buffer("weights", torch.zeros(n_items, count))
        self.register_buffer("log_scale", torch.zeros(()))

    @torch.no_grad()
    def fit(self, sequences: Histories, text: Float[Tensor, "n_items d_text"]) -> None:
        """Keep the largest positive weights of the regression."""
        n_items, count = self.items.shape
        if is_local(self.config, n_items):
            found = sparse_regress(sequences, n_items, self.config, text, self.items.device, positive=True)
            items, weights = map(torch.from_numpy, largest(found, count))
        else:
            weights, items = regress(sequences, n_items, self.config, text, self.items.device).topk(count, dim=1)
        self.items.copy_(items)
        self.weights.copy_(weights.clamp(min=0))

    @torch.no_grad()
    def scale_to(self, cosines: Float[Tensor, "users n_items"]) -> None:
        """Set the scale such that the softmax over a user's cosines counts `share` times as much as the neighbours'
        weights, on average over these users. One scale for all users, so that a score needs no sum over items."""
        log_sums = (cosines / self.config.temperature).logsumexp(dim=1)
        self.log_scale.copy_(log_sums.mean() - np.log(self.config.share))

    @torch.no_grad()
    def on(self, histories: Histories, users: Tensor | None = None) -> AtPairs:
        """As `ScoreTerm.on`: the boosts; none for items of the history itself."""
        histories = histories.to(self.items.device)
        pairs, strength = decayed_pairs(histories, self.config.decay)
        users, rows, strength = self._as_known(pairs, strength)
        boosted = self.items[rows].long()
        found = [(users.repeat_interleave(boosted.shape[1]), boosted.flatten(),
                  (self.weights[rows] * strength[:, None]).flatten())]
        if self._parents is not None:
            own = users, rows, self.weights[rows].amax(dim=1) * strength
            found.append(self._children(self._parents, *(torch.cat(x) for x in zip(found[0], own, strict=True))))
        users, items, boosts = (torch.cat(x) for x in zip(*found, strict=True))
        width = len(self.items) + (0 if self._parents is None else len(self._parents[0]))
        keys, place = torch.unique(users * width + items, return_inverse=True)
        total = torch.zeros(len(keys), device=boosts.device).index_add_(0, place, boosts)
        kept = (total > 0) & ~torch.isin(keys, histories.users * width + histories.items)
        return AtPairs(Pairs(keys[kept] // width, keys[kept] % width), total[kept], self._join)

    def _as_known(self, pairs: Pairs, strength: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Users, known rows and weights of the histories' items; new items are replaced by their parents."""
        known = pairs.items < len(self.items)
        if self._parents is None:
            return pairs.users[known], pairs.items[known], strength[known]
        parents, shares = (x[pairs.items[~known] - len(self.items)] for x in self._parents)
        return (torch.cat([pairs.users[known], pairs.users[~known].repeat_interleave(parents.shape[1])]),
                torch.cat([pairs.items[known], parents.flatten()]),
                torch.cat([strength[known], (shares * strength[~known][:, None]).flatten()]))

    def _children(self, inherited: tuple[Tensor, Tensor], users: Tensor, items: Tensor, boosts: Tensor
                  ) -> tuple[Tensor, Tensor, Tensor]:
        """What boosts of known items add to new items: (users, new rows, boosts)."""
        parents, shares = inherited
        order = torch.argsort(parents.flatten(), stable=True)
        starts = torch.searchsorted(parents.flatten()[order], items)
        counts = torch.searchsorted(parents.flatten()[order], items, right=True) - starts
        source = torch.repeat_interleave(torch.arange(len(items), device=items.device), counts)
        ends = counts.cumsum(0)
        place = order[torch.arange(len(source), device=items.device) - (ends - counts)[source] + starts[source]]
        return users[source], place // parents.shape[1] + len(self.items), boosts[source] * shares.flatten()[place]

    def _join(self, cosines: Float[Tensor, "some"], boosts: Float[Tensor, "some"]) -> Float[Tensor, "some"]:
        tau = self.config.temperature
        return tau * torch.logaddexp(cosines / tau, boosts.log() + self.log_scale)
