"""Random batches of like length, and batches cut by tokens."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

_POOL_BATCHES = 32
"""Batches that are sorted by length together: alike enough to waste little padding, mixed enough to stay random."""


def batches(lengths: np.ndarray, batch_size: int, seed: tuple[int, ...]) -> list[np.ndarray]:
    """Random batches of examples of like length, in random order. Int64[batch] indices each."""
    rng = np.random.default_rng(seed)
    order = rng.permutation(len(lengths))
    pool = batch_size * _POOL_BATCHES
    out: list[np.ndarray] = []
    for at in range(0, len(order), pool):
        chunk = order[at : at + pool]
        chunk = chunk[np.argsort(lengths[chunk], kind="stable")]
        out += [chunk[i : i + batch_size] for i in range(0, len(chunk), batch_size)]
    rng.shuffle(out)
    return out


def split_by_tokens(tokens: Sequence[int], limit: int) -> list[np.ndarray]:
    """Neighbouring examples in groups of at most `limit` tokens; an example longer than that stands alone."""
    groups: list[list[int]] = []
    total = 0
    for i, own in enumerate(tokens):
        if not groups or total + own > limit:
            groups.append([])
            total = 0
        groups[-1].append(i)
        total += own
    return [np.array(group) for group in groups]
