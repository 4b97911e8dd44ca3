"""Nearest items by cosine: exact, usearch and Qdrant behind one interface.

Every index holds unit vectors under integer ids (dense items) and answers `search` with the best first: ids
Int64[queries k], -1 where there are fewer, and scores Float32[queries k], -inf there. The exact index breaks ties by
the smaller id.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Iterable, Sequence
from enum import StrEnum
from pathlib import Path
from typing import Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Float, Int

from laserrec.util import checkpoint
from laserrec.util.errors import UserError
from laserrec.util.io import read_json, write_json
from laserrec.util.memory import rows_at_once

Found = tuple[Int[np.ndarray, "queries k"], Float[np.ndarray, "queries k"]]
Excluded = Sequence[Iterable[int]]
"""Per query, ids that must not be found."""


class IndexKind(StrEnum):
    EXACT = "exact"
    USEARCH = "usearch"
    QDRANT = "qdrant"


@runtime_checkable
class Index(Protocol):
    """What each index can do. Methods raise ValueError for vectors of another width or k < 1."""

    kind: IndexKind
    d: int
    """Width of the vectors."""

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
                block[row, self._columns(gone)] = -np.inf
            columns = _top(block, k)
            best = np.take_along_axis(block, columns, axis=1)
            real = np.isfinite(best)
            rows = slice(at, at + len(block)), slice(0, columns.shape[1])
            ids[rows] = np.where(real, self._ids[columns], -1)
            scores[rows] = best
        return ids, scores

    def _columns(self, ids: Iterable[int]) -> Int[np.ndarray, "found"]:
        """Where those of `ids` that are here stand."""
        wanted = np.fromiter(ids, dtype=np.int64)
        places = np.searchsorted(self._ids, wanted)
        there = places < len(self._ids)
        there[there] = self._ids[places[there]] == wanted[there]
        return places[there]

    def vectors(self, ids: Sequence[int]) -> Float[np.ndarray, "n d"]:
        """Of ids that are in the index."""
        return self._vectors[np.searchsorted(self._ids, np.asarray(ids))]

    def save(self, folder: Path) -> None:
        checkpoint.save(folder / "vectors.safetensors", {"ids": torch.from_numpy(self._ids),
                                                         "vectors": torch.from_numpy(self._vectors)})
        write_json(folder / "index.json", {"kind": self.kind, "d": self.d})

    @classmethod
    def load(cls, folder: Path, shared: bool, d: int) -> ExactIndex:
        """As `load_index`."""
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
        return _past_excluded(self._nearest, queries, len(self), k, excluded)

    def _nearest(self, queries: Float[np.ndarray, "queries d"], count: int) -> Found:
        ids, scores = _nothing(len(queries), count)
        matches = self._index.search(queries, count)
        keys = np.asarray(matches.keys).reshape(len(queries), -1).astype(np.int64)
        # The graph may find fewer than it was asked for; what stands behind them then means nothing.
        found = np.atleast_1d(matches.counts) if hasattr(matches, "counts") else np.array([keys.shape[1]])
        real = np.arange(keys.shape[1]) < found[:, None]
        ids[:, : keys.shape[1]][real] = keys[real]
        products = 1 - np.asarray(matches.distances, dtype=np.float32).reshape(keys.shape)
        scores[:, : keys.shape[1]][real] = products[real]
        return ids, scores

    def save(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        temporary = folder / ".graph.usearch"
        self._index.save(str(temporary))
        temporary.replace(folder / "graph.usearch")
        write_json(folder / "index.json", {"kind": self.kind, "d": self.d})

    @classmethod
    def load(cls, folder: Path, shared: bool, d: int) -> UsearchIndex:
        """As `load_index`."""
        index, file = cls(d), folder / "graph.usearch"
        if not file.is_file():
            raise UserError(f"no such file: {file}; build the index again")
        (index._index.view if shared else index._index.load)(str(file))
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

        def nearest(some: np.ndarray, count: int) -> Found:
            ids, scores = _nothing(len(some), count)
            requests = [self._models.QueryRequest(query=q.tolist(), limit=count, filter=only) for q in some]
            for row, answer in enumerate(self._client.query_batch_points(self.collection, requests)):
                for column, point in enumerate(answer.points):
                    ids[row, column], scores[row, column] = point.id, point.score
            return ids, scores

        return _past_excluded(nearest, queries, len(self), k, excluded)

    def save(self, folder: Path) -> None:
        """A server keeps its collection; from memory or another folder the points are copied."""
        if not self.url:
            copy = QdrantIndex(self.d, folder=folder / "collection", collection=self.collection)
            self._copy_to(copy)
            copy._client.close()
        write_json(folder / "index.json", {"kind": self.kind, "d": self.d, "url": self.url,
                                           "collection": self.collection})

    @classmethod
    def load(cls, folder: Path, shared: bool, d: int, url: str | None = None, collection: str = "items"
             ) -> QdrantIndex:
        """As `load_index`."""
        if url or not shared:
            return cls(d, url=url, folder=None if url else folder / "collection", collection=collection)
        index = cls(d, collection=collection)
        with tempfile.TemporaryDirectory(prefix="laserrec-") as scratch:  # the client locks the folder that it opens
            stored = QdrantIndex(d, folder=shutil.copytree(folder / "collection", Path(scratch) / "collection",
                                                           ignore=shutil.ignore_patterns(".lock")),
                                 collection=collection)
            stored._copy_to(index)
            stored._client.close()
        return index

    def _copy_to(self, other: QdrantIndex) -> None:
        after = None
        while True:
            page, after = self._client.scroll(self.collection, limit=1000, offset=after, with_vectors=True)
            if page:
                other.add(np.array([p.id for p in page]), np.array([p.vector for p in page], dtype=np.float32))
            if after is None:
                return


def _library(module: str, extra: str):
    import importlib

    try:
        return importlib.import_module(module)
    except ImportError:
        raise UserError(f"this index needs another library: pip install 'laserrec[{extra}]'") from None


def _most(excluded: Excluded | None) -> int:
    return max((len(set(gone)) for gone in excluded), default=0) if excluded is not None else 0


_MORE = 4


def _past_excluded(nearest: Callable[[np.ndarray, int], Found], queries: Float[np.ndarray, "queries d"], size: int,
                   k: int, excluded: Excluded | None) -> Found:
    """For an index that knows no exclusion. nearest: (queries, count) -> the best of all `size` ids. It is asked for
    ever more until k that are not excluded are left, so that many excluded ids cost only where they are found."""
    ids, scores = _nothing(len(queries), k)
    rows, count = np.arange(len(queries)), min(size, k + min(k, _most(excluded)))
    while len(rows) and count:
        own = None if excluded is None else [excluded[row] for row in rows]
        ids[rows], scores[rows] = _without(*nearest(queries[rows], count), k, own)
        if count == size:
            break
        rows, count = rows[ids[rows, -1] < 0], min(size, _MORE * count)
    return ids, scores


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


def load_index(folder: Path, shared: bool = False) -> Index:
    """From a folder that an index's `save` wrote. shared: to search only; then any number of processes may have it
    open, and usearch's file is mapped, so that they keep one copy in memory. Raises UserError if it is none."""
    facts = read_json(folder / "index.json", "build the index again")
    kind = index_kind(folder)
    return _KINDS[kind].load(folder, shared, **{name: fact for name, fact in facts.items() if name != "kind"})


def index_kind(folder: Path) -> IndexKind:
    """Of an index's folder. Raises UserError if it is none."""
    kind = read_json(folder / "index.json", "build the index again").get("kind")
    if kind not in _KINDS:
        raise UserError(f"{folder / 'index.json'}: no index of kind {kind!r}; there are: {', '.join(_KINDS)}")
    return IndexKind(kind)


def recall_against_exact(
    index: Index, exact: ExactIndex, queries: Float[np.ndarray, "queries d"], k: int = 10
) -> float:
    """Share of the exact k nearest that the index finds, mean over the queries."""
    mine, truth = index.search(queries, k)[0], exact.search(queries, k)[0]
    found = [len(set(m) & set(t) - {-1}) / max(1, len(set(t) - {-1})) for m, t in zip(mine, truth, strict=True)]
    return float(np.mean(found))
