"""What a method is: the few things that the evaluator, the trainer, the index and the server ask of one."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import numpy as np
import polars as pl
import torch
from jaxtyping import Float, Int
from torch import Tensor

from laserrec.data.histories import Histories
from laserrec.evaluation.evaluate import Scorer

__all__ = ["AppliedTerm", "Examples", "Growing", "Phase", "ScoreTerm", "Scorer", "Trainable", "Transferable",
           "TwoTower"]


@runtime_checkable
class AppliedTerm(Protocol):
    """A score term for one batch of histories."""

    def to_all(self, scores: Float[Tensor, "users items"]) -> Float[Tensor, "users items"]:
        """Scores of all items with the term in them; may change them in place."""
        ...

    def to_some(self, user: int, rows: Int[Tensor, "some"], scores: Float[Tensor, "some"]) -> Float[Tensor, "some"]:
        """The same for some items of one user."""
        ...

    def rows(self, user: int) -> Int[Tensor, "changed"]:
        """Items whose score the term changes, which a search by vectors alone cannot rank."""
        ...


@runtime_checkable
class ScoreTerm(Protocol):
    """What a score holds beside the product of two vectors."""

    def on(self, histories: Histories, users: Float[Tensor, "users d_out"]) -> AppliedTerm:
        """The term for these histories. users: their vectors, of `TwoTower.users`."""
        ...


@runtime_checkable
class TwoTower(Protocol):
    """All that index, server, batch and distillation ask: a score is users @ items.T, then each term in turn."""

    @property
    def terms(self) -> Sequence[ScoreTerm]:
        """In the order in which they are applied."""
        return ()

    @property
    def depth(self) -> int:
        """How many of a user's best items by vectors alone an index has to find at least, since a term orders them
        anew."""
        return 0

    def users(self, histories: Histories) -> Float[Tensor, "users d_out"]:
        """Vectors of users."""
        ...

    def items(self, rows: Int[Tensor, "some"] | None = None) -> Float[Tensor, "items d_out"]:
        """Vectors of items; None: of all."""
        ...

    @torch.no_grad()
    def score(self, histories: Histories) -> Float[Tensor, "users items"]:
        """Users by items, terms included."""
        users = self.users(histories)
        scores = users @ self.items().T
        for term in self.terms:
            scores = term.on(histories, users).to_all(scores)
        return scores


@runtime_checkable
class Growing(Protocol):
    """A model that takes items it was not trained on, by their text."""

    def add_items(self, items: pl.DataFrame, vectors: Float[Tensor, "new d_out"] | None = None,
                  means: Float[Tensor, "new d_means"] | None = None) -> Float[Tensor, "new d_out"]:
        """Append items (columns title and the attributes) and return their vectors. vectors: theirs, from an earlier
        call on the same model, which saves making them. means: where the model keeps what the LLM made of each text
        (`item_tensors`), that of these items; together with `vectors` it saves reading the texts."""
        ...


@runtime_checkable
class Transferable(Protocol):
    """A model that knows items by their texts alone, so that it can score a whole other catalogue."""

    def transferred(self, items: pl.DataFrame) -> Scorer:
        """The same weights over these items (columns title and the attributes)."""
        ...


@runtime_checkable
class Examples(Protocol):
    """What one epoch trains on."""

    @property
    def lengths(self) -> Int[np.ndarray, "examples"]:
        """By which examples are batched with their like: items or tokens."""
        ...

    def batch(self, index: Int[np.ndarray, "batch"]) -> Any:
        """These examples, ready for `Trainable.loss`. What is drawn at random here is the same in all processes."""
        ...


@runtime_checkable
class Trainable(Protocol):
    """All that the trainer asks. A task brings `module`, `begin_epoch` and `loss`, and what differs from here."""

    module: Any
    """A torch.nn.Module. Its parameters that require a gradient are trained."""

    def decayed(self) -> Iterable[Tensor]:
        """Those of its parameters that weight decay pulls towards zero."""
        return self.module.parameters()

    def start(self, pause: Callable[[], None]) -> None:
        """Work before the first epoch, such as a closed form. It may call `pause` wherever `state` is whole and the
        work can go on from it: a checkpoint may be written there, or the training stopped."""
        return

    def begin_epoch(self, number: int) -> Examples:
        """Examples of the epoch (from 1); the same for the same number."""
        ...

    def loss(self, batch: Any, rows: Int[np.ndarray, "some"]) -> dict[str, Tensor]:
        """What these rows of the batch add to the whole batch's loss: "loss", which is differentiated, and any other
        numbers for the curves. Summed over a partition of the batch they are the batch's."""
        ...

    def end_epoch(self) -> None:
        """Work after the last step, before validation."""
        return

    def scorer(self) -> Scorer:
        """The model as it is now, without dropout, for validation."""
        return self.module.eval()

    def state(self) -> dict[str, Tensor]:
        """Everything that changes: with it a training goes on as if it had never stopped."""
        return self.module.state_dict()

    def load(self, state: dict[str, Tensor]) -> None:
        """Inverse of `state`."""
        self.module.load_state_dict(state)


@dataclass(frozen=True)
class Phase:
    """One stretch of training with settings of its own."""

    name: str
    task: Trainable
    epochs: int
    batch_size: int = 128
    lr: float = 1e-3
    """Peak learning rate of AdamW."""
    weight_decay: float = 0.0
    """AdamW's decoupled weight decay, of `Trainable.decayed`."""
    warmup_fraction: float = 0.0
    """Share of the steps in which the rate rises linearly from zero."""
    cosine_decay: bool = False
    """The rate falls to zero along a cosine."""
    max_grad_norm: float | None = None
    tokens_per_pass: int | None = None
    """A batch goes through the model in passes of about so many of the examples' lengths; None: at once."""
    validates: bool = True
    """The epoch that is best on validation is kept; else the last."""
    validates_start: bool = False
    """Validate before the first epoch too, for the curves."""
    keeps_start: bool = False
    """Validate before the first epoch, and keep that state unless an epoch is better."""
    patience: int | None = None
    """Stop after so many validations in a row without a better one."""
    eval_every: int = 1
    """Epochs between two validations; the last epoch has one too."""
