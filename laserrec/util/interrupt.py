"""Ctrl-C between two steps, not inside one: a checkpoint must never hold half an optimiser step."""

from __future__ import annotations

import signal
import sys
import threading
from types import FrameType


class DeferredInterrupt:
    """`with DeferredInterrupt() as asked: ...; asked.check()` raises KeyboardInterrupt at `check` if Ctrl-C, or the
    SIGTERM of a scheduler, came since. A second Ctrl-C is raised at once. Outside the main thread, where signals can't
    be caught, it does nothing. say: tell on stderr that the signal was heard."""

    def __init__(self, say: bool = True) -> None:
        self.requested, self.say = False, say

    def __enter__(self) -> DeferredInterrupt:
        self._main = threading.current_thread() is threading.main_thread()
        if self._main:
            self._before = {number: signal.signal(number, self._handle) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *exc: object) -> None:
        if self._main:
            for number, handler in self._before.items():
                signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.requested:
            if number == signal.SIGTERM:  # a scheduler and a launcher may both send it
                return
            raise KeyboardInterrupt
        self.requested = True
        if self.say:
            print("\nfinishing this step, then saving (Ctrl-C again: stop at once)", file=sys.stderr)

    def check(self) -> None:
        if self.requested:
            raise KeyboardInterrupt
