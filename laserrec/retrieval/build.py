"""Build an index of a catalogue and measure how much of what exact search finds it finds."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, Int
from torch import Tensor

from laserrec.retrieval.folder import catalogue_sha256, index_folder, make_index
from laserrec.retrieval.graph import UsearchIndex
from laserrec.retrieval.index import Index, IndexKind, library, recall
from laserrec.retrieval.qdrant import QdrantIndex
from laserrec.util.errors import UserError
from laserrec.util.io import check_folder

_GOAL = 0.99
"""Recall that the search in a graph is set to."""


def fill_index(vectors: Float[Tensor, "items d"], rows: Int[Tensor, "live"], kind: IndexKind, **place: Any) -> Index:
    """An index of these rows of `vectors`. place: `url` and `collection` of kind qdrant. A collection that an
    interrupted call began for the same catalogue is completed; raises UserError for one that holds something else."""
    if kind == IndexKind.QDRANT:
        place["mark"] = catalogue_sha256(vectors, rows)
    elif any(value is not None for value in place.values()):
        raise UserError(f"a url or a collection is for kind qdrant, not {kind}")
    index = make_index(kind, vectors.shape[1], **place)
    if isinstance(index, QdrantIndex) and len(index) and index.mark != place["mark"]:
        raise UserError(f"collection {index.collection!r} at {index.url} holds {len(index):,} items of something else; "
                        "name another collection or delete it")
    index.add(rows.cpu().numpy(), vectors[rows].cpu().numpy())
    return index


def check_place(kind: IndexKind, folder: Path | str, url: str | None) -> None:
    """Raises UserError where an index could not be built: call it before a model is loaded for one."""
    check_folder(folder)
    if kind == IndexKind.QDRANT:
        library("qdrant_client", "qdrant")
        if not url:
            raise UserError("an index of kind qdrant is kept on a server; give its url, or use kind exact or usearch")
    elif kind == IndexKind.USEARCH:
        library("usearch", "usearch")


def build_index(vectors: Float[Tensor, "items d"], rows: Int[Tensor, "live"], kind: IndexKind, folder: Path | str,
                queries: Float[np.ndarray, "queries d"], k: int = 10, **place: Any) -> dict[str, Any]:
    """Build into `folder` and measure. vectors: of the whole catalogue; rows: of the items that
    can be recommended. A graph's search looks at as many candidates as these queries need. Returns {kind, items, width,
    seconds, bytes, recall@k, queries}, of a graph also expansion; bytes: on this disk. Raises UserError for a folder
    that holds something else, and as `fill_index`."""
    check_place(kind, folder, place.get("url"))
    start = time.monotonic()
    with index_folder(folder) as write:
        index = fill_index(vectors, rows, kind, **place)
        exact = index if kind == IndexKind.EXACT else fill_index(vectors, rows, IndexKind.EXACT)
        truth, graph = exact.search(queries, k)[0], {}
        if isinstance(index, UsearchIndex):
            index.tune(queries, truth, _GOAL)
            graph = {"expansion": index.expansion}
        write(index, catalogue_sha256(vectors, rows))
    seconds = time.monotonic() - start
    return {"kind": str(kind), "items": len(index), "width": index.d, "seconds": round(seconds, 2),
            "bytes": sum(f.stat().st_size for f in Path(folder).iterdir()), **graph,
            f"recall@{k}": recall(index.search(queries, k)[0], truth), "queries": len(queries)}
