"""Ranking through an index: which items score well by their vectors, the index finds; all that an index can't know is
scored beside it: items whose score a score term changes, items added since, a request's candidates.

An index is never changed by its use, so that many processes can share one folder or one server. With an exact index the
answers are those without one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from laserrec.methods.protocol import AppliedTerm
from laserrec.retrieval.folder import AGAIN, catalogue_sha256, index_facts, load_index
from laserrec.retrieval.index import Index
from laserrec.retrieval.top import Ask, top
from laserrec.util.errors import UserError
from laserrec.util.memory import LIMIT_BYTES

_PROBES, _SAME = 64, 0.99
"""Items that are looked up when an index is taken, and how near to the vector's own product with itself the index must
come: it may keep fewer bits."""


@dataclass(frozen=True)
class Indexed:
    """An index that fits a catalogue as it was when it was taken (`attach`)."""

    index: Index
    covered: int
    """Rows below this are in the index, but for `gone`; later ones were added since."""
    gone: frozenset[int]
    """Removed before."""

    def rank(self, users: Float[Tensor, "batch d"], asks: Sequence[Ask], vectors: Float[Tensor, "items d"],
             removed: frozenset[int], applied: Sequence[AppliedTerm] = (), depth: int = 0
             ) -> list[tuple[Int[Tensor, "found"], Float[Tensor, "found"]]]:
        """Rows and scores of each request, best first: users @ vectors.T, changed by each term in order. removed: rows
        that are never recommended; applied: `[term.on(histories, users) for term in terms]`; depth: the model's
        (`TwoTower.depth`)."""
        none, device = torch.zeros(0, dtype=torch.long, device=vectors.device), vectors.device
        changed = [torch.unique(torch.cat([none, *(term.rows(u) for term in applied)])) for u in range(len(asks))]
        barred = [torch.cat([none, *(_rows(part, device) for part in _barred(ask))]) for ask in asks]
        lost = torch.tensor(sorted(removed), dtype=torch.long, device=device)
        found = self._found(users, asks, [torch.cat(pair) for pair in zip(changed, barred, strict=True)],
                            np.array(sorted(removed - self.gone), dtype=np.int64), depth)
        late = torch.arange(self.covered, len(vectors), device=device)
        late_scores = users @ vectors[self.covered :].T
        out = []
        for u, ask in enumerate(asks):
            if ask.candidates is not None:
                rows = _rows(ask.candidates, device)
                scores = _products(vectors, rows, users[u])
            else:
                few = torch.cat([found[u].to(device), changed[u][changed[u] < self.covered]])
                rows = torch.cat([few, late])
                scores = torch.cat([_products(vectors, few, users[u]), late_scores[u]])
            for term in applied:
                scores = term.to_some(u, rows, scores)
            scores = scores.masked_fill(torch.isin(rows, torch.cat([barred[u], lost])), -torch.inf)
            out.append(top(scores, rows, ask.k))
        return out

    def _found(self, users: Tensor, asks: Sequence[Ask], apart: Sequence[Tensor], lost: np.ndarray,
               depth: int) -> list[Tensor]:
        """Per request, the index's best rows but for those `apart`; none where there are candidates."""
        open_asks = [u for u, ask in enumerate(asks) if ask.candidates is None]
        out = [torch.zeros(0, dtype=torch.long)] * len(asks)
        if open_asks:
            excluded = [np.concatenate([apart[u].cpu().numpy(), lost]) for u in open_asks]
            queries = users[open_asks].to("cpu", torch.float32).numpy()
            held = self.covered - len(self.gone)  # more would be asked for, and room made for them, in vain
            count = min(max(depth, *(asks[u].k for u in open_asks)), max(1, held))
            rows, _ = self.index.search(queries, count, excluded=excluded)
            for u, own in zip(open_asks, rows, strict=True):
                out[u] = torch.from_numpy(own[(own >= 0) & (own < self.covered)])
        return out


def _rows(rows: Any, device: torch.device) -> Int[Tensor, "n"]:
    return torch.as_tensor(rows).to(device, torch.long)


def _barred(ask: Ask) -> list[Any]:
    """Rows that this request must not be answered with."""
    return ([ask.history] if ask.exclude_seen else []) + ([] if ask.exclude is None else [ask.exclude])


def _products(vectors: Tensor, rows: Tensor, user: Tensor) -> Float[Tensor, "n"]:
    """In bounded memory: candidates may be many."""
    step = max(1, LIMIT_BYTES // (4 * vectors.shape[1]))
    parts = [vectors[part] @ user for part in rows.split(step)]
    return torch.cat(parts) if parts else vectors.new_zeros(0)


def live_rows(items: int, removed: frozenset[int]) -> Int[Tensor, "live"]:
    """Rows of items that can be recommended, ascending."""
    live = torch.ones(items, dtype=torch.bool)
    live[list(removed)] = False
    return live.nonzero()[:, 0]


def attach(index: Index | Path | str, vectors: Float[Tensor, "items d"], removed: frozenset[int]) -> Indexed:
    """An index, or a folder that `build_index` made, for this catalogue. Raises UserError if it is of another one."""
    live = live_rows(len(vectors), removed)
    if isinstance(index, Path | str):
        if index_facts(index).catalogue != catalogue_sha256(vectors, live):
            raise UserError(f"{index} is an index of another model or catalogue; {AGAIN}")
        index = load_index(index, shared=True)
    if index.d != vectors.shape[1]:
        raise UserError(f"the index is for vectors {index.d} wide and the model's are {vectors.shape[1]} wide; {AGAIN}")
    if len(index) != len(live):
        raise UserError(f"the index holds {len(index):,} items and the model {len(live):,}; {AGAIN}")
    _probe(index, vectors, live)
    return Indexed(index, len(vectors), removed)


def _probe(index: Index, vectors: Tensor, live: Tensor) -> None:
    """A few items, evenly spread, must be found by their own vectors under their own rows."""
    if not len(live):
        return
    probes = live[torch.linspace(0, len(live) - 1, min(_PROBES, len(live))).long().unique()]
    own = vectors[probes.to(vectors.device)].to("cpu", torch.float32)
    wanted = (own * own).sum(dim=1).numpy()
    rows, scores = index.search(own.numpy(), len(probes), allowed=probes.numpy())
    near = np.abs(scores - wanted[:, None]) <= (1 - _SAME) * wanted[:, None]
    if not ((rows == probes.numpy()[:, None]) & near).any(axis=1).all():
        raise UserError(f"the index holds other items or vectors than the model; {AGAIN}")
