"""Which users each query expert takes, and what is typical of them."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

_LEAST_USERS, _LEAST_SHARE = 5, 0.01
"""A trait is typical only if so many of the expert's users have it."""


@dataclass(frozen=True)
class Trait:
    """A category or brand: share of the expert's users who have an item of it, the same of all users, their ratio."""

    name: str
    share: float
    average: float
    lift: float
    users: int


@dataclass(frozen=True)
class ExampleUser:
    """One of the users whom the router is surest of: score is r_j (Eq. 7), titles the last items, oldest first."""

    user_id: str
    score: float
    titles: tuple[str, ...]


@dataclass(frozen=True)
class Expert:
    """`number` from 1. Means over its users; nothing typical and no examples where it has none."""

    number: int
    users: int
    share: float
    mean_history: float
    categories: tuple[Trait, ...]
    brands: tuple[Trait, ...]
    examples: tuple[ExampleUser, ...]


@dataclass(frozen=True)
class Experts:
    """All of them. effective: exp(entropy of the shares), how many equally used experts would be as even."""

    experts: tuple[Expert, ...]
    users: int
    mean_history: float
    effective: float


def profile(scores: Float[np.ndarray, "users experts"], user_ids: Sequence[str], histories: Sequence[Sequence[int]],
            titles: Sequence[str], categories: Sequence[str | None], brands: Sequence[str | None]) -> Experts:
    """histories: places in titles, categories and brands, oldest first."""
    chosen, lengths = scores.argmax(axis=1), np.array([len(h) for h in histories])
    # A trait counts once a user, so that one who buys much of a kind does not make it typical.
    kinds = [[{names[i] for i in h if names[i]} for h in histories] for names in (categories, brands)]
    everyone = [Counter(t for own in of for t in own) for of in kinds]
    experts = []
    for j in range(scores.shape[1]):
        rows = np.flatnonzero(chosen == j)
        typical = [_typical([of[r] for r in rows], all_of, len(histories))
                   for of, all_of in zip(kinds, everyone, strict=True)]
        surest = rows[np.argsort(-scores[rows, j], kind="stable")[:3]].tolist()
        examples = [ExampleUser(user_ids[r], float(scores[r, j]), tuple(titles[i] for i in histories[r][-3:]))
                    for r in surest]
        mean = float(lengths[rows].mean()) if len(rows) else 0.0
        experts.append(Expert(j + 1, len(rows), len(rows) / len(histories), mean, typical[0][:4], typical[1][:3],
                              tuple(examples)))
    entropy = -sum(e.share * math.log(e.share) for e in experts if e.share)
    return Experts(tuple(experts), len(histories), float(lengths.mean()), math.exp(entropy))


def _typical(own: Sequence[set[str]], everyone: Counter, users: int) -> tuple[Trait, ...]:
    """Traits above the average, by share x log lift: neither the rarest, whose lift is highest by chance, nor those
    that all have."""
    counts = Counter(t for traits in own for t in traits)
    least = max(_LEAST_USERS, _LEAST_SHARE * len(own))
    found = [Trait(name, n / len(own), everyone[name] / users, n / len(own) / (everyone[name] / users), n)
             for name, n in counts.items() if n >= least]
    return tuple(sorted((t for t in found if t.share > t.average), key=lambda t: (-t.share * math.log(t.lift), t.name)))
