"""What an epoch of Laser's training is made of: targets, each with the history before it."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Int
from torch import Tensor

from laserrec.config import Cuts
from laserrec.data.histories import Histories
from laserrec.methods.sampled_softmax import Sampler
from laserrec.methods.targets import Candidates


@dataclass(frozen=True)
class Batch:
    """Predict each target from its history, both of one user's training sequence."""

    histories: Histories
    targets: Int[Tensor, "batch"]
    hide: Bool[Tensor, "batch"]
    """Whose ID states are hidden (mformer.state_dropout)."""
    candidates: Candidates | None = None
    """Items that the targets are told from; None: all."""


@dataclass(frozen=True)
class LaserExamples:
    """One epoch's examples, as places in the training sequences."""

    sequences: Histories
    of: Int[Tensor, "examples"]
    """The sequence of each."""
    cut: Int[Tensor, "examples"]
    """Its target's place there; the history is everything before."""
    lengths: Int[np.ndarray, "examples"]
    """Tokens that the LLM reads."""
    state_dropout: float
    sampler: Sampler | None = None

    def batch(self, index: Int[np.ndarray, "batch"]) -> Batch:
        """Histories on the CPU; what is drawn here is the same in all processes."""
        histories, targets = cut_histories(self.sequences, self.of[index], self.cut[index])
        hide = torch.rand(len(index)) < self.state_dropout
        return Batch(histories, targets, hide, None if self.sampler is None else self.sampler.draw(targets))


def cut_histories(sequences: Histories, of: Int[Tensor, "some"], cut: Int[Tensor, "some"]
                  ) -> tuple[Histories, Int[Tensor, "some"]]:
    """What stands in sequence of[i] before place cut[i], and the item there."""
    whole = sequences.take(of)
    histories = whole.where(torch.arange(len(whole.items)) - whole.starts[whole.users] < cut[whole.users])
    return histories, whole.items[whole.starts + cut]


def epoch_examples(sequences: Histories, cuts: Cuts, seed: tuple[int, ...], limit: int | None = None,
                   items: int | None = None, window: int = 1
                   ) -> tuple[Int[Tensor, "examples"], Int[Tensor, "examples"]]:
    """Sequences and places of this epoch's targets: every place that has a history (all), or one random such place per
    sequence; of these at most `limit`, and as many as have about `items` items in the newest `window` of each history,
    drawn at random."""
    of, cut = _targets(sequences, cuts, seed)
    if items is not None and len(cut):
        most = max(1, int(items / float(cut.clamp(max=window).double().mean())))
        limit = most if limit is None else min(limit, most)
    if limit is None or len(of) <= limit:
        return of, cut
    some = torch.from_numpy(np.random.default_rng((*seed, 1)).choice(len(of), limit, replace=False)).sort().values
    return of[some], cut[some]


def _targets(sequences: Histories, cuts: Cuts, seed: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    long = (sequences.lengths > 1).nonzero()[:, 0]
    lengths = sequences.lengths[long]
    if cuts == Cuts.RANDOM:
        draws = torch.from_numpy(np.random.default_rng(seed).random(len(long)))
        return long, 1 + (draws * (lengths - 1)).long()
    of = torch.repeat_interleave(long, lengths - 1)
    first = torch.repeat_interleave((lengths - 1).cumsum(0) - (lengths - 1), lengths - 1)
    return of, torch.arange(len(of)) - first + 1
