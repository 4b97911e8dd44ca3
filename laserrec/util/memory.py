"""Bounds on how much of a users x items score matrix is held at once, so that memory does not grow with the items."""

import math
from pathlib import Path

LIMIT_BYTES = 256 * 2**20
"""Limit for the scores held at once, including the copies that a softmax or a ranking makes."""
_COPIES = 4
_CONTROL_GROUP = Path("/sys/fs/cgroup")


def columns_at_once(rows: int, n_items: int, width: int, limit: int = LIMIT_BYTES) -> int:
    """Number of items (at least 1) whose float32 scores for `rows` users, and embeddings, fit into `limit` bytes."""
    return max(1, min(n_items, limit // (4 * (_COPIES * max(1, rows) + 2 * width))))


def rows_at_once(n_items: int, wanted: int, limit: int = LIMIT_BYTES) -> int:
    """Number of users (1 to `wanted`) whose float32 scores of all items fit into `limit` bytes."""
    return max(1, min(wanted, limit // (4 * _COPIES * max(1, n_items))))


def available_bytes() -> int:
    """Memory that this machine, or the container on it, could give to a process now, without swapping."""
    import psutil

    return int(min(psutil.virtual_memory().available, _left_in_container()))


def _left_in_container() -> float:
    """By the limit of the control group, of which the machine's numbers don't tell; the file cache counts as free."""
    try:
        limit = int((_CONTROL_GROUP / "memory.max").read_text())
        used = int((_CONTROL_GROUP / "memory.current").read_text())
        stat = dict(line.split() for line in (_CONTROL_GROUP / "memory.stat").read_text().splitlines())
    except (OSError, ValueError):  # none, or "max"
        return math.inf
    return max(0, limit - used + int(stat.get("inactive_file", 0)))
