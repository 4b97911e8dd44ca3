"""Approximate search in a graph of neighbours (HNSW: Malkov & Yashunin 2018), by usearch. Extra `usearch`.

The library maps a file and follows the numbers in it unchecked: a wrong one ends the process. So `check_file` looks at
all of them before the library sees the file.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from laserrec.retrieval.exact import ExactIndex
from laserrec.retrieval.index import (
    Found,
    IndexKind,
    Rows,
    check_unit,
    checked,
    library,
    nothing,
    past_excluded,
    recall,
    row_array,
)
from laserrec.util.errors import UserError

_CONNECTIVITY, _EXPANSION, _MOST = 32, 256, 8192
"""Of the graph: neighbours of a node, candidates looked at while building and searching, and to how many of them `tune`
goes."""
_FILE = "graph.usearch"


class UsearchIndex:
    """One file on disk, which processes can share. Parameters: `d`: width of the vectors."""

    kind, files = IndexKind.USEARCH, (_FILE,)

    def __init__(self, d: int):
        self.d = d
        self._index = library("usearch.index", "usearch").Index(
            ndim=d, metric="ip", dtype="f32", connectivity=_CONNECTIVITY, expansion_add=_EXPANSION,
            expansion_search=_EXPANSION)

    @property
    def expansion(self) -> int:
        """Candidates that a search looks at. With more it finds more of the nearest and takes longer."""
        return self._index.expansion_search

    @expansion.setter
    def expansion(self, count: int) -> None:
        self._index.expansion_search = count

    def tune(self, queries: Float[np.ndarray, "queries d"], truth: Int[np.ndarray, "queries k"], goal: float) -> None:
        """Double the expansion until the recall of these queries' nearest rows, `truth`, reaches `goal`: a large
        catalogue needs more than a small one."""
        while (self.expansion < min(_MOST, len(self))
               and recall(self.search(queries, truth.shape[1])[0], truth) < goal):
            self.expansion *= 2

    def __len__(self) -> int:
        return len(self._index)

    def add(self, rows: Int[np.ndarray, "n"], vectors: Float[np.ndarray, "n d"]) -> None:
        vectors = checked(vectors, self.d)
        check_unit(rows, vectors, self.kind)
        self._index.add(np.asarray(rows, dtype=np.uint64), vectors, threads=1)  # or the graph depends on timing

    def search(self, queries: Float[np.ndarray, "queries d"], k: int, allowed: Rows | None = None,
               excluded: Sequence[Rows] | None = None) -> Found:
        queries = checked(queries, self.d, k)
        if allowed is not None:  # the graph knows no filters; the allowed rows are few, and are compared one by one
            few, own = ExactIndex(self.d), np.unique(row_array(allowed)).astype(np.uint64)
            own = own[self._index.contains(own)] if len(own) else own
            if len(own):
                few.add(own.astype(np.int64), self._index.get(own))
            return few.search(queries, k, None, excluded)
        if not len(self) or not len(queries):
            return nothing(len(queries), k)
        return past_excluded(self._nearest, queries, len(self), k, excluded)

    def _nearest(self, queries: Float[np.ndarray, "queries d"], count: int) -> Found:
        rows, scores = nothing(len(queries), count)
        matches = self._index.search(queries, count)
        keys = np.asarray(matches.keys).reshape(len(queries), -1).astype(np.int64)
        # The graph may find fewer than it was asked for; what stands behind them then means nothing.
        found = np.atleast_1d(matches.counts) if hasattr(matches, "counts") else np.array([keys.shape[1]])
        real = np.arange(keys.shape[1]) < found[:, None]
        rows[:, : keys.shape[1]][real] = keys[real]
        products = 1 - np.asarray(matches.distances, dtype=np.float32).reshape(keys.shape)
        scores[:, : keys.shape[1]][real] = products[real]
        return rows, scores

    def write(self, folder: Path) -> dict[str, Any]:
        self._index.save(str(folder / _FILE))
        return {"expansion": self.expansion}

    @classmethod
    def open(cls, folder: Path, d: int, items: int, shared: bool) -> UsearchIndex:
        """shared: the file is mapped and can't be changed. Raises UserError for a file that `check_file` refuses."""
        index, file = cls(d), folder / _FILE
        check_file(file, d, items)
        try:
            (index._index.view if shared else index._index.load)(str(file))
        except (RuntimeError, OSError) as error:
            raise UserError(f"{file} can't be opened by usearch: {error}; build the index again") from None
        return index


