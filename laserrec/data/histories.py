"""Users' ordered histories as two tensors: one type from the door to the score."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from jaxtyping import Bool, Int
from torch import Tensor

from laserrec.util.device import move


@dataclass(frozen=True)
class Histories:
    """Histories of item rows (0 to n_items - 1), oldest first. A history may be empty."""

    items: Int[Tensor, "total"]
    """All histories, one behind another."""
    ends: Int[Tensor, "users"]
    """Where each history ends: history u is items[ends[u - 1] : ends[u]]."""

    @staticmethod
    def of(rows: Iterable[Sequence[int] | np.ndarray | Tensor], device: torch.device | None = None) -> Histories:
        """From one sequence of item rows per user."""
        parts = [np.asarray(row, dtype=np.int64) for row in rows]
        items = np.concatenate(parts) if parts else np.zeros(0, np.int64)
        ends = np.cumsum([len(part) for part in parts], dtype=np.int64)
        return Histories(torch.as_tensor(items, device=device), torch.as_tensor(ends, device=device))

    def __len__(self) -> int:
        return len(self.ends)

    def __getitem__(self, user: int) -> Int[Tensor, "seq"]:
        """One history."""
        start = int(self.ends[user - 1]) if user else 0
        return self.items[start : int(self.ends[user])]

    @property
    def device(self) -> torch.device:
        """Where the tensors are."""
        return self.items.device

    @cached_property
    def starts(self) -> Int[Tensor, "users"]:
        """Where each history begins."""
        return torch.cat([self.ends.new_zeros(min(1, len(self))), self.ends[:-1]])

    @cached_property
    def lengths(self) -> Int[Tensor, "users"]:
        """Items of each history."""
        return self.ends - self.starts

    @cached_property
    def users(self) -> Int[Tensor, "total"]:
        """The user of each item."""
        rows = torch.arange(len(self), device=self.device)
        return torch.repeat_interleave(rows, self.lengths, output_size=len(self.items))

    @cached_property
    def ages(self) -> Int[Tensor, "total"]:
        """Steps back in time of each item: 0 for a history's newest."""
        place = torch.arange(len(self.items), device=self.device)
        return self.ends[self.users] - 1 - place

    def lists(self) -> list[list[int]]:
        """One list of item rows per user."""
        items, ends = self.items.tolist(), self.ends.tolist()
        return [items[start:end] for start, end in zip([0, *ends[:-1]], ends, strict=True)] if ends else []

    def to(self, device: torch.device) -> Histories:
        """The same on another device."""
        if self.device == device:
            return self
        return Histories(move(self.items, device), move(self.ends, device))

    def take(self, users: Int[Tensor, "some"] | np.ndarray | Sequence[int]) -> Histories:
        """Some users' histories, in the order given."""
        users = torch.as_tensor(users, dtype=torch.long, device=self.device)
        lengths = self.lengths[users]
        ends = lengths.cumsum(0)
        count = int(ends[-1]) if len(ends) else 0
        shift = torch.repeat_interleave(self.starts[users] - (ends - lengths), lengths, output_size=count)
        return Histories(self.items[torch.arange(count, device=self.device) + shift], ends)

    def where(self, kept: Bool[Tensor, "total"]) -> Histories:
        """Without the items at which `kept` is False; all users stay."""
        counts = torch.zeros_like(self.ends).index_add_(0, self.users, kept.long())
        return Histories(self.items[kept], counts.cumsum(0))

    def last(self, count: int) -> Histories:
        """The newest `count` items of each."""
        return self if not len(self) or int(self.lengths.max()) <= count else self.where(self.ages < count)

    def without_oldest(self) -> Histories:
        """Each without its oldest item: of a training sequence, all that stand behind another one."""
        return self.where(self.ages < self.lengths[self.users] - 1)

    def windows(self, length: int, shift: Int[Tensor, "users"]) -> Histories:
        """Each cut into windows of at most `length` >= 2 items, newest window first, of which neighbours share an item:
        every item but a history's oldest follows another one in exactly one window. The newest window of a history
        that is longer has `shift` items less; 0 <= shift < length - 1. Shorter histories stay as they are."""
        steps = length - 1
        shift = torch.where(self.lengths > length, shift, 0)
        counts = ((self.lengths - 1 + shift + steps - 1) // steps).clamp(min=1)
        of = torch.repeat_interleave(torch.arange(len(self), device=self.device), counts)
        number = torch.arange(len(of), device=self.device) - (counts.cumsum(0) - counts)[of]
        newest = (number * steps - shift[of]).clamp(min=0)  # ages
        oldest = torch.minimum((number + 1) * steps - shift[of], self.lengths[of] - 1)
        lengths = oldest - newest + 1
        ends = lengths.cumsum(0)
        first = self.ends[of] - 1 - oldest - (ends - lengths)
        place = torch.repeat_interleave(first, lengths) + torch.arange(int(lengths.sum()), device=self.device)
        return Histories(self.items[place], ends)

    def below(self, n_items: int) -> Histories:
        """Without items of row n_items and above."""
        kept = self.items < n_items
        return self if bool(kept.all()) else self.where(kept)

    def padded(self, fill: int) -> Int[Tensor, "users longest"]:
        """As one matrix, `fill` behind the shorter ones; at least one column."""
        longest = max(1, int(self.lengths.max())) if len(self) else 1
        out = torch.full((len(self), longest), fill, dtype=torch.long, device=self.device)
        out[self.users, torch.arange(len(self.items), device=self.device) - self.starts[self.users]] = self.items
        return out

    def distinct(self) -> Pairs:
        """Which items stand in which histories."""
        width = int(self.items.max()) + 1 if len(self.items) else 1
        keys = torch.unique(self.users * width + self.items)
        return Pairs(keys // width, keys % width)


@dataclass(frozen=True)
class Pairs:
    """Pairs (user, item row), each once, ascending."""

    users: Int[Tensor, "pairs"]
    items: Int[Tensor, "pairs"]

    def among(self, rows: Int[Tensor, "rows"]) -> Pairs:
        """Those whose item is one of these rows, which ascend, with its place there for the item."""
        place = torch.searchsorted(rows, self.items).clamp(max=len(rows) - 1)
        there = rows[place] == self.items
        return Pairs(self.users[there], place[there])

    def to(self, device: torch.device) -> Pairs:
        """The same on another device."""
        return Pairs(move(self.users, device), move(self.items, device))
