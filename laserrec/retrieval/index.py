"""Items with the largest inner products, found by one of several indexes behind one interface.

An index holds vectors under the rows of a catalogue (from 0) and answers `search` with the best first: rows
Int64[queries k], -1 where there are fewer, and products Float32[queries k], -inf there.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable, Sequence
from enum import StrEnum
from pathlib import Path
from types import ModuleType
from typing import Any, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Float, Int

from laserrec.util.errors import UserError

Found = tuple[Int[np.ndarray, "queries k"], Float[np.ndarray, "queries k"]]
Rows = Iterable[int] | Int[np.ndarray, "n"]
_UNIT = 0.01
"""A length may differ from 1 by this: vectors may have been rounded to 16 bits."""
_MORE = 4


class IndexKind(StrEnum):
    """exact compares with all; usearch is a graph (HNSW) in one file; qdrant a collection on a server."""

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

    def add(self, rows: Int[np.ndarray, "n"], vectors: Float[np.ndarray, "n d"]) -> None:
        """Add vectors under rows that are not there yet. Raises UserError for vectors that are not of unit length,
        except for kind exact, which takes any."""

    def search(self, queries: Float[np.ndarray, "queries d"], k: int, allowed: Rows | None = None,
               excluded: Sequence[Rows] | None = None) -> Found:
        """The k best of each query. allowed: only these rows; excluded: per query, none of these."""

    def write(self, folder: Path) -> dict[str, Any]:
        """Write its files and return what else is needed to open it (`laserrec.retrieval.folder.index_folder`)."""


def recall(mine: Int[np.ndarray, "queries k"], truth: Int[np.ndarray, "queries k"]) -> float:
    """Share of the rows in `truth` that are also in `mine`, mean over the queries. -1 is no row."""
    found = [len(set(m) & set(t) - {-1}) / max(1, len(set(t) - {-1})) for m, t in zip(mine, truth, strict=True)]
    return float(np.mean(found)) if found else 1.0


# -- what the kinds share -------------------------------------------------------------------------------------------


def library(module: str, extra: str) -> ModuleType:
    """An optional library. Raises UserError, which names the extra, where it is missing."""
    try:
        return importlib.import_module(module)
    except ImportError:
        raise UserError(f"this index needs another library: pip install 'laserrec[{extra}]'") from None


def checked(vectors: np.ndarray, d: int, k: int = 1) -> Float[np.ndarray, "n d"]:
    """Float32, contiguous. Raises ValueError for another width or k < 1."""
    vectors = np.ascontiguousarray(vectors, dtype=np.float32)
    if vectors.ndim != 2 or vectors.shape[1] != d:
        raise ValueError(f"vectors have shape {vectors.shape}, not (n, {d})")
    if k < 1:
        raise ValueError(f"k is {k}; it must be at least 1")
    return vectors


def check_unit(rows: Int[np.ndarray, "n"], vectors: Float[np.ndarray, "n d"], kind: IndexKind) -> None:
    """Raises UserError unless all have length 1: graphs of neighbours find the nearest, and only among unit vectors the
    nearest has the largest product."""
    lengths = np.linalg.norm(vectors, axis=1)
    wrong = np.flatnonzero(~(np.abs(lengths - 1) <= _UNIT))
    if len(wrong):
        raise UserError(f"an index of kind {kind} needs vectors of length 1 and that of row {rows[wrong[0]]} has "
                        f"length {lengths[wrong[0]]:.3g}; scale them, or use kind {IndexKind.EXACT}, which takes any")


def row_array(rows: Rows) -> Int[np.ndarray, "n"]:
    """Rows as an Int64 array."""
    return np.asarray(rows if isinstance(rows, np.ndarray) else list(rows), dtype=np.int64)


def nothing(queries: int, k: int) -> Found:
    """The answer where nothing is found."""
    return np.full((queries, k), -1, dtype=np.int64), np.full((queries, k), -np.inf, dtype=np.float32)


def past_excluded(nearest: Callable[[np.ndarray, int], Found], queries: Float[np.ndarray, "queries d"], size: int,
                  k: int, excluded: Sequence[Rows] | None) -> Found:
    """For an index that knows no exclusion. nearest: (queries, count) -> the best of all `size` rows. It is asked for
    ever more until k that are not excluded are left, so that many excluded rows cost only where they are found."""
    gone = [np.zeros(0, np.int64)] * len(queries) if excluded is None else [row_array(rows) for rows in excluded]
    rows, scores = nothing(len(queries), k)
    left, count = np.arange(len(queries)), min(size, k + min(k, max(map(len, gone), default=0)))
    while len(left) and count:
        found, products = nearest(queries[left], count)
        for query, own, values in zip(left, found, products, strict=True):
            kept = np.flatnonzero((own >= 0) & np.isfinite(values) & ~np.isin(own, gone[query]))[:k]
            rows[query, : len(kept)], scores[query, : len(kept)] = own[kept], values[kept]
        if count == size:
            break
        left, count = left[rows[left, -1] < 0], min(size, _MORE * count)
    return rows, scores
