"""The item-to-item regression without a matrix of items x items: one small ridge regression per item.

The weights into item j are those of a ridge over j's own candidates C alone, (G_CC + l2 I) w = H_Cj, with the same
products G and H of sequences, steps and texts as in the exact form: the local form of EASE (Steck 2019), with
candidates chosen beforehand as in SLIM with feature selection (Ning & Karypis 2011). With all items as candidates the
two forms agree. Time grows with items x candidates ** 3, memory with items x candidates.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from scipy import sparse
from torch import Tensor

from laserrec.config import NeighboursConfig
from laserrec.methods.nearest_text import nearest

Steps = tuple[sparse.csr_array, sparse.csr_array]
"""See `neighbours.step_products`."""
_CO_OCCURRING = 2 / 3
"""Share of the candidates that is chosen by co-occurrence, where there are texts to choose the rest by."""
_KEPT = 500
"""Co-occurring items that are kept of each item, or as many as are candidates. Only items with more than so many,
outside the head, lose any."""
_HEAD = 4096
"""Most frequent items, whose co-occurrence with each other is held as one dense block: their rows are long."""
_AT_ONCE = 64
"""Items whose regressions are solved as one batch."""
_PAIRS_AT_ONCE = 20_000_000
"""Pairs of items that are counted before the rarest are dropped."""


def local_weights(
    x: sparse.csr_array, config: NeighboursConfig, text: Float[Tensor, "n_items d_text"] | None = None,
    device: torch.device | None = None, positive: bool = False, steps: Steps | None = None,
) -> sparse.csr_array:
    """The regression's weights B [n_items n_items], at most config.candidates in each column: entry (i, j) is what item
    i in a history adds to the score of item j.

    x: [sequences n_items], a weight where an item stands in a sequence. steps: what config.order weighs, as
    `neighbours.step_products` gives it; None: the order of items does not count. positive: leave out the weights below
    zero. On the CPU all of torch's threads work, each on items of its own; the result does not depend on their number.
    """
    problem, n_items = _Problem(x, config, text, device or torch.device("cpu"), steps), x.shape[1]
    groups = [np.arange(at, min(n_items, at + _AT_ONCE)) for at in range(0, n_items, _AT_ONCE)]
    sources, weights, counts = [], [], []
    for rows, found in _solved(problem, groups):
        kept = found > 0 if positive else found != 0
        sources.append(rows[kept])
        weights.append(found[kept])
        counts.append(kept.sum(axis=1))
    ends = np.concatenate([[0], np.concatenate(counts).cumsum()])
    del problem
    by_target = sparse.csr_array((_joined(weights), _joined(sources), ends), shape=(n_items, n_items))
    return by_target.T.tocsr()


def _joined(parts: list[np.ndarray]) -> np.ndarray:
    """The parts, which are dropped, as one array."""
    whole = np.concatenate(parts)
    parts.clear()
    return whole


def largest(matrix: sparse.csr_array, count: int, magnitude: bool = False
            ) -> tuple[Int[np.ndarray, "rows count"], Float[np.ndarray, "rows count"]]:
    """Columns and values of each row's `count` largest entries, largest first (magnitude: by size without the sign);
    column 0 with value 0 where a row has fewer."""
    columns = np.zeros((matrix.shape[0], count), np.int32)
    values = np.zeros((matrix.shape[0], count), np.float32)
    for start in range(0, matrix.shape[0], 4096):
        part = matrix[start : start + 4096]
        lengths = np.diff(part.indptr)
        row = np.repeat(np.arange(part.shape[0]), lengths)
        order = np.lexsort((-(np.abs(part.data) if magnitude else part.data), row))
        place = np.arange(len(order)) - np.repeat(part.indptr[:-1], lengths)
        kept = place < count
        columns[start + row[kept], place[kept]] = part.indices[order[kept]]
        values[start + row[kept], place[kept]] = part.data[order[kept]]
    return columns, values


def _solved(problem: _Problem, groups: list[np.ndarray]) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    if problem.device.type != "cpu":
        yield from map(problem.solve, groups)
        return
    threads = torch.get_num_threads()
    try:
        with ThreadPoolExecutor(threads, initializer=lambda: torch.set_num_threads(1)) as pool:
            yield from pool.map(problem.solve, groups)
    finally:
        torch.set_num_threads(threads)


class _Problem:
    """All that the regressions read; nothing in it changes. Thread-safe."""

    def __init__(self, x: sparse.csr_array, config: NeighboursConfig, text: Tensor | None, device: torch.device,
                 steps: Steps | None = None):
        self.config, self.device, n_items = config, device, x.shape[1]
        self.text_weight = 0.0 if text is None else config.text_weight
        self.unit = F.normalize(text, dim=-1).to(device) if text is not None and self.text_weight else None
        most = config.candidates if self.unit is None else round(config.candidates * _CO_OCCURRING)
        self.most, self.near_text = max(1, most), None
        if self.unit is not None:
            self.near_text = nearest(self.unit, min(config.candidates - self.most, n_items - 1))
        together, past, crossed = (1.0, None, None) if steps is None else (1 - config.order, *steps)
        self.diagonal = np.asarray(x.multiply(x).sum(axis=0), dtype=np.float32).ravel() * together
        kept = max(_KEPT, self.most)
        self.pairs = self.towards = co_occurrence(x, kept)  # towards: row j is what is to be told of item j
        if past is not None and crossed is not None:
            self.diagonal += config.order * past.diagonal().astype(np.float32)
            self.towards = together * self.pairs + config.order * _without_rest(crossed.T.tocsr(), 0, kept)
            self.pairs = together * self.pairs + config.order * _without_rest(past, 0, kept)
        self.root = np.sqrt(self.diagonal + self.text_weight + config.l2)
        head = np.sort(np.argsort(-self.diagonal, kind="stable")[:_HEAD])
        self.place_in_head = np.full(n_items, -1, np.int32)
        self.place_in_head[head] = np.arange(len(head))
        frequent = x.tocsc()[:, head]
        self.head = together * (frequent.T @ frequent).toarray().astype(np.float32)
        if past is not None:
            self.head += config.order * past[head][:, head].toarray().astype(np.float32)

    def candidates(self, item: int) -> Int[np.ndarray, "some"]:
        """The co-occurring items that each alone would explain most of the item, and the nearest by text."""
        row = slice(self.towards.indptr[item], self.towards.indptr[item + 1])
        found = self.towards.indices[row]
        if len(found) > self.most:
            explained = self.towards.data[row] / self.root[found]  # the root of what the loss falls by
            found = found[np.argpartition(-explained, self.most)[: self.most]]
        if self.near_text is not None:
            near = self.near_text[item]
            found = np.union1d(found, near[near != item])
        return np.sort(found)

    def solve(self, items: Int[np.ndarray, "items"]) -> tuple[Int[np.ndarray, "items most"],
                                                              Float[np.ndarray, "items most"]]:
        """Candidates of these items and their weights; zero weights behind the shorter lists."""
        own = [self.candidates(item) for item in items.tolist()]
        width = 1 + max(1, *map(len, own))
        rows, gram = np.zeros((len(items), width), np.int32), np.zeros((len(items), width, width), np.float32)
        real, place = np.zeros((len(items), width), np.float32), np.full(len(self.diagonal), -1, np.int32)
        target = None if self.towards is self.pairs else np.zeros((len(items), width), np.float32)
        for at, (item, candidates) in enumerate(zip(items, own, strict=True)):
            count = 1 + len(candidates)
            rows[at, 0], rows[at, 1:count], real[at, :count] = item, candidates, 1.0
            self._fill(gram[at, :count, :count], rows[at, :count], place)
            if target is not None:
                self._fill_target(target[at, :count], rows[at, :count], place)
        weights = self._ridge(torch.from_numpy(gram), torch.from_numpy(rows), torch.from_numpy(real),
                              None if target is None else torch.from_numpy(target))
        return rows[:, 1:], (weights.cpu() * torch.from_numpy(real[:, 1:])).numpy()

    def _fill(self, gram: np.ndarray, items: np.ndarray, place: np.ndarray) -> None:
        """Co-occurrence of the items with each other. place: -1 for every item of the catalogue, and left so."""
        place[items] = np.arange(len(items))
        in_head = self.place_in_head[items]
        frequent = in_head >= 0
        rare = self.pairs[items[~frequent]]
        columns = place[rare.indices]
        hit = columns >= 0
        lines = np.repeat(np.flatnonzero(~frequent), np.diff(rare.indptr))[hit]
        gram[lines, columns[hit]] = rare.data[hit]
        gram[columns[hit], lines] = rare.data[hit]
        gram[np.ix_(frequent, frequent)] = self.head[np.ix_(in_head[frequent], in_head[frequent])]
        np.fill_diagonal(gram, self.diagonal[items])
        place[items] = -1

    def _fill_target(self, target: np.ndarray, items: np.ndarray, place: np.ndarray) -> None:
        """What is to be told of the first item by each of them. place: as in `_fill`."""
        place[items] = np.arange(len(items))
        own = slice(self.towards.indptr[items[0]], self.towards.indptr[items[0] + 1])
        columns = place[self.towards.indices[own]]
        hit = columns >= 0
        target[columns[hit]] = self.towards.data[own][hit]
        place[items] = -1

    @torch.no_grad()
    def _ridge(self, gram: Tensor, rows: Tensor, real: Tensor, target: Tensor | None
               ) -> Float[Tensor, "items candidates"]:
        """gram: [items width width], the item itself first. target: [items width]; None: the item's own column."""
        gram = gram.to(self.device)
        if target is not None:
            gram[:, 1:, 0] = target.to(self.device)[:, 1:]
        if self.unit is not None:
            unit = self.unit[rows.long().to(self.device)] * real.to(self.device)[..., None]
            gram.baddbmm_(unit, unit.mT, alpha=self.text_weight)
        gram.diagonal(dim1=1, dim2=2).add_(self.config.l2)
        left, right = gram[:, 1:, 1:], gram[:, 1:, :1]
        factor, failed = torch.linalg.cholesky_ex(left)
        weights = torch.cholesky_solve(right, factor)
        if bool((bad := failed > 0).any()):  # the pairs that were dropped may cost definiteness where l2 is small
            weights[bad] = torch.linalg.solve(left[bad], right[bad])
        return weights[..., 0]


