"""Which users each query expert takes, and what is typical of them."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from laserrec.methods.laser.encoder import Encoder

_AT_ONCE = 512
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
    """One of the users whom the router is surest of."""

    user_id: str
    score: float
    """r_j of the paper, the router's mean probability for this expert."""
    titles: tuple[str, ...]
    """The last items, oldest first."""


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
    """All of them, and how even the load is."""

    experts: tuple[Expert, ...]
    users: int
    mean_history: float
    effective: float
    """exp(entropy of the shares): how many equally used experts would be as even."""


def router_scores(encoder: Encoder, histories: Sequence[np.ndarray]) -> Float[Tensor, "users experts"] | None:
    """The router's scores r_j (Eq. 7); None for a model without a router. The LLM is not asked."""
    mformer = encoder.laser.mformer
    if mformer is None or mformer.router is None:
        return None
    parts = []
    with torch.no_grad():
        for at in range(0, len(histories), _AT_ONCE):
            parts.append(mformer.router(*encoder.states(histories[at : at + _AT_ONCE])).scores)
    return torch.cat(parts)


def profile(scores: Float[Tensor, "users experts"], user_ids: Sequence[str], histories: Sequence[np.ndarray],
            titles: Sequence[str], categories: Sequence[str | None], brands: Sequence[str | None]) -> Experts:
    """titles, categories, brands: by item row (dense item - 1)."""
    chosen = scores.argmax(dim=1).numpy()
    lengths = np.array([len(h) for h in histories])
    # A trait counts once a user, so that one who buys much of a kind does not make it typical.
    traits = {kind: [{names[i - 1] for i in h.tolist() if names[i - 1]} for h in histories]
              for kind, names in (("category", categories), ("brand", brands))}
    everyone = {kind: Counter(t for own in of for t in own) for kind, of in traits.items()}
    experts = []
    for j in range(scores.shape[1]):
        rows = np.flatnonzero(chosen == j)
        own = {kind: _typical([of[r] for r in rows], everyone[kind], len(histories)) for kind, of in traits.items()}
        examples = [ExampleUser(user_ids[r], float(scores[r, j]), tuple(titles[i - 1] for i in histories[r][-3:]))
                    for r in _surest(scores[:, j].numpy(), rows)]
        mean = float(lengths[rows].mean()) if len(rows) else 0.0
        experts.append(Expert(j + 1, len(rows), len(rows) / len(histories), mean, own["category"][:4], own["brand"][:3],
                              tuple(examples)))
    entropy = -sum(e.share * math.log(e.share) for e in experts if e.share)
    return Experts(tuple(experts), len(histories), float(lengths.mean()), math.exp(entropy))


def _surest(scores: np.ndarray, rows: np.ndarray, count: int = 3) -> list[int]:
    return rows[np.argsort(-scores[rows], kind="stable")[:count]].tolist()


def _typical(own: Sequence[set[str]], everyone: Counter, users: int) -> tuple[Trait, ...]:
    """Traits above the average, by their part in the divergence from it (share x log lift): neither the rarest, whose
    lift is highest by chance, nor those that all have."""
    counts = Counter(t for traits in own for t in traits)
    least = max(_LEAST_USERS, _LEAST_SHARE * len(own))
    found = []
    for name, count in counts.items():
        share, average = count / len(own), everyone[name] / users
        if count >= least and share > average:
            found.append(Trait(name, share, average, share / average, count))
    return tuple(sorted(found, key=lambda t: (-t.share * math.log(t.lift), t.name)))
