"""The two towers of Laser, each in its variants: what makes a user's text part, and what makes an item's."""

from __future__ import annotations

from typing import Protocol, runtime_checkable

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from laserrec.data.histories import Histories
from laserrec.methods.laser.head import AddedOutput, Head
from laserrec.methods.laser.id_states import IdStates
from laserrec.methods.laser.mformer import Route
from laserrec.methods.laser.readers import Reader
from laserrec.methods.laser.student import Student
from laserrec.methods.laser.transformer import HistoryTransformer
from laserrec.methods.terms import decayed_sums
from laserrec.util.room import Room

Told = tuple[Float[Tensor, "users d_text"], Route | None]
"""Text parts of any length, and how the prefixes were routed."""


@runtime_checkable
class ItemSide(Protocol):
    """What makes items' vectors from their texts."""

    trained: bool
    """Whether the outputs change while Laser is trained."""

    def outputs(self, rows: Int[Tensor, "items"]) -> Float[Tensor, "items d_in"]:
        """What goes into the head."""
        ...


@runtime_checkable
class UserSide(Protocol):
    """What makes users' vectors from their histories."""

    def text(self, histories: Histories, hide: Bool[Tensor, "users"] | None = None) -> Told:
        """hide: users whose ID states are hidden."""
        ...


class ReadItems:
    """An item is a history of one item (paper, 3.1.1). plain: read without the trained tokens."""

    def __init__(self, reader: Reader, plain: bool):
        self.reader, self.plain, self.trained = reader, plain, not plain

    def outputs(self, rows: Int[Tensor, "items"]) -> Float[Tensor, "items d_llm"]:
        """The LLM's, with gradient to prefix and suffix if they are trained."""
        each = Histories(rows.cpu(), torch.arange(1, len(rows) + 1))
        return self.reader.read_items(each, self.plain)


class MeanItems:
    """An item is the mean of the LLM's outputs over its text (not in the paper)."""

    trained = False

    def __init__(self, means: Float[Tensor, "n_items d_means"]):
        self.means, self._room = means, Room()

    def add(self, means: Float[Tensor, "new d_means"]) -> None:
        """Of new items."""
        self.means = self._room.add(self.means, means)

    def outputs(self, rows: Int[Tensor, "items"]) -> Float[Tensor, "items d_means"]:
        """Of the frozen LLM."""
        return self.means[rows]


class ReadUsers:
    """A user is the LLM's output at the suffix, through the head that items pass too (paper)."""

    def __init__(self, reader: Reader, head: Head):
        self.reader, self.head = reader, head

    def text(self, histories: Histories, hide: Bool[Tensor, "users"] | None = None) -> Told:
        """One pass of the LLM."""
        outputs, route = self.reader.read(histories, hide)
        return self.head(outputs), route


class SummedUsers:
    """A user is the sum of the history's mean items, newer ones heavier (not in the paper). With a reader, a trained
    map of the output at the suffix is added; with a transformer, what it makes of the items."""

    def __init__(self, items: MeanItems, head: Head, decay: float, reader: Reader | None = None,
                 added: AddedOutput | None = None, transformer: HistoryTransformer | None = None):
        self.items, self.head, self.decay, self.reader, self.added = items, head, decay, reader, added
        self.transformer = transformer

    @property
    def more(self) -> str | None:
        """What there is beside the sum."""
        if self.reader is not None:
            return "the LLM's reading of the history"
        return None if self.transformer is None else "the transformer over the history"

    def sums_alone(self) -> SummedUsers:
        """Without that."""
        return SummedUsers(self.items, self.head, self.decay)

    def text(self, histories: Histories, hide: Bool[Tensor, "users"] | None = None) -> Told:
        """With a reader, one pass of the LLM."""
        with torch.no_grad():
            sums = decayed_sums(histories.to(self.items.means.device), self._white, self.decay)
            start = F.normalize(sums, dim=-1) * sums.shape[-1] ** 0.5  # as long as a whitened output
        user = self.head.project(start)
        if self.transformer is not None:
            return user + self.transformer(histories, self._white), None
        if self.reader is None or self.added is None:
            return user, None
        outputs, route = self.reader.read(histories, hide)
        return user + self.added(outputs), route

    @torch.no_grad()
    def _white(self, rows: Int[Tensor, "items"]) -> Float[Tensor, "items d_white"]:
        return self.head.whiten(self.items.means[rows])


class StudentUsers:
    """A user is what a small network makes of the history's item vectors and the ID model's state (laserrec distil).
    `vectors`: text parts of the items, of unit length."""

    def __init__(self, student: Student, ids: IdStates, decay: float):
        self.student, self.ids, self.decay = student, ids, decay
        self.vectors: Tensor = torch.zeros(0)
        self._room = Room()

    def add(self, vectors: Float[Tensor, "new d_text"]) -> None:
        """Of new items."""
        self.vectors = self._room.add(self.vectors, vectors)

    def inputs(self, histories: Histories) -> tuple[Tensor, Tensor]:
        """What the network reads: sums of items [users d_text] and ID states [users d_id]."""
        here = histories.to(self.vectors.device)
        return decayed_sums(here, lambda rows: self.vectors[rows], self.decay), self.ids.user(histories)

    def text(self, histories: Histories, hide: Bool[Tensor, "users"] | None = None) -> Told:
        """No pass of the LLM."""
        sums, state = self.inputs(histories)
        return self.student(sums, state if hide is None else state.masked_fill(hide[:, None], 0.0)), None