def co_occurrence(x: sparse.csr_array, most: int | None = None) -> sparse.csr_array:
    """Weighted co-occurrence counts [n_items n_items] of different items, of each item the `most` largest."""
    most = _KEPT if most is None else most
    columns, lengths = x.T.tocsr(), np.diff(x.indptr)
    bound = np.bincount(x.indices, np.repeat(lengths, lengths), x.shape[1]).astype(np.int64)  # of each row's entries
    block = np.concatenate([[0], bound.cumsum()[:-1]]) // _PAIRS_AT_ONCE
    parts = []
    for number in np.unique(block):
        start, end = np.searchsorted(block, [number, number + 1])
        parts.append(_without_rest((columns[start:end] @ x).tocsr(), int(start), most))
    return sparse.vstack(parts, format="csr")


def _without_rest(part: sparse.csr_array, start: int, most: int) -> sparse.csr_array:
    """Rows from `start` on without the diagonal, and the `most` largest entries of each."""
    row = np.repeat(np.arange(part.shape[0]), np.diff(part.indptr))
    kept = part.indices != row + start
    for long in np.flatnonzero(np.diff(part.indptr) > most + 1):
        at = np.arange(part.indptr[long], part.indptr[long + 1])
        at = at[kept[at]]
        kept[at[np.argpartition(-part.data[at], most - 1)[most:]]] = False
    ends = np.concatenate([[0], np.bincount(row[kept], minlength=part.shape[0]).cumsum()])
    return sparse.csr_array((part.data[kept].astype(np.float32), part.indices[kept].astype(np.int32),
                             ends.astype(np.int64)), shape=part.shape)
