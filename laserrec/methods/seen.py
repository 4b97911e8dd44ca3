"""Which items stand in which histories."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor


@dataclass(frozen=True)
class Seen:
    """Pairs (user row, item row): the item stands in the user's history."""

    users: Int[Tensor, "pairs"]
    items: Int[Tensor, "pairs"]

    @staticmethod
    def of(histories: Sequence[np.ndarray]) -> Seen:
        """From histories of dense items (item j is row j - 1)."""
        unique = [np.unique(h) for h in histories]
        users = np.repeat(np.arange(len(unique)), [len(h) for h in unique])
        return Seen(torch.as_tensor(users), torch.as_tensor(np.concatenate(unique).astype(np.int64) - 1))
