"""Items as points in the plane: near each other where their embeddings are."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

from laserrec.report.categories import groups
from laserrec.util.errors import UserError

MOST = 5000
"""Points on the page; of a larger catalogue a random part is drawn, so that the page stays small."""
_TITLE = 120
"""Characters of a title; longer ones are cut."""
_COLOURS = 8
_FEWEST = 10
"""Fewer items than this have no t-SNE."""
OTHER, UNKNOWN = "other", "unknown"


@dataclass(frozen=True)
class ItemMap:
    """`groups[g]` names point i's group, g = `group[i]`; most items first, then other and unknown."""

    method: str
    """tsne or pca."""
    x: np.ndarray
    y: np.ndarray
    titles: tuple[str, ...]
    group: np.ndarray
    groups: tuple[str, ...]
    kind: str
    """What the groups are: category or brand."""
    n_items: int

    def counts(self) -> dict[str, int]:
        """Points by group."""
        return {name: int((self.group == g).sum()) for g, name in enumerate(self.groups)}


def draw(embeddings: Float[np.ndarray, "n_items d_out"], titles: Sequence[str], categories: Sequence[str | None],
         brands: Sequence[str | None], method: str | None = None) -> ItemMap:
    """method: tsne, pca, or None for tsne unless there are too few items. The same input gives the same map.
    Raises UserError for t-SNE of too few items."""
    n = len(embeddings)
    rows = np.arange(n) if n <= MOST else np.sort(np.random.default_rng(0).choice(n, MOST, replace=False))
    if method is None:
        method = "tsne" if len(rows) >= _FEWEST else "pca"
    if method == "tsne" and len(rows) < _FEWEST:
        raise UserError(f"{len(rows)} items are too few for a t-SNE map; choose pca")
    length = np.linalg.norm(embeddings[rows], axis=1, keepdims=True)
    points = (_tsne if method == "tsne" else _pca)(embeddings[rows] / np.maximum(length, 1e-12))
    kind = "category" if any(categories) else "brand"
    names = groups(categories) if kind == "category" else list(brands)
    group, found = _most_frequent([names[r] for r in rows])
    cut = tuple(t if len(t) <= _TITLE else t[: _TITLE - 1] + "…" for t in (titles[r] for r in rows))
    return ItemMap(method, points[:, 0], points[:, 1], cut, group, found, kind, n)


def _most_frequent(names: Sequence[str | None]) -> tuple[np.ndarray, tuple[str, ...]]:
    counts = Counter(n for n in names if n)
    top = [name for name, _ in sorted(counts.items(), key=lambda c: (-c[1], c[0]))[:_COLOURS]]
    found = (*top, *[OTHER] * (len(counts) > len(top)), *[UNKNOWN] * (None in names))
    place = {name: g for g, name in enumerate(found)}
    return np.array([place[UNKNOWN if n is None else n if n in top else OTHER] for n in names], dtype=np.int64), found


def _pca(points: np.ndarray) -> np.ndarray:
    """The two directions of most variance; fewer points or dimensions than two leave zeros."""
    from sklearn.decomposition import PCA

    kept = min(2, *points.shape)
    flat = PCA(kept, svd_solver="full").fit_transform(points) if len(points) > 1 else np.zeros((len(points), kept))
    return np.pad(flat, ((0, 0), (0, 2 - kept)))


def _tsne(points: np.ndarray) -> np.ndarray:
    """t-SNE (van der Maaten & Hinton 2008; Barnes-Hut) of unit vectors, started from their PCA."""
    from sklearn.manifold import TSNE
    from threadpoolctl import threadpool_limits

    start = _pca(points)
    start = 1e-4 * start / max(float(start[:, 0].std()), 1e-12)
    with threadpool_limits(1):  # sums in another order would move the points
        return TSNE(n_components=2, perplexity=min(30.0, (len(points) - 1) / 3), init=start.astype(np.float32),
                    random_state=0).fit_transform(points)
