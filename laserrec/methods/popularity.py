"""Popularity: everyone gets the items with the most training interactions."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from laserrec.data.dataset import Dataset


class Popularity:
    """Counts of split "train" alone; items with equal counts are ties, which the evaluator ranks by its tie rule."""

    def __init__(self, dataset: Dataset):
        sequences = list(dataset.train_sequences.values())
        items = np.concatenate(sequences) if sequences else np.zeros(0, np.int32)
        counts = np.bincount(items, minlength=dataset.n_items + 1)[1:]
        self.counts: Float[Tensor, "n_items"] = torch.from_numpy(counts).float()

    def score(self, histories: Sequence[np.ndarray]) -> Float[Tensor, "batch n_items"]:
        """The same row for every history."""
        return self.counts.expand(len(histories), -1)
