"""Ctrl-C takes effect between two steps, so that a checkpoint never holds half an optimiser step."""

from __future__ import annotations

import signal
import sys
import threading
from types import FrameType


class DeferredInterrupt:
    """Defers Ctrl-C and SIGTERM: `with DeferredInterrupt() as asked: ...; asked.check()`.

    `check` raises KeyboardInterrupt if a signal has arrived. A second Ctrl-C is raised at once. Outside the main
    thread, where Python cannot catch signals, nothing is deferred. say: confirm the first signal on stderr.
    """

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
        """Raise KeyboardInterrupt if a signal has arrived."""
        if self.requested:
            raise KeyboardInterrupt
