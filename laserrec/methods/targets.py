"""What a batch of sequences is trained to predict, and the items that its targets are told from."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float, Int
from torch import Tensor

from laserrec.data.histories import Pairs
from laserrec.util.device import move


@dataclass(frozen=True)
class Candidates:
    """The items that one batch's targets are told from."""

    items: Int[Tensor, "candidates"]
    """Rows, each once, ascending; all targets of the batch are among them."""
    share: Float[Tensor, "candidates"]
    """How often each is a target in the training data; the shares of all items add up to 1."""
    drawn: float
    """Share of the catalogue that was drawn."""
    targets: int
    """Of the whole batch."""

    def to(self, device: torch.device) -> Candidates:
        """The same on another device."""
        return replace(self, items=move(self.items, device), share=move(self.share, device))

    def log_probability(self, own: Int[Tensor, "rows"]) -> Float[Tensor, "rows candidates"]:
        """Of being drawn, or a target of another sequence in the batch. own: targets of the row's own sequence."""
        others = (self.targets - own)[:, None]
        return torch.log1p(-(1 - self.drawn) * (1 - self.share) ** others)


@dataclass(frozen=True)
class Targets:
    """A batch with what is to be predicted in it; built on the CPU, then moved."""

    inputs: Int[Tensor, "batch seq"]
    places: Int[Tensor, "targets"]
    """Flat positions (row * seq + column) whose states predict something, ascending."""
    items: Int[Tensor, "targets"]
    """The items there."""
    seen: Pairs
    """(target, item): items that the target's state may see."""
    candidates: Candidates | None = None
    """Of the whole batch; None: all items."""

    def rows(self, rows: Int[Tensor, "some"]) -> Targets:
        """Some rows of the batch."""
        seq = self.inputs.shape[1]
        of = self.places // seq
        new_row = torch.full((len(self.inputs),), -1).index_copy_(0, rows, torch.arange(len(rows)))
        kept = new_row[of] >= 0
        order = torch.argsort(new_row[of[kept]], stable=True)
        places = (new_row[of] * seq + self.places % seq)[kept][order]
        number = torch.full((len(of),), -1).index_copy_(0, kept.nonzero()[:, 0][order], torch.arange(len(places)))
        users = number[self.seen.users]
        return Targets(self.inputs[rows], places, self.items[kept][order],
                       Pairs(users[users >= 0], self.seen.items[users >= 0]), self.candidates)

    def to(self, device: torch.device) -> Targets:
        """The same on another device."""
        moved = (move(x, device) for x in (self.inputs, self.places, self.items))
        return Targets(*moved, self.seen.to(device), None if self.candidates is None else self.candidates.to(device))


def make_targets(inputs: Tensor, targets: Tensor, visible: Callable[[Tensor, Tensor], Tensor], pad: int,
                 offset: bool) -> Targets:
    """`targets`: Int[batch seq], `pad` where nothing is predicted. visible: rows and columns of targets -> the items
    that each may see, Int[targets seq], `pad` elsewhere; called only if there is a seen offset."""
    row, column = (targets != pad).nonzero(as_tuple=True)
    seen = Pairs(row[:0], row[:0])
    if offset:
        items = visible(row, column)
        target, place = (items != pad).nonzero(as_tuple=True)
        keys = torch.unique(target * (pad + 1) + items[target, place])
        seen = Pairs(keys // (pad + 1), keys % (pad + 1))
    return Targets(inputs, row * inputs.shape[1] + column, targets[row, column], seen)


def next_item_targets(items: Int[Tensor, "batch seq"], pad: int, offset: bool) -> Targets:
    """A causal model's: all positions that have a next item; a sequence's last item is a target only. items: padded on
    the right, on the CPU. offset: whether there is a seen offset."""
    targets = items[:, 1:]
    inputs = items[:, :-1].masked_fill(targets == pad, pad)
    place = torch.arange(inputs.shape[1])

    def visible(row: Tensor, column: Tensor) -> Tensor:
        return inputs[row].masked_fill(place > column[:, None], pad)

    return make_targets(inputs, targets, visible, pad, offset)


def with_offset(logits: Float[Tensor, "targets items"], seen: Pairs, offset: Float[Tensor, ""]
                ) -> Float[Tensor, "targets items"]:
    """The offset added at these pairs (target, item)."""
    at = seen.users * logits.shape[1] + seen.items
    return logits.flatten().index_add(0, at, offset.expand(len(at))).view_as(logits)
