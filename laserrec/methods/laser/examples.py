"""What an epoch of Laser's training is made of: targets, each with the history before it."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Int
from torch import Tensor

from laserrec.config import Cuts
from laserrec.data.histories import Histories, Prefixes
from laserrec.methods.sampled_softmax import Candidates, Sampler


@dataclass(frozen=True)
class Batch:
    """Predict each target from its history, both of one user's training sequence."""

    histories: Histories
    targets: Int[Tensor, "targets"]
    hide: Bool[Tensor, "targets"]
    """Whose ID states are hidden (mformer.state_dropout)."""
    candidates: Candidates | None = None
    """Items that the targets are told from; None: all."""
    of: Int[Tensor, "targets"] | None = None
    """The example of each target; None: each is an example of its own."""

    def rows_of(self, examples: Int[np.ndarray, "some"]) -> Int[Tensor, "few"]:
        """The targets of some examples."""
        rows = torch.as_tensor(examples)
        return rows if self.of is None else torch.isin(self.of, rows).nonzero()[:, 0]


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


@dataclass(frozen=True)
class WindowExamples:
    """One epoch's examples as whole sequences, in each of which every item but the first is a target."""

    windows: Histories
    state_dropout: float
    sampler: Sampler | None = None

    @property
    def lengths(self) -> Int[np.ndarray, "examples"]:
        """Items that are read of each."""
        return (self.windows.lengths - 1).numpy()

    def batch(self, index: Int[np.ndarray, "batch"]) -> Batch:
        """As `LaserExamples.batch`."""
        whole = self.windows.take(index)
        histories, targets = Prefixes.all_of(whole), whole.items[whole.ages < whole.lengths[whole.users] - 1]
        hide = torch.rand(len(targets)) < self.state_dropout
        return Batch(histories, targets, hide, None if self.sampler is None else self.sampler.draw(targets),
                     histories.whole_of)


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


def epoch_windows(sequences: Histories, length: int, seed: tuple[int, ...], limit: int | None = None) -> Histories:
    """The sequences, long ones cut into windows of at most `length` items at places that are drawn anew; as many of
    these windows, drawn at random, as have `limit` targets."""
    rng = np.random.default_rng(seed)
    shift = torch.from_numpy(rng.integers(0, max(1, length - 1), len(sequences)))
    windows = sequences.windows(length, shift)
    rows = (windows.lengths > 1).nonzero()[:, 0]
    targets = windows.lengths[rows] - 1
    if limit is None or int(targets.sum()) <= limit:
        return windows.take(rows)
    order = torch.from_numpy(rng.permutation(len(rows)))
    kept = order[targets[order].cumsum(0) <= limit].sort().values
    return windows.take(rows[kept])
