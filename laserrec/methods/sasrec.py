"""SASRec (Kang & McAuley 2018, "Self-Attentive Sequential Recommendation"), with the full softmax over all items.

Positions count from the window's first item: counted back from the newest, as in the left-padded original, all but the
last position of a short training sequence would be trained at places that are never asked for.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from laserrec.methods.sequence import SequenceModel


class SASRec(SequenceModel):
    """Causal self-attention; every position predicts the next item."""

    causal = True

    def _positions(self, real: Bool[Tensor, "batch seq"]) -> Int[Tensor, "one seq"]:
        return torch.arange(real.shape[1], device=real.device)[None]
