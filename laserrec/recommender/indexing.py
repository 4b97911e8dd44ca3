"""An index of a fitted model's items, measured with the vectors of random users."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float

from laserrec.recommender.recommender import LaserRecommender
from laserrec.retrieval import build
from laserrec.retrieval.index import Index, IndexKind
from laserrec.retrieval.indexed import live_rows

_HISTORY = 5
"""Items of a random history."""


def build_index(model: LaserRecommender, kind: IndexKind, folder: Path | str, url: str | None = None,
                queries: int = 200, k: int = 10, collection: str | None = None) -> dict[str, Any]:
    """Build an index of all items that can be recommended, save it into `folder`, and measure it with `queries` random
    histories. Returns and raises as `laserrec.retrieval.build.build_index`."""
    live = live_rows(len(model.embeddings), model.removed)
    return build.build_index(model.embeddings, live, kind, folder, user_queries(model, queries), k,
                             **_place(url, collection))


def fill_index(model: LaserRecommender, kind: IndexKind, url: str | None = None, collection: str | None = None
               ) -> Index:
    """The same index, not saved: for `LaserRecommender.use_index`."""
    live = live_rows(len(model.embeddings), model.removed)
    return build.fill_index(model.embeddings, live, kind, **_place(url, collection))


def user_queries(model: LaserRecommender, count: int, seed: int = 0) -> Float[np.ndarray, "count d"]:
    """Vectors of users with random histories: users lie elsewhere than items do, and recall differs."""
    rng, live = np.random.default_rng(seed), live_rows(len(model.embeddings), model.removed).numpy()
    names = [model.item_ids(rng.choice(live, min(_HISTORY, len(live)))) for _ in range(count)]
    return model.encode_users(names)


def _place(url: str | None, collection: str | None) -> dict[str, str]:
    return {name: value for name, value in (("url", url), ("collection", collection)) if value is not None}
