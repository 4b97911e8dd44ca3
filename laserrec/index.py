"""Nearest items by cosine: exact, usearch and Qdrant behind one interface.

Every index holds unit vectors under integer ids (dense items) and answers `search` with the best first: ids
Int64[queries k], -1 where there are fewer, and scores Float32[queries k], -inf there. The exact index breaks ties by
the smaller id.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from enum import StrEnum
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from jaxtyping import Float, Int

from laserrec import checkpoint
from laserrec.errors import UserError
from laserrec.io import read_json, write_json
from laserrec.memory import rows_at_once

Found = tuple[Int[np.ndarray, "queries k"], Float[np.ndarray, "queries k"]]
Excluded = Sequence[Iterable[int]]
"""Per query, ids that must not be found."""


class IndexKind(StrEnum):
    EXACT = "exact"
    USEARCH = "usearch"
    QDRANT = "qdrant"


class Index(Protocol):
    """What each index can do. Methods raise ValueError for vectors of another width or k < 1."""

    kind: IndexKind

    def __len__(self) -> int: ...

    def add(self, ids: Int[np.ndarray, "n"], vectors: Float[np.ndarray, "n d"]) -> None:
        """Add vectors of unit length; an id that is there already gets the new vector."""

    def remove(self, ids: Iterable[int]) -> None:
        """Forget these ids; unknown ones are passed over."""

    def search(self, queries: Float[np.ndarray, "queries d"], k: int, allowed: Iterable[int] | None = None,
               excluded: Excluded | None = None) -> Found:
        """The k nearest of each query. allowed: only these ids; excluded: per query, none of these."""

    def save(self, folder: Path) -> None:
        """Write everything that `load_index` needs."""


def _checked(queries: np.ndarray, d: int, k: int) -> np.ndarray:
    queries = np.ascontiguousarray(queries, dtype=np.float32)
    if queries.ndim != 2 or queries.shape[1] != d:
        raise ValueError(f"vectors have shape {queries.shape}, not (n, {d})")
    if k < 1:
        raise ValueError(f"k is {k}; it must be at least 1")
    return queries


def _nothing(queries: int, k: int) -> Found:
    return np.full((queries, k), -1, dtype=np.int64), np.full((queries, k), -np.inf, dtype=np.float32)


class ExactIndex:
    """All products, in bounded memory."""

    kind = IndexKind.EXACT

    def __init__(self, d: int):
        self.d = d
        self._ids = np.zeros(0, dtype=np.int64)
        self._vectors = np.zeros((0, d), dtype=np.float32)

    def __len__(self) -> int:
        return len(self._ids)

    def add(self, ids: Int[np.ndarray, "n"], vectors: Float[np.ndarray, "n d"]) -> None:
        vectors = _checked(vectors, self.d, 1)
        kept = ~np.isin(self._ids, ids)
        joined = np.concatenate([self._ids[kept], np.asarray(ids, dtype=np.int64)])
        order = np.argsort(joined, kind="stable")
        self._ids = joined[order]
        self._vectors = np.concatenate([self._vectors[kept], vectors])[order]

    def remove(self, ids: Iterable[int]) -> None:
        kept = ~np.isin(self._ids, np.fromiter(ids, dtype=np.int64))
        self._ids, self._vectors = self._ids[kept], self._vectors[kept]

    def search(self, queries: Float[np.ndarray, "queries d"], k: int, allowed: Iterable[int] | None = None,
               excluded: Excluded | None = None) -> Found:
        queries = _checked(queries, self.d, k)
        ids, scores = _nothing(len(queries), k)
        if not len(self):
            return ids, scores
        wanted = None if allowed is None else np.isin(self._ids, np.fromiter(allowed, dtype=np.int64))
        step = rows_at_once(len(self), len(queries))
        for at in range(0, len(queries), step):
            block = queries[at : at + step] @ self._vectors.T
            if wanted is not None:
                block[:, ~wanted] = -np.inf
            for row, gone in enumerate(() if excluded is None else excluded[at : at + step]):
                block[row, np.isin(self._ids, np.fromiter(gone, dtype=np.int64))] = -np.inf
            columns = _top(block, k)
            best = np.take_along_axis(block, columns, axis=1)
            real = np.isfinite(best)
            rows = slice(at, at + len(block)), slice(0, columns.shape[1])
            ids[rows] = np.where(real, self._ids[columns], -1)
            scores[rows] = best
        return ids, scores

    def vectors(self, ids: Sequence[int]) -> Float[np.ndarray, "n d"]:
        """Of ids that are in the index."""
        return self._vectors[np.searchsorted(self._ids, np.asarray(ids))]

    def save(self, folder: Path) -> None:
        checkpoint.save(folder / "vectors.safetensors", {"ids": torch.from_numpy(self._ids),
                                                         "vectors": torch.from_numpy(self._vectors)})
        write_json(folder / "index.json", {"kind": self.kind, "d": self.d})

    @classmethod
    def load(cls, folder: Path, d: int) -> ExactIndex:
        """From a folder that `save` wrote."""
        index = cls(d)
        stored, _ = checkpoint.load(folder / "vectors.safetensors")
        index._ids, index._vectors = stored["ids"].numpy(), stored["vectors"].numpy()
        return index


def _top(scores: Float[np.ndarray, "queries n"], k: int) -> Int[np.ndarray, "queries k"]:
    """Columns of the k largest, best first, ties by column. A partition finds the k-th value; all that are equal to it
    are sorted, so that the tie rule holds at the edge too."""
    k = min(k, scores.shape[1])
    edge = -np.partition(-scores, k - 1, axis=1)[:, k - 1]
    out = np.empty((len(scores), k), dtype=np.int64)
    for row, (values, least) in enumerate(zip(scores, edge, strict=True)):
        candidates = np.flatnonzero(values >= least)
        out[row] = candidates[np.argsort(-values[candidates], kind="stable")[:k]]
    return out


_CONNECTIVITY, _EXPANSION = 32, 256
"""Of the graph: neighbours of a node, and candidates looked at while building and searching."""


class UsearchIndex:
    """Approximate search in a graph (HNSW), embedded, one file on disk. Extra `usearch`."""

    kind = IndexKind.USEARCH

    def __init__(self, d: int):
        self.d = d
        self._index = _library("usearch.index", "usearch").Index(
            ndim=d, metric="ip", dtype="f32", connectivity=_CONNECTIVITY, expansion_add=_EXPANSION,
            expansion_search=_EXPANSION)

    def __len__(self) -> int:
        return len(self._index)

    def add(self, ids: Int[np.ndarray, "n"], vectors: Float[np.ndarray, "n d"]) -> None:
        vectors = _checked(vectors, self.d, 1)
        self.remove(ids)
        self._index.add(np.asarray(ids, dtype=np.uint64), vectors, threads=1)  # or the graph depends on timing

    def remove(self, ids: Iterable[int]) -> None:
        for item in ids:
            if self._index.contains(int(item)):
                self._index.remove(int(item))

    def search(self, queries: Float[np.ndarray, "queries d"], k: int, allowed: Iterable[int] | None = None,
               excluded: Excluded | None = None) -> Found:
        queries = _checked(queries, self.d, k)
        if allowed is not None:  # the graph knows no filters; the allowed items are few, and are compared one by one
            own = np.array([i for i in set(allowed) if self._index.contains(int(i))], dtype=np.uint64)
            few = ExactIndex(self.d)
            if len(own):
                few.add(own.astype(np.int64), self._index.get(own))
            return few.search(queries, k, None, excluded)
        if not len(self) or not len(queries):
            return _nothing(len(queries), k)
        count = min(len(self), k + _most(excluded))
        matches = self._index.search(queries, count)
        keys = np.asarray(matches.keys).reshape(len(queries), -1).astype(np.int64)
        scores = 1 - np.asarray(matches.distances, dtype=np.float32).reshape(len(queries), -1)
        return _without(keys, scores, k, excluded)

    def save(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        temporary = folder / ".graph.usearch"
        self._index.save(str(temporary))
        temporary.replace(folder / "graph.usearch")
        write_json(folder / "index.json", {"kind": self.kind, "d": self.d})

    @classmethod
    def load(cls, folder: Path, d: int) -> UsearchIndex:
        """From a folder that `save` wrote."""
        index = cls(d)
        index._index.load(str(folder / "graph.usearch"))
        return index


class QdrantIndex:
    """A Qdrant collection: a server by URL, or the client's own local mode in a folder or in memory. Extra `qdrant`."""

    kind = IndexKind.QDRANT

    def __init__(self, d: int, url: str | None = None, folder: Path | None = None, collection: str = "items"):
        self.d, self.url, self.collection = d, url, collection
        client = _library("qdrant_client", "qdrant")
        self._models = client.models
        place = {"url": url} if url else {"path": str(folder)} if folder else {"location": ":memory:"}
        self._client = client.QdrantClient(**place)
        if not self._client.collection_exists(collection):
            self._client.create_collection(collection, vectors_config=self._models.VectorParams(
                size=d, distance=self._models.Distance.DOT))

    def __len__(self) -> int:
        return self._client.count(self.collection, exact=True).count

    def add(self, ids: Int[np.ndarray, "n"], vectors: Float[np.ndarray, "n d"]) -> None:
        vectors = _checked(vectors, self.d, 1)
        for at in range(0, len(vectors), 1000):
            part = slice(at, at + 1000)
            self._client.upsert(self.collection, wait=True, points=self._models.Batch(
                ids=[int(i) for i in ids[part]], vectors=vectors[part].tolist()))

    def remove(self, ids: Iterable[int]) -> None:
        points = self._models.PointIdsList(points=[int(i) for i in ids])
        self._client.delete(self.collection, points_selector=points, wait=True)

    def search(self, queries: Float[np.ndarray, "queries d"], k: int, allowed: Iterable[int] | None = None,
               excluded: Excluded | None = None) -> Found:
        queries = _checked(queries, self.d, k)
        only = None
        if allowed is not None:
            only = self._models.Filter(must=[self._models.HasIdCondition(has_id=[int(i) for i in allowed])])
        count = k + _most(excluded)
        requests = [self._models.QueryRequest(query=q.tolist(), limit=count, filter=only) for q in queries]
        keys = np.full((len(queries), count), -1, dtype=np.int64)
        scores = np.full((len(queries), count), -np.inf, dtype=np.float32)
        for row, answer in enumerate(self._client.query_batch_points(self.collection, requests) if requests else ()):
            for column, point in enumerate(answer.points):
                keys[row, column], scores[row, column] = point.id, point.score
        return _without(keys, scores, k, excluded)

    def save(self, folder: Path) -> None:
        """A server keeps its collection; from memory or another folder the points are copied."""
        if not self.url:
            copy = QdrantIndex(self.d, folder=folder / "collection", collection=self.collection)
            points, after = [], None
            while True:
                page, after = self._client.scroll(self.collection, limit=1000, offset=after, with_vectors=True)
                points += page
                if after is None:
                    break
            if points:
                copy.add(np.array([p.id for p in points]), np.array([p.vector for p in points], dtype=np.float32))
            copy._client.close()
        write_json(folder / "index.json", {"kind": self.kind, "d": self.d, "url": self.url,
                                           "collection": self.collection})

    @classmethod
    def load(cls, folder: Path, d: int, url: str | None = None, collection: str = "items") -> QdrantIndex:
        """From a folder that `save` wrote."""
        return cls(d, url=url, folder=None if url else folder / "collection", collection=collection)


