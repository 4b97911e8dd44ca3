"""A small causal transformer over the history's item vectors, where the LLM does not read their texts (not in the
paper)."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from laserrec.config import TransformerConfig
from laserrec.data.histories import Histories
from laserrec.methods.parts import CausalEncoder
from laserrec.methods.sequence import by_length, initialise
from laserrec.util.device import move


class HistoryTransformer(nn.Module):
    """What it makes of a history is added to the sum of the history's items. It starts at zero, so that training starts
    from the match of texts."""

    def __init__(self, config: TransformerConfig, d_out: int):
        super().__init__()
        self.max_history = config.max_history
        self.enter, self.encoder = nn.Linear(d_out, config.d_model), CausalEncoder(config)
        self.map = nn.Linear(config.d_model, d_out, bias=False)
        initialise(self.enter)
        initialise(self.encoder)
        nn.init.zeros_(self.map.weight)

    def forward(self, histories: Histories, vectors: Callable[[Tensor], Float[Tensor, "some d_out"]]
                ) -> Float[Tensor, "users d_out"]:
        """To be added; nothing for an empty history. vectors: item rows -> their vectors of any length."""
        recent, device = histories.last(self.max_history), self.map.weight.device
        rows, lengths = move(recent.padded(0), device), move(recent.lengths, device)
        items, place = torch.unique(rows, return_inverse=True)
        whole = F.normalize(vectors(items), dim=-1) * self.enter.in_features**0.5  # as long as a whitened output
        entered = self.enter(whole)

        def last(some: Tensor, lengths: Tensor) -> Tensor:
            newest = (lengths - 1).clamp(min=0)
            return self.encoder(entered[some])[torch.arange(len(some), device=device), newest]

        return self.map(by_length(place, lengths, last)) * (lengths > 0)[:, None]
