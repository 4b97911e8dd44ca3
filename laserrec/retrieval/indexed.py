"""Ranking through an index: which items, the index says; how high they score, the model's own embeddings.

An index is never changed by its use, so that many processes can share one folder or one server. What it doesn't hold is
scored directly: a history's own items, which may have a learnt offset, items that they pull, items added since, a
request's candidates.
What was removed since is passed over. With an exact index the answers are those without one.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

Pull = object
from laserrec.recommender.ranking import Ask, top
from laserrec.retrieval.index import Index, load_index
from laserrec.util.errors import UserError
from laserrec.util.io import read_json, write_json
from laserrec.util.memory import LIMIT_BYTES

Finish = Callable[[Tensor, Tensor, np.ndarray, "Pull | None"], Tensor]
_PROBES, _SAME = 64, 0.99
"""Items that are looked up when an index is taken, and the least cosine at which a vector passes for the model's own:
an index may keep fewer bits."""
_FILE = "catalogue.json"
_AGAIN = "build it again with laserrec index build"


@dataclass(frozen=True)
class Indexed:
    """An index that fits a model's catalogue as it was when it was taken (`attach`)."""

    index: Index
    covered: int
    """Items 1 to this one are in the index, but for `gone`; later ones were added since."""
    gone: frozenset[int]
    """Removed before."""

    def rank(
        self, users: Float[Tensor, "batch d_out"], asks: Sequence[Ask], embeddings: Float[Tensor, "n_items d_out"],
        removed: frozenset[int], pull: Callable[[np.ndarray], Pull | None], finish: Finish
    ) -> list[tuple[Int[Tensor, "found"], Float[Tensor, "found"]]]:
        """Items and scores of each request, best first. users, embeddings: of unit length. pull: the items
        that a history's items pull (`Laser.pull`); finish: cosines of some items -> scores (`Laser.finish_some`)."""
        found = self._found(users, asks, removed - self.gone)
        late = torch.arange(self.covered + 1, len(embeddings) + 1)
        late_scores = users @ embeddings[self.covered :].T
        lost = torch.tensor(sorted(removed), dtype=torch.long)
        out = []
        for row, ask in enumerate(asks):
            history = torch.as_tensor(np.unique(ask.history)).long()
            pulled = pull(ask.history)
            if ask.candidates is not None:
                items = torch.as_tensor(ask.candidates).long()
                scores = _products(embeddings, items, users[row])
            else:
                own = history if pulled is None else torch.cat([history, pulled[0]])
                few = torch.unique(torch.cat([found[row], own[own <= self.covered]]))
                items = torch.cat([few, late])
                scores = torch.cat([_products(embeddings, few, users[row]), late_scores[row]])
            finish(scores, items, ask.history, pulled)
            if ask.exclude_seen:
                scores[torch.isin(items, history)] = -torch.inf
            scores[torch.isin(items, lost)] = -torch.inf
            out.append(top(scores, items, ask.k))
        return out

    def _found(self, users: Tensor, asks: Sequence[Ask], removed: frozenset[int]) -> list[Tensor]:
        """Per request, the index's best items that are neither removed nor in the history; none for candidates."""
        rows = [row for row, ask in enumerate(asks) if ask.candidates is None]
        out = [torch.zeros(0, dtype=torch.long)] * len(asks)
        if rows:
            excluded = [removed.union(asks[row].history.tolist()) for row in rows]
            ids, _ = self.index.search(users[rows].numpy(), max(asks[row].k for row in rows), excluded=excluded)
            for row, own in zip(rows, ids, strict=True):
                out[row] = torch.as_tensor(own[own > 0])
        return out


def _products(embeddings: Tensor, items: Tensor, user: Tensor) -> Float[Tensor, "items"]:
    """In bounded memory: candidates may be many."""
    step = max(1, LIMIT_BYTES // (4 * embeddings.shape[1]))
    parts = [embeddings[part - 1] @ user for part in items.split(step)]
    return torch.cat(parts) if parts else embeddings.new_zeros(0)


def live_items(n_items: int, removed: frozenset[int]) -> Int[np.ndarray, "live"]:
    """Dense items that can be recommended, ascending."""
    return np.setdiff1d(np.arange(1, n_items + 1), np.fromiter(removed, dtype=np.int64, count=len(removed)))


def attach(index: Index | Path | str, embeddings: Float[Tensor, "n_items d_out"], removed: frozenset[int]) -> Indexed:
    """An index, or a folder that `build_index` made, for this catalogue. Raises UserError if it is of another one."""
    if isinstance(index, Path | str):
        folder = Path(index)
        if not (folder / _FILE).is_file():
            raise UserError(f"{folder} is not a finished index; make one with laserrec index build")
        note = read_json(folder / _FILE, _AGAIN)
        if note.get("sha256") != _sha256(embeddings, removed):
            raise UserError(f"{folder} is an index of another model or catalogue; {_AGAIN}")
        index = load_index(folder, shared=True)
    width = embeddings.shape[1]
    if index.d != width:
        raise UserError(f"the index is for vectors {index.d} wide and the model's are {width} wide; {_AGAIN}")
    live = live_items(len(embeddings), removed)
    if len(index) != len(live):
        raise UserError(f"the index holds {len(index):,} items and the model {len(live):,}; {_AGAIN}")
    _probe(index, embeddings, live)
    return Indexed(index, len(embeddings), removed)


def _probe(index: Index, embeddings: Tensor, live: np.ndarray) -> None:
    """A few items, evenly spread, must be found by their own vectors under their own numbers."""
    if not len(live):
        return
    probes = live[np.unique(np.linspace(0, len(live) - 1, min(_PROBES, len(live))).astype(int))]
    vectors = embeddings[torch.as_tensor(probes) - 1].numpy()
    ids, scores = index.search(vectors, len(probes), allowed=probes.tolist())
    if not ((ids == probes[:, None]) & (scores > _SAME)).any(axis=1).all():
        raise UserError(f"the index holds other items or vectors than the model; {_AGAIN}")


def note_catalogue(folder: Path, embeddings: Float[Tensor, "n_items d_out"], removed: frozenset[int]) -> None:
    """Say in an index's folder which catalogue it is of; comes last, so that a folder with it is complete."""
    write_json(folder / _FILE, {"items": len(embeddings) - len(removed), "sha256": _sha256(embeddings, removed)})


def _sha256(embeddings: Tensor, removed: frozenset[int]) -> str:
    digest = hashlib.sha256(f"{tuple(embeddings.shape)} {sorted(removed)}".encode())
    for part in embeddings.split(100_000):
        digest.update(np.ascontiguousarray(part.float().numpy()))
    return digest.hexdigest()
