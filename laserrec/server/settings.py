"""Bounds of the server. What a single request may ask for is fixed and stands in the API's description; what the
machine can bear is set at the start."""

from __future__ import annotations

from dataclasses import dataclass

MAX_HISTORY = 1_000
MAX_K = 200
MAX_CANDIDATES = 10_000
MAX_NEW_ITEMS = 1_000
MAX_PAGE = 1_000
MAX_ID = 256
"""Characters of an item id."""
MAX_TEXT = 2_000
"""Characters of a title, brand or category."""


@dataclass(frozen=True)
class Limits:
    """Set at the start."""

    max_batch: int = 32
    """Requests that go through the model together."""
    max_wait: float = 0.002
    """Seconds that a request waits for others to share its batch."""
    max_queue: int = 256
    """Requests that may wait; one more is turned away."""
    timeout: float = 10.0
    """Seconds until an unanswered request is given up."""
    max_body: int = 1_048_576
    """Bytes of a request's body."""
    cache: int = 4_096
    """Answers kept for repeated requests; 0 keeps none."""
    max_changes: int = 8
    """Changes of the catalogue that may wait for one another."""
