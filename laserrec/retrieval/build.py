"""An index of a model's items, and how well it finds what exact search finds."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float

from laserrec.recommender.recommender import LaserRecommender
from laserrec.retrieval.index import ExactIndex, Index, IndexKind, make_index, recall_against_exact
from laserrec.retrieval.indexed import live_items, note_catalogue
from laserrec.util.errors import UserError

_HISTORY = 5
"""Items of the random histories whose embeddings are the queries of the recall."""


def user_queries(model: LaserRecommender, count: int, seed: int = 0) -> Float[np.ndarray, "count d_out"]:
    """Unit-length embeddings of random histories: users lie elsewhere than items do, and recall differs."""
    rng = np.random.default_rng(seed)
    live = live_items(len(model.embeddings), model.removed)
    names = [model.item_ids(rng.choice(live, min(_HISTORY, len(live)))) for _ in range(count)]
    users = model.encode_users(names)
    return users / np.linalg.norm(users, axis=1, keepdims=True)


def fill_index(model: LaserRecommender, kind: IndexKind, **place: object) -> Index:
    """All items that can be recommended, under their dense numbers. place: `url`, `folder`, `collection` of Qdrant.
    Raises UserError if something is in that place."""
    live = live_items(len(model.embeddings), model.removed)
    index = make_index(kind, model.embeddings.shape[1], **place)
    if len(index):
        raise UserError(f"{place.get('url') or place.get('folder')} holds {len(index):,} items already; name another "
                        "collection or delete it")
    index.add(live, model.embeddings.numpy()[live - 1])
    return index


def build_index(model: LaserRecommender, kind: IndexKind, folder: Path, url: str | None = None, queries: int = 200,
                k: int = 10, collection: str = "items") -> dict[str, Any]:
    """Build, save into `folder`, and measure. Returns {kind, items, width, seconds, bytes, recall@k, queries};
    bytes: on this disk. collection: its name on the server at url. Raises UserError for a folder or a
    collection that holds something, or a url for another kind than qdrant."""
    if folder.is_dir() and any(folder.iterdir()):
        raise UserError(f"{folder} is not empty; name another folder or delete it")
    if url is not None and kind != IndexKind.QDRANT:
        raise UserError(f"a url is for kind qdrant, not {kind}")
    start = time.monotonic()
    index = fill_index(model, kind, **({} if url is None else {"url": url, "collection": collection}))
    index.save(folder)
    note_catalogue(folder, model.embeddings, model.removed)
    seconds = time.monotonic() - start
    exact: ExactIndex = index if kind == IndexKind.EXACT else fill_index(model, IndexKind.EXACT)
    recall = recall_against_exact(index, exact, user_queries(model, queries), k)
    return {"kind": str(kind), "items": len(index), "width": model.embeddings.shape[1], "seconds": round(seconds, 2),
            "bytes": sum(f.stat().st_size for f in folder.rglob("*") if f.is_file()), f"recall@{k}": recall,
            "queries": queries}