def _library(module: str, extra: str):
    import importlib

    try:
        return importlib.import_module(module)
    except ImportError:
        raise UserError(f"this index needs another library: pip install 'laserrec[{extra}]'") from None


def _most(excluded: Excluded | None) -> int:
    return max((len(set(gone)) for gone in excluded), default=0) if excluded is not None else 0


def _without(keys: np.ndarray, scores: np.ndarray, k: int, excluded: Excluded | None) -> Found:
    """The first k of each row that are not excluded."""
    ids, best = _nothing(len(keys), k)
    for row, own in enumerate(keys):
        kept = (own >= 0) & np.isfinite(scores[row])
        if excluded is not None:
            kept &= ~np.isin(own, np.fromiter(excluded[row], dtype=np.int64))
        columns = np.flatnonzero(kept)[:k]
        ids[row, : len(columns)], best[row, : len(columns)] = own[columns], scores[row, columns]
    return ids, best


_KINDS: dict[str, type] = {IndexKind.EXACT: ExactIndex, IndexKind.USEARCH: UsearchIndex,
                           IndexKind.QDRANT: QdrantIndex}


def make_index(kind: IndexKind, d: int, **place: object) -> Index:
    """An empty index for vectors of width d. place: `url` or `folder` of Qdrant."""
    return _KINDS[kind](d, **place)


def load_index(folder: Path) -> Index:
    """From a folder that an index's `save` wrote. Raises UserError if it is none."""
    facts = read_json(folder / "index.json", "build the index again")
    kind = facts.pop("kind")
    if kind not in _KINDS:
        raise UserError(f"{folder / 'index.json'}: no index of kind {kind!r}; there are: {', '.join(_KINDS)}")
    return _KINDS[kind].load(folder, **facts)


def recall_against_exact(
    index: Index, exact: ExactIndex, queries: Float[np.ndarray, "queries d"], k: int = 10
) -> float:
    """Share of the exact k nearest that the index finds, mean over the queries."""
    mine, truth = index.search(queries, k)[0], exact.search(queries, k)[0]
    found = [len(set(m) & set(t) - {-1}) / max(1, len(set(t) - {-1})) for m, t in zip(mine, truth, strict=True)]
    return float(np.mean(found))
