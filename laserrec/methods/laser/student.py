"""A small network that learns what a fitted Laser's LLM makes of a history, and reads no text."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from laserrec.config import StudentConfig


class Student(nn.Module):
    """The history's item embeddings, summed, and the ID model's state -> the text part of the user's embedding.

    One map for the sum and, beside it, one hidden layer over both. Untrained it says the sum itself: the user is the
    mean of the items. Items that came after training have embeddings too, so that it reads them like any other.

    Parameters: `d_text`: width of the embeddings' text part; `d_id`: of the ID model's states.
    """

    def __init__(self, config: StudentConfig, d_text: int, d_id: int):
        super().__init__()
        self.config = config
        self.map = nn.Linear(d_text, d_text, bias=False)
        self.hidden = nn.Linear(d_text + d_id, config.hidden)
        self.added = nn.Linear(config.hidden, d_text)
        self.dropout = nn.Dropout(config.dropout)
        nn.init.eye_(self.map.weight)
        nn.init.zeros_(self.added.weight)
        nn.init.zeros_(self.added.bias)

    def forward(
        self, history: Float[Tensor, "batch d_text"], state: Float[Tensor, "batch d_id"]
    ) -> Float[Tensor, "batch d_text"]:
        """Inputs of any length; a state of zeros says that the ID model knows nothing."""
        start, state = (F.normalize(x, dim=-1) * x.shape[-1] ** 0.5 for x in (history, state))
        seen = self.dropout(torch.cat([start, state], dim=-1))
        return self.map(start) + self.added(self.dropout(F.gelu(self.hidden(seen))))
