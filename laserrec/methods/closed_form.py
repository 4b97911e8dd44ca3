"""Methods without training by gradient: popularity, item-to-item regression, and the nearest items by text.

The last two never recommend what stands in the history: its items are ranked behind all others.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from laserrec.config import NeighboursConfig
from laserrec.data.dataset import Dataset
from laserrec.data.histories import Histories
from laserrec.methods.local_regression import largest
from laserrec.methods.neighbours import is_local, regress, sparse_regress
from laserrec.methods.protocol import Examples, Trainable
from laserrec.methods.terms import decayed_pairs, decayed_sums


class Popularity(nn.Module):
    """Everyone gets the items with the most training interactions. Items with equal counts are ties."""

    counts: Float[Tensor, "n_items"]

    def __init__(self, n_items: int):
        super().__init__()
        self.register_buffer("counts", torch.zeros(n_items))

    def fit(self, dataset: Dataset) -> Popularity:
        """Count split "train" alone."""
        self.counts.copy_(torch.bincount(dataset.train_sequences.items, minlength=len(self.counts)))
        return self

    def score(self, histories: Histories) -> Float[Tensor, "users n_items"]:
        """The same row for every history."""
        return self.counts.expand(len(histories), -1).clone()


class ItemRegression(nn.Module):
    """EASE (Steck 2019); with text vectors, their dimensions are further rows of the regression (Jeunen et al. 2020).
    A score is the sum of the weights of the history's items, newer ones heavier. Of a regression in its local form each
    item keeps its config.candidates largest weights, by size without the sign."""

    weights: Float[Tensor, "n_items n_items"] | Float[Tensor, "n_items kept"]
    items: Int[Tensor, "n_items kept"] | None
    """Local form: the items that the weights are for."""

    def __init__(self, config: NeighboursConfig, n_items: int):
        super().__init__()
        self.config, local = config, is_local(config, n_items)
        self.register_buffer("weights", torch.zeros(n_items, regression_width(config, n_items)))
        self.register_buffer("items", torch.zeros(self.weights.shape, dtype=torch.int32) if local else None)

    def fit(self, dataset: Dataset, text: Float[Tensor, "n_items d_text"] | None = None) -> ItemRegression:
        """See laserrec.methods.neighbours.regress."""
        rows, device = dataset.train_sequences, self.weights.device
        if self.items is None:
            # Laid out by rows, as after loading: sums over another layout round differently.
            self.weights = regress(rows, dataset.n_items, self.config, text, device).contiguous()
            return self
        found = sparse_regress(rows, dataset.n_items, self.config, text, device)
        items, weights = largest(found, self.items.shape[1], magnitude=True)
        self.items.copy_(torch.from_numpy(items))
        self.weights.copy_(torch.from_numpy(weights))
        return self

    def score(self, histories: Histories) -> Float[Tensor, "users n_items"]:
        """Sums of weights, seen items last."""
        histories = histories.to(self.weights.device)
        pairs, decay = decayed_pairs(histories, self.config.decay)
        if self.items is None:  # the rows of the history's items alone, of all that a matrix product would read
            starts = torch.searchsorted(pairs.users, torch.arange(len(histories), device=pairs.users.device))
            scores = F.embedding_bag(pairs.items, self.weights, starts, mode="sum", per_sample_weights=decay)
            return _seen_last(scores, histories)
        scores = torch.zeros(len(histories), len(self.weights), device=self.weights.device)
        place = pairs.users[:, None] * len(self.weights) + self.items[pairs.items]
        added = self.weights[pairs.items] * decay[:, None]
        scores.view(-1).index_add_(0, place.flatten(), added.flatten())
        return _seen_last(scores, histories)


def regression_width(config: NeighboursConfig, n_items: int) -> int:
    """Weights of an item in an `ItemRegression`."""
    return min(config.candidates, n_items) if is_local(config, n_items) else n_items


class NearestText(nn.Module):
    """Cosine of each item's text vector with the sum of the history's, newer items heavier."""

    unit: Float[Tensor, "n_items d_text"]

    def __init__(self, n_items: int, decay: float = 0.8):
        super().__init__()
        self.decay = decay
        self.register_buffer("unit", torch.zeros(n_items, 0))

    def fit(self, text: Float[Tensor, "n_items d_text"]) -> NearestText:
        """Keep the vectors at unit length."""
        self.unit = F.normalize(text, dim=-1)
        return self

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """Of vectors of any width."""
        self.unit = torch.empty_like(state_dict["unit"], device=self.unit.device)
        return super().load_state_dict(state_dict, strict, assign)

    def score(self, histories: Histories) -> Float[Tensor, "users n_items"]:
        """Cosines, seen items last."""
        users = decayed_sums(histories.to(self.unit.device), lambda rows: self.unit[rows], self.decay)
        return _seen_last(F.normalize(users, dim=-1) @ self.unit.T, histories)


def _seen_last(scores: Tensor, histories: Histories) -> Float[Tensor, "users n_items"]:
    seen = histories.distinct().to(scores.device)
    span = scores.amax(dim=1) - scores.amin(dim=1) + 1
    scores[seen.users, seen.items] -= span[seen.users]
    return scores


ClosedForm = Popularity | ItemRegression | NearestText


class FitOnce(Trainable):
    """A `Trainable` without epochs: the model is made by one call."""

    def __init__(self, module: ClosedForm, fit: Callable[[], object]):
        self.module, self._fit = module, fit

    def start(self, pause: Callable[[], None]) -> None:
        """Make the model."""
        self._fit()
        pause()

    def begin_epoch(self, number: int) -> Examples:
        """Never called."""
        raise NotImplementedError("this method has no epochs")

    def loss(self, batch: object, rows: object) -> dict[str, Tensor]:
        """Never called."""
        raise NotImplementedError("this method has no epochs")
