"""Distil a fitted Laser into one that answers without the LLM (Hinton, Vinyals & Dean 2015, "Distilling the Knowledge
in a Neural Network").

The teacher reads histories drawn from the training sequences once: whole ones, beginnings, parts. A small network
learns the teacher's softmax over the items from what costs little: the sum of the history's item vectors and the ID
model's state. No label is read, and nothing of validation or test. All else stays: items, ID part, terms, new items.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from laserrec.config import StudentConfig
from laserrec.data.dataset import Dataset
from laserrec.data.histories import Histories
from laserrec.methods.laser.model import Laser
from laserrec.methods.laser.sides import StudentUsers
from laserrec.methods.protocol import Phase, Trainable
from laserrec.util.progress import Progress

_READ_AT_ONCE = 2048
"""Histories between two places where the teacher's reading can stop."""
_WARMUP_STEPS = 50
_MOST_ITEMS = 16_384
"""Of a larger catalogue so many are drawn for each step's softmax."""
_HIDDEN_STATES = 0.05
"""Share of the examples without an ID state, as in histories of new items alone."""


def draw_histories(sequences: Histories, config: StudentConfig) -> Histories:
    """Every sequence whole, and of those of at least two items `config.views` proper parts: beginnings and, in turn,
    any of its items in their order. At most config.histories of them, the same for the same seed."""
    rng = np.random.default_rng(config.seed)
    whole = [row for row in sequences.lists() if row]
    drawn = list(whole)
    for view in range(config.views):
        for row in whole:
            if len(row) > 1:
                count = int(rng.integers(1, len(row)))
                some = range(count) if view % 2 == 0 else np.sort(rng.choice(len(row), count, replace=False))
                drawn.append([row[i] for i in some])
    if len(drawn) > config.histories:
        drawn = [drawn[i] for i in np.sort(rng.choice(len(drawn), config.histories, replace=False))]
    return Histories.of(drawn)


@dataclass(frozen=True)
class _Batch:
    index: Int[Tensor, "batch"]
    hide: Tensor
    items: Int[Tensor, "some"] | None
    """Those of the softmax; None: all known ones."""


class DistilTask(Trainable):
    """Training the student. Reading the teacher's users is its start, and can be interrupted.

    Raises ValueError where `student` is a Laser without a student network.
    """

    def __init__(self, teacher: Laser, student: Laser, dataset: Dataset, progress: bool = False):
        self.teacher, self.student, self.progress = teacher, student, progress
        side, config = student.user_side, student.config.student
        if not isinstance(side, StudentUsers) or config is None:
            raise ValueError("the student has no student network")
        self.side, self.module = side, side.student
        self.n_items, self.config = dataset.n_items, config
        drawn = draw_histories(dataset.train_sequences, config)
        self.histories = drawn.take(drawn.lengths.argsort(stable=True))  # those of like length are read together
        self.users: Float[Tensor, "read d_text"] = torch.zeros(0, teacher.d_text, dtype=torch.float16)
        """The teacher's text parts of the histories read so far, of unit length."""

    def start(self, pause: Callable[[], None]) -> None:
        """The teacher reads the histories."""
        size = self.teacher.config.eval.batch_size
        done, count = len(self.users), len(self.histories)
        with Progress("reading histories with the LLM", count, self.progress, done) as bar:
            for rows in torch.arange(done, count).split(_READ_AT_ONCE):
                parts = [self.teacher.users(self.histories.take(some)) for some in rows.split(size)]
                text = F.normalize(torch.cat(parts)[:, : self.teacher.d_text], dim=-1)
                self.users = torch.cat([self.users, text.half().cpu()])
                bar.advance(len(rows))
                pause()

    def begin_epoch(self, number: int) -> DistilTask:
        """All histories."""
        self.module.train()
        return self

    @property
    def lengths(self) -> Int[np.ndarray, "examples"]:
        """All alike: a student reads sums."""
        return np.ones(len(self.histories), dtype=np.int64)

    def batch(self, index: Int[np.ndarray, "batch"]) -> _Batch:
        """As `Examples.batch`."""
        items = torch.randperm(self.n_items)[:_MOST_ITEMS] if self.n_items > _MOST_ITEMS else None
        return _Batch(torch.as_tensor(index), torch.rand(len(index)) < _HIDDEN_STATES, items)

    def loss(self, batch: _Batch, rows: Int[np.ndarray, "some"]) -> dict[str, Tensor]:
        """Cross-entropy to the teacher's softmax at its temperature."""
        index, device, tau = batch.index[rows], self.student.device, self.teacher.temperature
        items = self.side.vectors[: self.n_items]
        items = items if batch.items is None else items[batch.items.to(device)]
        text, _ = self.side.text(self.histories.take(index), batch.hide[rows].to(device))
        with torch.no_grad():
            wanted = (self.users[index].to(device).float() @ items.T / tau).softmax(dim=-1)
        loss = F.cross_entropy(F.normalize(text, dim=-1) @ items.T / tau, wanted, reduction="sum")
        return {"loss": loss / len(batch.index)}

    def scorer(self) -> Laser:
        """The distilled model."""
        return self.student.eval()

    def state(self) -> dict[str, Tensor]:
        """The student and what the teacher has read."""
        return {**self.module.state_dict(), "users": self.users}

    def load(self, state: dict[str, Tensor]) -> None:
        """Inverse of `state`."""
        self.users = state["users"].cpu()
        self.module.load_state_dict({name: tensor for name, tensor in state.items() if name != "users"})


def distil_phase(task: DistilTask) -> Phase:
    """A rate that rises over the first steps and falls to zero; the last epoch is kept."""
    config = task.config
    steps = config.epochs * -(-len(task.histories) // config.batch_size)
    return Phase("distil", task, config.epochs, config.batch_size, config.lr, config.weight_decay,
                 warmup_fraction=min(0.5, _WARMUP_STEPS / max(1, steps)), cosine_decay=True, validates=False)
