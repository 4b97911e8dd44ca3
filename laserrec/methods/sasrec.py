"""SASRec (Kang & McAuley 2018, "Self-Attentive Sequential Recommendation"), with the full softmax over all items.

Positions count from the window's first item: counted back from the newest, as in the left-padded original, all but the
last position of a short training sequence would be trained at places that are never asked for.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from laserrec.methods.sequence import SequenceModel, Targets, make_targets


class SASRec(SequenceModel):
    """Causal self-attention; every position predicts the next item."""

    causal = True

    def _positions(self, real: Bool[Tensor, "batch seq"]) -> Int[Tensor, "one seq"]:
        return torch.arange(real.shape[1], device=real.device)[None]

    def next_item_state(self, items: Int[Tensor, "batch seq"]) -> Float[Tensor, "batch d_id"]:
        """The newest item's."""
        newest = (items != self.pad).sum(dim=1) - 1
        return self.states(items)[torch.arange(len(items), device=items.device), newest]

    def targets(self, items: Int[Tensor, "batch seq"]) -> Targets:
        """All positions that have a next item; a sequence's last item is a target only."""
        targets = items[:, 1:]
        inputs = items[:, :-1].masked_fill(targets == self.pad, self.pad)
        place = torch.arange(inputs.shape[1])

        def visible(row: Tensor, column: Tensor) -> Tensor:
            return inputs[row].masked_fill(place > column[:, None], self.pad)

        return make_targets(inputs, targets, visible, self.pad, self.seen is not None)
