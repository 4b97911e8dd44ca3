"""Bounds of the HTTP interface. Those of one request are fixed and stand in the API's description."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from laserrec.util.errors import UserError

MAX_HISTORY = 1_000
MAX_K = 200
MAX_CANDIDATES = 10_000
MAX_EXCLUDE = 1_000
MAX_NEW_ITEMS = 1_000
MAX_PAGE = 1_000
MAX_ID = 256
"""Characters of a new item's id. The catalogue itself may hold longer ones, which are served and can be removed."""
MAX_TEXT = 2_000
"""Characters of a new item's title, brand or category."""
MAX_COLUMNS = 64
"""Further columns of a new item."""
MAX_VECTOR = 8_192
"""Numbers of a new item's vector."""
MAX_PATH = 4_096
"""Characters of a folder's name."""
MAX_MESSAGE = 500
"""Characters of an error's text, which may quote what a caller sent."""

_BOUNDS = {"max_batch": (1, 4_096), "max_wait_seconds": (0, 60), "max_queue": (1, 1_000_000),
           "queue_seconds": (0.001, 3_600), "timeout_seconds": (0.001, 3_600), "read_seconds": (0.001, 3_600),
           "max_body": (1, 2**30), "cache": (0, 10_000_000), "max_changes": (1, 10_000)}


@dataclass(frozen=True)
class Limits:
    """Set at the start. Raises UserError for a value with which no server could work."""

    max_batch: int = 32
    """Requests that go through the model together."""
    max_wait_seconds: float = 0.002
    """How long a request waits for others to share its batch."""
    max_queue: int = 1_024
    """Requests that may wait at all, whatever time that takes."""
    queue_seconds: float = 0.4
    """A request is turned away if it would take longer than this, by the time that recent ones took."""
    timeout_seconds: float = 10.0
    """An unanswered request is given up after this time."""
    read_seconds: float = 10.0
    """A connection is closed if a whole request takes longer than this to arrive."""
    max_body: int = 1_048_576
    """Bytes of a request's body."""
    cache: int = 4_096
    """Answers kept for repeated requests; 0 keeps none."""
    max_changes: int = 8
    """Changes of the catalogue that may be unfinished at once."""

    def __post_init__(self) -> None:
        for name, (least, most) in _BOUNDS.items():
            check_range(name, getattr(self, name), least, most)


def check_range(name: str, value: float, least: float, most: float) -> None:
    """Raises UserError unless least <= value <= most (so for NaN, too)."""
    if not least <= value <= most:
        raise UserError(f"{name.replace('_', '-')} is {value}; it must be between {least:,} and {most:,}")


def check_hosts(names: Sequence[str]) -> None:
    """Raises UserError for what can't be a Host header without its port, nor a pattern of some."""
    for name in names:
        if not re.fullmatch(r"\*|(\*\.)?[A-Za-z0-9._-]+|\[[0-9A-Fa-f:.]+\]", name):
            raise UserError(f"allowed host {name!r} is none; give a name without scheme and port, as "
                            "recommend.example.org, *.example.org or [::1]; or * for all")
