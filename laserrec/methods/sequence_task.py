"""Training a sequence model on whole sequences, for all methods over histories."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor, nn

from laserrec.data.dataset import Dataset
from laserrec.data.histories import Histories
from laserrec.methods.protocol import Trainable
from laserrec.methods.sampled_softmax import Sampler
from laserrec.methods.sequence import NextItemModel
from laserrec.methods.targets import Targets
from laserrec.util.errors import UserError


def with_next_item(sequences: Histories) -> Int[Tensor, "some"]:
    """Those of two items or more. Raises UserError where there are none."""
    some = (sequences.lengths > 1).nonzero()[:, 0]
    if not len(some):
        raise UserError("no user has two training interactions; there is nothing to learn a sequence from")
    return some


class SequenceTask(Trainable):
    """Training a sequence model on whole sequences."""

    def __init__(self, model: NextItemModel, dataset: Dataset):
        """Raises UserError where no sequence has a next item."""
        self.module = model
        self.sequences = dataset.train_sequences.take(with_next_item(dataset.train_sequences))
        self.sampler = model.sampler(self.sequences)

    def start(self, pause: Callable[[], None]) -> None:
        """Tell the model which items it will know."""
        self.module.note_trained(self.sequences.items)

    def decayed(self) -> Iterable[nn.Parameter]:
        """All but the seen offset."""
        offset = None if self.module.seen is None else self.module.seen.offset
        return (p for p in self.module.parameters() if p is not offset)

    def begin_epoch(self, number: int) -> SequenceExamples:
        """The sequences as they are, but for the share that is read in a random order. Those that are longer than the
        model reads, and a target, are cut into windows, at other places in each epoch, so that all interactions are
        learnt from."""
        self.module.train()
        config, sequences = self.module.config, self.sequences
        if config.shuffle:
            rng = np.random.default_rng((config.seed, number - 1, 1))
            mixed = torch.from_numpy(rng.random(len(sequences)) < config.shuffle)[sequences.users]
            key = torch.where(mixed, torch.from_numpy(rng.random(len(mixed))), -sequences.ages.double())
            order = torch.from_numpy(np.lexsort((key.numpy(), sequences.users.numpy())))
            sequences = Histories(sequences.items[order], sequences.ends)
        length = config.max_history + 1  # the last one is a target alone, or what BERT4Rec's mask stands for
        shift = np.random.default_rng((config.seed, number - 1, 2)).integers(0, length - 1, len(sequences))
        return SequenceExamples(sequences.windows(length, torch.from_numpy(shift)), self.module, self.sampler)

    def loss(self, batch: Targets, rows: np.ndarray) -> dict[str, Tensor]:
        """The rows' share of the mean over all targets of the batch."""
        part = batch if len(rows) == len(batch.inputs) else batch.rows(torch.as_tensor(rows))
        loss, seen = self.module.loss(part) / len(batch.places), self.module.seen
        told = {} if seen is None else {"seen_offset": seen.offset.detach() * (len(rows) / len(batch.inputs))}
        return {"loss": loss, **told}


@dataclass(frozen=True)
class SequenceExamples:
    """One epoch's sequences."""

    sequences: Histories
    model: NextItemModel
    sampler: Sampler | None = None

    @property
    def lengths(self) -> Int[np.ndarray, "examples"]:
        """Items of each."""
        return self.sequences.lengths.numpy()

    def batch(self, index: Int[np.ndarray, "batch"]) -> Targets:
        """Padded, with targets."""
        targets = self.model.targets(self.sequences.take(index).padded(self.model.pad))
        return targets if self.sampler is None else replace(targets, candidates=self.sampler.draw(targets.items))
