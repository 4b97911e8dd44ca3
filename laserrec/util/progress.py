"""Progress on stderr: a bar in a terminal, a line every 30 seconds elsewhere, nothing if switched off."""

from __future__ import annotations

import sys
import time
from typing import ClassVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as RichProgress

_LINE_SECONDS = 30.0
"""Seconds between two lines where there is no terminal; of all bars together, since an epoch may take less."""


class Progress:
    """A progress bar: `with Progress("validating", 8442) as bar: bar.advance(64, loss=1.5)`."""

    _next_line: ClassVar[float] = time.monotonic() + _LINE_SECONDS

    def __init__(self, title: str, total: int, show: bool = True, done: int = 0):
        self.title, self.total, self.done, self.show = title, total, done, show
        self._live: RichProgress | None = None

    def __enter__(self) -> Progress:
        if self.show and sys.stderr.isatty():
            columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(),
                       TimeRemainingColumn(), TextColumn("{task.fields[note]}"))
            self._live = RichProgress(*columns, console=Console(stderr=True), transient=True)
            self._task = self._live.add_task(self.title, total=self.total, completed=self.done, note="")
            self._live.start()
        return self

    def __exit__(self, *exc: object) -> None:
        if self._live is not None:
            self._live.stop()

    def advance(self, steps: int = 1, **numbers: float) -> None:
        """Count `steps` more as done; the keyword numbers are shown beside the bar."""
        self.done += steps
        note = "  ".join(f"{name} {value:.4f}" for name, value in numbers.items())
        if self._live is not None:
            self._live.update(self._task, completed=self.done, note=note)
        elif self.show and time.monotonic() >= Progress._next_line:
            Progress._next_line = time.monotonic() + _LINE_SECONDS
            print(f"{self.title}: {self.done}/{self.total}  {note}".rstrip(), file=sys.stderr, flush=True)
