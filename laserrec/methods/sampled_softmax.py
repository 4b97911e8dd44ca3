"""Softmax over a sample of the items, for catalogues over which the full one takes too much time and memory.

A step's candidates are the same for all its targets: items drawn uniformly without replacement, and the batch's own
targets, among which popular items are frequent (Yang et al. 2020, "Mixed Negative Sampling for Learning Two-tower
Neural Networks in Recommendations"). A candidate counts 1 / probability of being one (the logQ correction: Bengio &
Senecal 2008; Yi et al. 2019). The targets of a state's own sequence are candidates for certain and count once, so that
the sum in the softmax is estimated without bias (for the target alone: Khrylchenko et al. 2025, "Correcting the LogQ
Correction"). With all items drawn it is the full softmax.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from laserrec.config import IdLoss, IdModelConfig, IdModelKind, Softmax
from laserrec.data.histories import Histories
from laserrec.methods.targets import Candidates, Targets, with_offset

FULL_ITEMS = {kind: 3_000 if kind == IdModelKind.SASREC else 10_000 for kind in IdModelKind}
"""Items up to which `auto` means the full softmax. With 4,385 a SASRec is as good with the sampled one
(docs/scaling.md); the others were not tried."""


def is_sampled(config: IdModelConfig, n_items: int) -> bool:
    """Whether a model of so many items is trained with a sample of them."""
    if config.loss != IdLoss.CROSS_ENTROPY:
        return False
    return config.softmax == Softmax.SAMPLED or (config.softmax == Softmax.AUTO and n_items > FULL_ITEMS[config.kind])


class Sampler:
    """Draws the candidates of each batch. `targets`: the training sequences without what is never a target."""

    def __init__(self, targets: Histories, n_items: int, negatives: int):
        counts = torch.bincount(targets.items.cpu(), minlength=n_items).double()
        self.share = (counts / counts.sum().clamp(min=1)).float()
        self.n_items, self.negatives = n_items, min(negatives, n_items)

    def draw(self, targets: Int[Tensor, "targets"]) -> Candidates:
        """For a batch with these targets (on the CPU). Uses torch's random numbers."""
        rng = np.random.default_rng(int(torch.randint(2**62, ())))  # numpy draws without a permutation of all items
        drawn = rng.choice(self.n_items, self.negatives, replace=False, shuffle=False)
        items = torch.unique(torch.cat([torch.from_numpy(drawn), targets]))
        return Candidates(items, self.share[items], self.negatives / self.n_items, len(targets))


def sampled_loss(logits: Float[Tensor, "targets candidates"], part: Targets, offset: Float[Tensor, ""] | None
                 ) -> Float[Tensor, ""]:
    """The sum of the targets' cross-entropies over `part.candidates`. logits: changed in place. offset: is added to the
    logits of what a target's state has seen."""
    candidates = part.candidates
    assert candidates is not None
    row = part.places // part.inputs.shape[1]
    column = torch.searchsorted(candidates.items, part.items)
    correction = candidates.log_probability(torch.bincount(row, minlength=len(part.inputs)))
    correction[row, column] = 0.0  # the targets of a row's own sequence
    logits -= correction[row]
    if offset is not None:
        logits = with_offset(logits, part.seen.among(candidates.items), offset)
    return F.cross_entropy(logits, column, reduction="sum")
