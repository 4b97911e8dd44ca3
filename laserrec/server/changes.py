"""Changes of the catalogue under way and lately finished, so that a caller can ask what became of one."""

from __future__ import annotations

import hashlib
import json
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
        return "failed" if self.future.exception() else "done"


class Changes:
    """Belongs to the thread that serves HTTP. Parameters: `most`: changes that may be unfinished at once."""

    def __init__(self, most: int):
        self._most = most
        self._known: OrderedDict[str, Change] = OrderedDict()

    def get(self, change_id: str) -> Change | None:
        """None for one that is unknown or was forgotten."""
        return self._known.get(change_id)

    def begin(self, asked: Any, total: int, start: Callable[[Change], Future[int]]) -> Change:
        """Start a change, or find it: the same request again, while it is unfinished, is the same change. `asked` is
        what the caller wants, as JSON. Raises OverloadedError if too many are unfinished, and what `start` raises."""
        change_id = hashlib.sha256(json.dumps(asked, sort_keys=True).encode()).hexdigest()[:24]
        known = self._known.get(change_id)
        if known is not None and not known.future.done():
            return known
        unfinished = sum(not change.future.done() for change in self._known.values())
        if unfinished >= self._most:
            raise OverloadedError(5)
        change = Change(change_id, total)
        change.future = start(change)
        self._known.pop(change_id, None)
        self._known[change_id] = change
        while len(self._known) - unfinished > _KEPT:
            oldest = next(name for name, old in self._known.items() if old.future.done())
            del self._known[oldest]
        return change
