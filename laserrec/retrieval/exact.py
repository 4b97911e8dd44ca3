"""All products, in bounded memory; ties go to the smaller row."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int

from laserrec.retrieval.index import Found, IndexKind, Rows, checked, nothing, row_array
from laserrec.retrieval.top import top
from laserrec.util import checkpoint
from laserrec.util.errors import UserError
from laserrec.util.memory import rows_at_once

_FILE = "vectors.safetensors"


class ExactIndex:
    """Takes vectors of any length. Parameters: `d`: their width."""

    kind, files = IndexKind.EXACT, (_FILE,)

    def __init__(self, d: int):
        self.d = d
        self._rows = np.zeros(0, dtype=np.int64)
        """Ascending."""
        self._vectors = np.zeros((0, d), dtype=np.float32)

    def __len__(self) -> int:
        return len(self._rows)

    def add(self, rows: Int[np.ndarray, "n"], vectors: Float[np.ndarray, "n d"]) -> None:
        joined = np.concatenate([self._rows, row_array(rows)])
        order = np.argsort(joined)
        self._rows, self._vectors = joined[order], np.concatenate([self._vectors, checked(vectors, self.d)])[order]

    def search(self, queries: Float[np.ndarray, "queries d"], k: int, allowed: Rows | None = None,
               excluded: Sequence[Rows] | None = None) -> Found:
        queries = checked(queries, self.d, k)
        rows, scores = nothing(len(queries), k)
        own, barred = torch.from_numpy(self._rows), None
        if allowed is not None:
            barred = torch.from_numpy(~np.isin(self._rows, row_array(allowed)))
        step = rows_at_once(len(self), max(1, len(queries)))
        for at in range(0, len(queries), step):
            products = torch.from_numpy(queries[at : at + step] @ self._vectors.T)
            if barred is not None:
                products[:, barred] = -torch.inf
            for query, line in enumerate(products, at):
                if excluded is not None:
                    line[self._columns(row_array(excluded[query]))] = -torch.inf
                found, best = top(line, own, k)
                rows[query, : len(found)], scores[query, : len(found)] = found, best
        return rows, scores

    def _columns(self, rows: Int[np.ndarray, "n"]) -> Int[np.ndarray, "found"]:
        """Where those of `rows` that are here stand."""
        places = np.searchsorted(self._rows, rows)
        there = places < len(self._rows)
        there[there] = self._rows[places[there]] == rows[there]
        return places[there]

    def write(self, folder: Path) -> dict[str, Any]:
        checkpoint.save(folder / _FILE, {"rows": torch.from_numpy(self._rows),
                                         "vectors": torch.from_numpy(self._vectors)})
        return {}

    @classmethod
    def open(cls, folder: Path, d: int, items: int, shared: bool) -> ExactIndex:
        """Raises UserError where the file doesn't hold `items` vectors of width d under ascending rows."""
        index, stored = cls(d), checkpoint.load(folder / _FILE)[0]
        rows, vectors = stored.get("rows"), stored.get("vectors")
        if (rows is None or vectors is None or rows.dtype != torch.int64 or vectors.dtype != torch.float32
                or rows.shape != (items,) or vectors.shape != (items, d) or (items and rows[0] < 0)
                or not bool((rows.diff() > 0).all())):
            raise UserError(f"{folder / _FILE} doesn't hold what index.json says; build the index again")
        index._rows, index._vectors = rows.numpy(), vectors.numpy()
        return index