def check_file(file: Path, d: int, items: int) -> None:
    """Raises UserError unless this is a whole graph of `items` vectors of width d in which every link leads to a node
    of its layer. Layout (usearch 2): vectors; 64 bytes of head; size, links a node, links at layer 0, layers, entry;
    each node's layer; the nodes: key, layer, and per layer a count and that many links."""
    empty = not file.stat().st_size  # can't be mapped
    fault = _fault(np.zeros(0, np.uint8) if empty else np.memmap(file, dtype=np.uint8, mode="r"), d, items)
    if fault:
        raise UserError(f"{file} is damaged or of another version of usearch: {fault}; build the index again")


def _fault(data: np.ndarray, d: int, items: int) -> str | None:
    """All numbers are Python integers before they are reckoned with, and lead into the file before they are used."""
    size, width = _numbers(data, 0, "<u4", 2)
    head = 8 + size * width
    if width != 4 * d or len(data) < head + 104 + 2 * size:
        return "its sizes don't fit"
    model = np.frombuffer(library("usearch.index", "usearch").Index(ndim=d, metric="ip", dtype="f32").save(), np.uint8)
    # Bytes 7 to 12 are the library's version, which it looks at itself, and 17 to 40 the counts.
    if not all((data[head + a : head + b] == model[8 + a : 8 + b]).all() for a, b in ((0, 7), (13, 17), (41, 64))):
        return "its head is not that of such an index"
    present, deleted, dimensions = _numbers(data, head + 17, "<u8", 3)
    nodes, links, base_links, top, entry = _numbers(data, head + 64, "<u8", 5)
    if (present, deleted, dimensions, nodes, size) != (items, 0, d, items, items):
        return "its counts don't fit"
    if (links, base_links) != (_CONNECTIVITY, 2 * _CONNECTIVITY):
        return "its connectivity is another"
    levels = data[head + 104 : head + 104 + 2 * size].view("<i2").astype(np.int64)
    if not size:
        return None if len(data) == head + 104 else "its sizes don't fit"
    if levels.min() < 0 or entry >= size or levels[entry] != levels.max() or top != levels.max():
        return "its layers don't fit"
    base, upper = 14 + 4 * base_links, 4 + 4 * links
    lengths = base + levels * upper
    starts = head + 104 + 2 * size + np.cumsum(lengths) - lengths
    if starts[-1] + lengths[-1] != len(data):
        return "its sizes don't fit"
    for level in range(top + 1):
        there = starts[levels >= level] + (10 if level == 0 else base + (level - 1) * upper)
        if not _links_lead(data, there, base_links if level == 0 else links, levels, level):
            return f"links of layer {level} lead nowhere"
    keys = np.concatenate([_gathered(data, part, 10) for part in _parts(starts)])
    rows = np.unique(keys[:, :8].copy().view("<i8"))
    if len(rows) != items or rows[0] < 0:
        return "its rows don't fit"
    return None if (keys[:, 8:].copy().view("<i2")[:, 0] == levels).all() else "its layers don't fit"


def _numbers(data: np.ndarray, at: int, kind: str, count: int) -> list[int]:
    """Zeros behind the end of the file."""
    size = count * np.dtype(kind).itemsize
    return np.frombuffer(data[at : at + size].tobytes().ljust(size, b"\0"), kind).tolist()


def _links_lead(data: np.ndarray, starts: np.ndarray, most: int, levels: np.ndarray, level: int) -> bool:
    """Whether the lists at `starts` have at most so many links, all to nodes that reach this layer."""
    for part in _parts(starts):
        lists = _gathered(data, part, 4 + 4 * most).view("<u4").astype(np.int64)
        if lists[:, 0].max() > most:
            return False
        links = lists[:, 1:][np.arange(most) < lists[:, :1]]
        if len(links) and (links.max() >= len(levels) or levels[links].min() < level):
            return False
    return True


def _gathered(data: np.ndarray, starts: np.ndarray, length: int) -> np.ndarray:
    return np.ascontiguousarray(data[starts[:, None] + np.arange(length)])


def _parts(starts: np.ndarray) -> list[np.ndarray]:
    return np.array_split(starts, len(starts) // 16_384 + 1)
