"""Ctrl-C between two steps, not inside one: a checkpoint must never hold half an optimiser step."""

from __future__ import annotations

import signal
import sys
import threading
from types import FrameType


class DeferredInterrupt:
    """`with DeferredInterrupt() as asked: ...; asked.check()` raises KeyboardInterrupt at `check` if Ctrl-C came since.
    A second Ctrl-C is raised at once. Outside the main thread, where signals can't be caught, it does nothing."""

    def __init__(self) -> None:
        self.requested = False

    def __enter__(self) -> DeferredInterrupt:
        self._main = threading.current_thread() is threading.main_thread()
        if self._main:
            self._before = signal.signal(signal.SIGINT, self._handle)
        return self

    def __exit__(self, *exc: object) -> None:
        if self._main:
            signal.signal(signal.SIGINT, self._before)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.requested:
            raise KeyboardInterrupt
        self.requested = True
        print("\nfinishing this step, then saving (Ctrl-C again: stop at once)", file=sys.stderr)

    def check(self) -> None:
        if self.requested:
            raise KeyboardInterrupt
