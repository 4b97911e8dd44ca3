"""The curves of one training, written while it runs: TENSORBOARD/ and training.jsonl in its folder.

  tensorboard/     scalars per step, for `tensorboard --logdir`; validation at the last step of its epoch
  training.jsonl   a line every few steps: step (from 1, over all phases), steps it stands for, phase, epoch; means over
                   those steps of the losses and gradient norms; examples and seconds; experts: users per query expert

A resumed training goes on behind its checkpoint: what was written of later steps is dropped, and they are done again.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from laserrec.util.io import disk_errors, write_text

LOG_FILE = "training.jsonl"
EVENTS_FOLDER = "tensorboard"
_EVERY = 10
"""Steps between two lines: writing one takes well under a millisecond."""


class Watch:
    """`start`, then `add` within each step and `step` at its end, `epoch` after each validation, `close`.

    Nothing is written before `start`, and nothing at all without a folder (a process that trains beside the first).
    """

    def __init__(self, folder: Path | None, every: int = _EVERY):
        self.folder, self.every = folder, every
        self._events: Any = None
        self._empty()

    def _empty(self) -> None:
        self._sums: dict[str, Tensor] = {}
        self._own: dict[str, Tensor] = {}
        self._facts: dict[str, Any] = {}
        self._steps = self._examples = 0
        self._since = self._until = time.monotonic()

    def start(self, done: int | None = None) -> None:
        """done: steps of the checkpoint that the training goes on from; None: it starts anew."""
        if self.folder is None:
            return
        self._file = self.folder / LOG_FILE
        with disk_errors(self._file):
            self.folder.mkdir(parents=True, exist_ok=True)
            kept = [] if done is None else [e for e in read_training(self.folder) if e["step"] <= done]
            write_text(self._file, "".join(json.dumps(e) + "\n" for e in kept))
            self._events = _event_writer(self.folder / EVENTS_FOLDER, 0 if done is None else done + 1)
        self._empty()

    def add(self, **numbers: Tensor) -> None:
        """Numbers of the present step, each a tensor: 0-dim, or one entry per query expert under the name `experts`.
        They stay on their device until a line is written, since reading one from a GPU waits for it."""
        self._own = numbers

    def step(self, step: int, examples: int, **facts: int | float | str | None) -> None:
        """The step is done: the `step`-th of the training, from 1. facts: taken as they are, such as epoch, lr."""
        self._steps, self._examples, self._until = self._steps + 1, self._examples + examples, time.monotonic()
        self._facts = {"step": step, **facts}
        self._sums = {name: self._sums.get(name, 0.0) + number for name, number in self._own.items()}
        self._own = {}
        if step % self.every == 0:
            self._write()

    def epoch(self, step: int, numbers: Mapping[str, Any]) -> None:
        """Validation after the `step`-th step; of `numbers` those named validation_* are written."""
        self._write()
        if self._events is not None:
            with disk_errors(self._file):
                for name, number in numbers.items():
                    if name.startswith("validation_") and name != "validation_users":
                        self._events.add_scalar(f"validation/{name.removeprefix('validation_')}", number, step)
        self._empty()  # the time of validating is no training time

    def flush(self) -> None:
        """Before a checkpoint is saved: everything up to its step is then on disk."""
        self._write()
        if self._events is not None:
            with disk_errors(self._file):
                self._events.flush()

    def close(self) -> None:
        """Also after an error; a step that is not done is left out."""
        try:
            self.flush()
            if self._events is not None:
                with disk_errors(self._file):
                    self._events.close()
        finally:
            self._events = None

    def _write(self) -> None:
        if self._steps and self._events is not None:
            seconds, users = self._until - self._since, self._sums.pop("experts", None)
            sums = torch.stack([x.double() for x in self._sums.values()]).tolist() if self._sums else []
            means = {name: total / self._steps for name, total in zip(self._sums, sums, strict=True)}
            self._users = [] if users is None else [round(n) for n in users.tolist()]
            line = {"steps": self._steps, **means, "examples": self._examples, "seconds": round(seconds, 4)}
            with disk_errors(self._file):
                self._write_line(line | ({"experts": self._users} if self._users else {}))
                self._write_events(means, self._examples / max(seconds, 1e-9))
        if self._steps:
            self._empty()

    def _write_line(self, numbers: dict[str, Any]) -> None:
        entry = {k: _finite(v) for k, v in (self._facts | numbers).items() if v is not None}
        with self._file.open("a", encoding="utf-8") as file:
            file.write(json.dumps(entry) + "\n")

    def _write_events(self, means: dict[str, float], rate: float) -> None:
        facts = {name: number for name, number in self._facts.items() if isinstance(number, int | float)}
        step = facts.pop("step")
        for name, number in {**means, **facts, "examples_per_second": rate}.items():
            self._events.add_scalar(f"train/{name}", number, step)
        for expert, users in enumerate(self._users, 1):
            self._events.add_scalar(f"experts/share_{expert}", users / max(1, sum(self._users)), step)


def read_training(folder: Path) -> list[dict[str, Any]]:
    """The lines of training.jsonl; none without the file. A line that a killed process left unfinished is dropped."""
    entries = []
    file = folder / LOG_FILE
    for line in file.read_text(encoding="utf-8").splitlines() if file.is_file() else ():
        try:
            entry = json.loads(line)
        except ValueError:
            continue
        if isinstance(entry, dict) and isinstance(entry.get("step"), int):
            entries.append(entry)
    return entries


def _finite(value: Any) -> Any:
    """JSON has neither NaN nor infinity; a training that went astray shows a gap."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _event_writer(folder: Path, purge_step: int) -> Any:
    from torch.utils.tensorboard import SummaryWriter

    # Readers take a folder's files by name, which begins with the second they were made in: two of one second would be
    # read in any order, and the purge with them.
    while (folder.is_dir() and any(f".tfevents.{int(time.time()):010d}." in f.name for f in folder.iterdir())):
        time.sleep(0.05)
    return SummaryWriter(str(folder), purge_step=purge_step)
