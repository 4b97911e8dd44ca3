"""Items as points in the plane: near each other where their embeddings are."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from laserrec.report.categories import groups
from laserrec.util.errors import UserError

MOST = 5000
"""Points on the page; of a larger catalogue a random part is drawn, so that the page stays small."""
_TITLE = 120
"""Characters of a title; longer ones are cut."""
_COLOURS = 8
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


def draw(embeddings: Float[Tensor, "n_items d_out"], titles: Sequence[str], categories: Sequence[str | None],
         brands: Sequence[str | None], method: str | None = None) -> ItemMap:
    """method: tsne, pca, or None for tsne where scikit-learn is there. The same input gives the same map.
    Raises UserError for tsne without scikit-learn."""
    n = len(embeddings)
    rows = np.arange(n) if n <= MOST else np.sort(np.random.default_rng(0).choice(n, MOST, replace=False))
    unit = torch.nn.functional.normalize(embeddings[rows], dim=-1).float().numpy()
    if method is None:
        method = "tsne" if _has_tsne() and len(rows) >= 10 else "pca"
    points = _tsne(unit) if method == "tsne" else pca(unit)
    kind = "category" if any(categories) else "brand"
    names = groups(categories) if kind == "category" else list(brands)
    group, found = _most_frequent([names[r] for r in rows])
    cut = tuple(t if len(t) <= _TITLE else t[: _TITLE - 1] + "…" for t in (titles[r] for r in rows))
    return ItemMap(method, points[:, 0], points[:, 1], cut, group, found, kind, n)


def _most_frequent(names: Sequence[str | None]) -> tuple[np.ndarray, tuple[str, ...]]:
    counts = Counter(n for n in names if n)
    top = [name for name, _ in sorted(counts.items(), key=lambda c: (-c[1], c[0]))[:_COLOURS]]
    found = top + [OTHER] * (len(counts) > len(top)) + [UNKNOWN] * (None in names)
    place = {name: g for g, name in enumerate(found)}
    return np.array([place[UNKNOWN if n is None else n if n in top else OTHER] for n in names], dtype=np.int64), tuple(
        found)


def pca(points: np.ndarray) -> np.ndarray:
    """The two directions of most variance; a direction's sign is such that its largest part is positive."""
    centred = points - points.mean(axis=0)
    _, _, directions = np.linalg.svd(centred, full_matrices=False)
    first = np.zeros((2, points.shape[1]), dtype=points.dtype)
    first[: len(directions[:2])] = directions[:2]
    first *= np.sign(first[np.arange(2), np.abs(first).argmax(axis=1)])[:, None]
    return centred @ first.T


def _has_tsne() -> bool:
    from importlib.util import find_spec

    return find_spec("sklearn") is not None


def _tsne(points: np.ndarray) -> np.ndarray:
    """t-SNE (van der Maaten & Hinton 2008; Barnes-Hut) of unit vectors, started from the PCA."""
    try:
        from sklearn.manifold import TSNE
        from threadpoolctl import threadpool_limits
    except ImportError:
        raise UserError("a t-SNE map needs scikit-learn: pip install 'laserrec[report]', or take --map pca") from None
    if len(points) < 10:
        raise UserError(f"{len(points)} items are too few for a t-SNE map; take --map pca")
    start = pca(points)
    start = 1e-4 * start / max(float(start[:, 0].std()), 1e-12)
    with threadpool_limits(1):  # sums in another order would move the points
        return TSNE(n_components=2, perplexity=min(30.0, (len(points) - 1) / 3), init=start.astype(np.float32),
                    random_state=0).fit_transform(points)
