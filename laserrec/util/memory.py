"""How much of a users x items matrix is held at once: a million items need no more memory than a few thousand."""

LIMIT_BYTES = 256 * 2**20
"""Bound on the scores that are held at once, with the copies that a softmax or a ranking makes of them."""
_COPIES = 4


def columns_at_once(rows: int, n_items: int, width: int, limit: int = LIMIT_BYTES) -> int:
    """Items whose float32 scores for so many users, and whose unit embeddings, fit into `limit` bytes; at least 1."""
    return max(1, min(n_items, limit // (4 * (_COPIES * max(1, rows) + 2 * width))))


def rows_at_once(n_items: int, wanted: int, limit: int = LIMIT_BYTES) -> int:
    """Users whose float32 scores of all items fit into `limit` bytes; at least 1, at most `wanted`."""
    return max(1, min(wanted, limit // (4 * _COPIES * max(1, n_items))))


def available_bytes() -> int:
    """Memory that this machine could give to a process now, without swapping."""
    import psutil

    return int(psutil.virtual_memory().available)
