"""Changes of the catalogue under way and lately finished, so that a caller can ask what became of one."""

from __future__ import annotations

import hashlib
import json
import threading
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any, Literal

from laserrec.server.worker import OverloadedError

_KEPT = 1_000
"""Finished changes that are remembered."""


@dataclass
class Change:
    """One POST or DELETE of items, or another model."""

    id: str
    total: int
    """Items asked to be changed."""
    done: int = 0
    """Items changed so far; they are not on disk before the change is finished."""
    future: Future[int] = field(default_factory=Future)
    """Items that were changed, when all of it is on disk; else the error, after which none of it counts."""

    @property
    def state(self) -> Literal["running", "done", "failed"]:
        if not self.future.done():
            return "running"
        return "done" if self.future.exception() is None else "failed"

    @property
    def detail(self) -> str | None:
        """Why it failed."""
        return str(self.future.exception()) if self.state == "failed" else None


@dataclass(frozen=True)
class Finished:
    """What is remembered of a Change. Not its error, whose traceback holds the model and the request."""

    id: str
    total: int
    done: int
    state: Literal["running", "done", "failed"]
    detail: str | None


class Changes:
    """Thread-safe. Parameters: `most`: changes that may be unfinished at once."""

    def __init__(self, most: int):
        self._most = most
        self._unfinished: dict[str, Change] = {}
        self._finished: OrderedDict[str, Finished] = OrderedDict()
        self._lock = threading.RLock()  # a signal may come in the middle, and begin another change

    def get(self, change_id: str) -> Change | Finished | None:
        """None for one that is unknown or was forgotten."""
        with self._lock:
            return self._unfinished.get(change_id) or self._finished.get(change_id)

    def begin(self, asked: Any, total: int, start: Callable[[Change], Future[int]]) -> Change:
        """Start a change, or find it: the same request again, while it is unfinished, is the same change. `asked` is
        what the caller wants, as JSON. Raises OverloadedError if too many are unfinished, and what `start` raises."""
        change_id = hashlib.sha256(json.dumps(asked, sort_keys=True).encode()).hexdigest()[:24]
        with self._lock:
            if (known := self._unfinished.get(change_id)) is not None:
                return known
            if len(self._unfinished) >= self._most:
                raise OverloadedError(5)
            change = Change(change_id, total)
            change.future = start(change)
            self._unfinished[change_id] = change
        change.future.add_done_callback(lambda _: self._end(change))
        return change

    def _end(self, change: Change) -> None:
        with self._lock:
            del self._unfinished[change.id]
            self._finished.pop(change.id, None)
            self._finished[change.id] = Finished(change.id, change.total, change.done, change.state, change.detail)
            if len(self._finished) > _KEPT:
                self._finished.popitem(last=False)
