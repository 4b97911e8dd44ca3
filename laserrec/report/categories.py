"""Short names and few groups from categories that are paths joined by spaces (`Tools Hand Tools Hammers`)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

_NEARLY_ALL = 0.9


def short_names(categories: Sequence[str | None]) -> list[str | None]:
    """Without the words that nearly all of them begin with."""
    paths = [tuple(c.split()) if c else () for c in categories]
    common = _common(paths)
    return [" ".join(p[len(common) :] if p[: len(common)] == common and len(p) > len(common) else p) or None
            for p in paths]


def groups(categories: Sequence[str | None]) -> list[str | None]:
    """The department of each: its first words, up to where the paths under them part. A single word that always goes on
    (`Professional Dental ...`, `Professional Medical ...`) is no department yet; it is followed to the next parting."""
    paths = [tuple(name.split()) if name else () for name in short_names(categories)]
    ends = Counter(paths)
    going = Counter(p[:n] for p in paths for n in range(1, len(p) + 1))
    branches: dict[tuple[str, ...], Counter] = {}
    for prefix, count in going.items():
        branches.setdefault(prefix[:-1], Counter())[prefix[-1]] = count
    return [" ".join(_department(p, ends, going, branches)) or None for p in paths]


def _department(path: tuple[str, ...], ends: Counter, going: Counter, branches: dict) -> tuple[str, ...]:
    at, partings = path[:1], 0
    while len(at) < len(path):
        forced = max(branches[at].values()) == going[at]
        if not forced:
            partings += 1
            if len(at) > 1 or ends[at] or partings > 1:
                break
        at = path[: len(at) + 1]
    return at


def _common(paths: Sequence[tuple[str, ...]]) -> tuple[str, ...]:
    """The words that nearly all non-empty paths begin with, and go on behind."""
    some = [p for p in paths if p]
    common: tuple[str, ...] = ()
    while going := Counter(p[: len(common) + 1] for p in some if len(p) > len(common) + 1):
        word, count = going.most_common(1)[0]
        if count < _NEARLY_ALL * len(some):
            break
        common = word
    return common
