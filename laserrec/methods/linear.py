"""Rivals without training by gradient: item-to-item regression, and the nearest items by the LLM's untrained outputs.

Both never recommend what stands in the history: its items are ranked behind all others.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from laserrec.config import NeighboursConfig
from laserrec.data.dataset import Dataset
from laserrec.methods.neighbours import regress, weigh
from laserrec.methods.seen import Seen

EASE, TEXT_EASE, NEAREST = "EASE", "EASE with LLM text", "untrained LLM, nearest items"
"""What tables call them."""


class _Weighed:
    """A score is the sum over the history's items, newer ones heavier, of what each says about all items."""

    def __init__(self, n_items: int, recency: float):
        self._n_items, self._recency = n_items, recency

    def _histories(self, histories: Sequence[np.ndarray]) -> Float[Tensor, "batch n_items"]:
        x = torch.zeros(len(histories), self._n_items)
        for row, history in zip(x, histories, strict=True):
            items, weights = weigh(history, self._recency)
            row[torch.as_tensor(items.astype(np.int64)) - 1] = torch.as_tensor(weights)
        return x

    def _new_first(self, scores: Tensor, histories: Sequence[np.ndarray]) -> Float[Tensor, "batch n_items"]:
        seen = Seen.of(histories)
        span = scores.amax(dim=1) - scores.amin(dim=1) + 1
        scores[seen.users, seen.items] -= span[seen.users]
        return scores


class ItemRegression(_Weighed):
    """EASE (Steck 2019) on the training sequences; with `text` (Float[n_items d_text]) and a text_weight, the items'
    texts are regressed beside them (Jeunen et al. 2020). See laserrec.methods.neighbours."""

    def __init__(self, dataset: Dataset, config: NeighboursConfig, text: Float[Tensor, "n_items d_text"] | None = None):
        super().__init__(dataset.n_items, config.recency)
        self.weights = regress(list(dataset.train_sequences.values()), dataset.n_items, config, text)

    def score(self, histories: Sequence[np.ndarray]) -> Float[Tensor, "batch n_items"]:
        return self._new_first(self._histories(histories) @ self.weights, histories)


class NearestText(_Weighed):
    """Cosine of the history's items' text vectors, summed, with each item's (`text`: Float[n_items d_text])."""

    def __init__(self, text: Float[Tensor, "n_items d_text"], recency: float = 0.8):
        super().__init__(len(text), recency)
        self.unit = F.normalize(text, dim=-1)

    def score(self, histories: Sequence[np.ndarray]) -> Float[Tensor, "batch n_items"]:
        users = F.normalize(self._histories(histories) @ self.unit, dim=-1)
        return self._new_first(users @ self.unit.T, histories)
