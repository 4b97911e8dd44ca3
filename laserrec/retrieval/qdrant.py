"""A collection on a Qdrant server. Extra `qdrant`.

Nothing of it is kept in a folder: the client's own local storage holds pickles, which whoever made the folder could use
to run code. Without a server the kinds exact and usearch do the same work. With `url` None the collection is in memory.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from laserrec.retrieval.index import (
    Found,
    IndexKind,
    Rows,
    check_unit,
    checked,
    library,
    nothing,
    past_excluded,
    row_array,
)
from laserrec.util.errors import UserError

_AT_ONCE = 1000


class QdrantIndex:
    """Parameters: `d`: width of the vectors; `url`: of the server; `collection`: its name there; `mark`: kept with a
    collection that is made here, to know it again; `make`: whether it is made if it isn't there. Raises UserError where
    the server does not answer, for a collection of another width, and without `make` for one that isn't there."""

    kind, files = IndexKind.QDRANT, ()

    def __init__(self, d: int, url: str | None = None, collection: str = "items", mark: str = "",
                 make: bool = True):
        self.d, self.url, self.collection = d, url, collection
        client = library("qdrant_client", "qdrant")
        self._models = client.models
        with self._asking():
            self._client = client.QdrantClient(**({"url": url} if url else {"location": ":memory:"}))
            there = self._client.collection_exists(collection)
            if not there and not make:
                raise UserError(f"there is no collection {collection!r} at {url}; was it deleted, or is it another "
                                "server's? Build the index again, or restore it")
            if not there:
                self._client.create_collection(collection, metadata={"laserrec": mark},
                                               vectors_config=self._models.VectorParams(
                                                   size=d, distance=self._models.Distance.DOT))
            found = self._client.get_collection(collection).config
        self.mark = str((found.metadata or {}).get("laserrec", ""))
        width = getattr(found.params.vectors, "size", None)
        if width != d:
            raise UserError(f"collection {collection!r} at {url} has vectors of width {width}, not {d}; name another")

    @contextlib.contextmanager
    def _asking(self) -> Iterator[None]:
        errors = library("qdrant_client.http.exceptions", "qdrant")
        try:
            yield
        except (errors.ApiException, OSError, ValueError) as error:
            first = (str(error).splitlines() or [type(error).__name__])[0]
            raise UserError(f"the Qdrant server at {self.url} doesn't answer as it should: {first}; look at the url "
                            "and at the server") from None

    def __len__(self) -> int:
        with self._asking():
            return self._client.count(self.collection, exact=True).count

    def add(self, rows: Int[np.ndarray, "n"], vectors: Float[np.ndarray, "n d"]) -> None:
        vectors = checked(vectors, self.d)
        check_unit(rows, vectors, self.kind)
        for at in range(0, len(vectors), _AT_ONCE):
            part = slice(at, at + _AT_ONCE)
            batch = self._models.Batch(ids=[int(i) for i in rows[part]], vectors=vectors[part].tolist())
            with self._asking():
                self._client.upsert(self.collection, wait=True, points=batch)

    def search(self, queries: Float[np.ndarray, "queries d"], k: int, allowed: Rows | None = None,
               excluded: Sequence[Rows] | None = None) -> Found:
        queries, models = checked(queries, self.d, k), self._models
        only = None
        if allowed is not None:
            only = models.Filter(must=[models.HasIdCondition(has_id=row_array(allowed).tolist())])

        def nearest(some: np.ndarray, count: int) -> Found:
            rows, scores = nothing(len(some), count)
            requests = [models.QueryRequest(query=q.tolist(), limit=count, filter=only) for q in some]
            with self._asking():
                answers = self._client.query_batch_points(self.collection, requests)
            for query, answer in enumerate(answers):
                real = [point for point in answer.points if isinstance(point.id, int)][:count]
                rows[query, : len(real)] = [point.id for point in real]
                scores[query, : len(real)] = [point.score for point in real]
            return rows, scores

        return past_excluded(nearest, queries, len(self), k, excluded)

    def write(self, folder: object) -> dict[str, Any]:
        """Nothing: the server keeps the vectors."""
        if self.url is None:
            raise UserError("an index of kind qdrant is kept on a server; give its url, or use kind exact or usearch")
        return {"url": self.url, "collection": self.collection}
