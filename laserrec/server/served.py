"""One loaded model as it answers: rows and texts of its catalogue, and the answers that are kept.

A server that takes a newer model has two of these for a while: each request is asked of, and answered with, the one
that served when it came.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import polars as pl
import torch
import torch.nn.functional as F

from laserrec.data.extras import VECTOR, extra_names
from laserrec.methods.protocol import Growing, TwoTower
from laserrec.recommender.folder import model_identity
from laserrec.recommender.ranking import Ask, Ranked
from laserrec.recommender.recommender import LaserRecommender
from laserrec.server.cache import AnswerCache
from laserrec.server.listing import Item, Listing, NewItem, item_of
from laserrec.server.settings import Limits
from laserrec.server.state import Kept, State
from laserrec.util.errors import UserError

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Answer:
    """`ranked`, and per item the nearest item of the history with the cosine of the two; nothing of this kind where the
    method has no vectors."""

    ranked: Ranked
    near: tuple[tuple[int, float], ...]


@dataclass(frozen=True)
class Similar:
    """A request for the k items nearest to the one in this row."""

    row: int
    k: int


@dataclass(frozen=True)
class Loader:
    """How the models of one server are opened. device, backbone, trust_remote_code: as in
    `LaserRecommender.from_pretrained`."""

    state_folder: Path
    limits: Limits
    device: str = "auto"
    backbone: Path | str | None = None
    trust_remote_code: bool = False

    def load(self, folder: Path, index: Path | None, name: str) -> Served:
        """A model, an index of it if one is named, and the changes that callers made to the catalogue. Nothing is
        written. Raises UserError for a folder that is no model, an index of another model and a damaged state."""
        state = State(self.state_folder, model_identity(folder))
        model = LaserRecommender.from_pretrained(folder, self.backbone, device=self.device,
                                                 trust_remote_code=self.trust_remote_code)
        model.use_index(index)  # before the changes: it is of the catalogue as it was fitted
        return Served(model, state, self.limits, name, folder, index)


class Served:
    """A model with its listing. `answer` and all that changes the catalogue belong to the worker's thread.

    `kept`: the changes that are on disk, or what becomes of them with this model; `stale`: whether the two differ.
    """

    def __init__(self, model: LaserRecommender, state: State, limits: Limits, name: str, folder: Path,
                 index: Path | None = None):
        self.model, self.state, self.name, self.folder, self.index = model, state, name, folder, index
        names = model.items["item_id"].to_list()
        self.fitted = frozenset(names).difference(model.unknown_items(names))  # rows of removed items stay in the table
        self.kept, self.stale = self._applied(state.read())
        self.listing = Listing(self._live_items())
        self.cache = AnswerCache(limits.cache)

    def _applied(self, kept: Kept) -> tuple[Kept, bool]:
        if gone := [i for i in kept.removed if i in self.fitted]:
            self.model.remove_items(gone)
        # What a newer model was fitted with is no longer an added item, unless it had been removed and added anew.
        fitted_since = self.fitted.difference(gone) & kept.added.keys()
        added = {name: item for name, item in kept.added.items() if name not in fitted_since}
        if added and not isinstance(self.model.model, Growing):
            _log.warning("%d items that were added to an earlier model are left out: method %s can't take new items",
                         len(added), self.model.method)
            return kept.of(added), bool(fitted_since)
        known, other = [], []
        for name, item in added.items():
            (known if self._fits(kept.embeddings.get(name), kept.means.get(name)) else other).append(item)
        if known:
            names = [item["item_id"] for item in known]
            stored = torch.from_numpy(np.stack([kept.embeddings[name] for name in names]))
            means = None if self.model.means is None else torch.from_numpy(np.stack([kept.means[n] for n in names]))
            self.model.add_cleaned(self.frame(known), stored, means)
        if other:  # added to an earlier model
            self.model.add_cleaned(self.frame(other))
        if other or fitted_since:
            return replace(self.kept_of(list(added.values())), removed=kept.removed), True
        return kept, False

    @property
    def counts(self) -> tuple[int, int]:
        """Added and removed items of `kept` in this model's catalogue, which may not be all of them."""
        return (len(self.kept.added) if isinstance(self.model.model, Growing) else 0,
                len(self.fitted.intersection(self.kept.removed)))

    def _fits(self, embedding: np.ndarray | None, means: np.ndarray | None) -> bool:
        own = self.model.means
        return embedding is not None and embedding.shape == self.model.embeddings.shape[1:] \
            and bool(np.isfinite(embedding).all()) \
            and (own is None or (means is not None and means.shape == own.shape[1:]))

    def _live_items(self) -> list[tuple[int, Item]]:
        names = list(Item.__annotations__)
        texts = {row["item_id"]: item_of(row) for row in self.model.items.select(names).iter_rows(named=True)}
        for gone in self.model.unknown_items(list(texts)):  # their rows stay in the model's table
            del texts[gone]
        return self.with_rows(list(texts.values()))

    def with_rows(self, items: Sequence[Item]) -> list[tuple[int, Item]]:
        """Each with its row in the model."""
        rows = self.model.dense_items([item["item_id"] for item in items], "items")
        return list(zip(rows.tolist(), map(item_of, items), strict=True))

    def frame(self, items: Sequence[NewItem]) -> pl.DataFrame:
        """As `LaserRecommender.add_cleaned` takes them: with the columns that the catalogue has."""
        columns = {name: kind for name, kind in self.model.items.schema.items() if name != "item"}
        rows = [{**item_of(item), **item.get("columns", {}), VECTOR: self._vector(item)} for item in items]
        return pl.DataFrame([{name: row.get(name) for name in columns} for row in rows], schema=columns)

    def contents(self, items: Sequence[NewItem]) -> list[tuple]:
        """All that each item says, as the catalogue keeps it."""
        return self.frame(items).rows()

    def contents_in_catalogue(self, items: Sequence[NewItem]) -> list[tuple[str, tuple]]:
        """Ids and `contents`, as the catalogue has them, of those of the items that are in it."""
        rows = {item["item_id"]: self.listing.row(item["item_id"]) for item in items}
        there = {name: row for name, row in rows.items() if row is not None}
        return list(zip(there, self.model.items.drop("item")[list(there.values())].rows(), strict=True))

    def _vector(self, item: NewItem) -> list[float] | None:
        """None where it is not as wide as the catalogue's: the item was added to an earlier model."""
        vector, kind = item.get("vector"), self.model.items.schema.get(VECTOR)
        if vector is None or not isinstance(kind, pl.Array) or len(vector) == kind.shape[0]:
            return vector
        _log.warning("item %r was added with a vector of %d numbers, those of this catalogue have %d; it is left out",
                     item["item_id"], len(vector), kind.shape[0])
        return None

    def check(self, items: Sequence[NewItem]) -> None:
        """Raises UserError for an item with a column, or a vector, that the catalogue does not have or can't hold."""
        kind, names = self.model.items.schema.get(VECTOR), extra_names(self.model.items)
        for item in items:
            where = f"item {item['item_id']!r}"
            if unknown := [name for name in item.get("columns", {}) if name not in names]:
                raise UserError(f"{where}: the catalogue has no column {unknown[0][:80]!r}; its further columns are: "
                                f"{', '.join(names) or 'none'}")
            if (vector := item.get("vector")) is None:
                continue
            if not isinstance(kind, pl.Array):
                raise UserError(f"{where}: the catalogue's items have no vectors of their own; leave vector out")
            if len(vector) != kind.shape[0]:
                raise UserError(f"{where}: its vector has {len(vector)} numbers, those of the catalogue "
                                f"{kind.shape[0]}")
            if np.abs(vector).max() > np.finfo(np.float32).max:
                raise UserError(f"{where}: a number of its vector is too large for 32 bits; scale it as the "
                                "catalogue's are")

    def kept_of(self, items: Sequence[NewItem]) -> Kept:
        """Added items with all that a restart needs of them, so that it does not read their texts again."""
        added = {item["item_id"]: item for item in items}
        if not added or not isinstance(self.model.model, TwoTower):
            return Kept(added=added)
        embeddings, means = self.model.encode_items(list(added)), self.model.means
        if means is None:
            return Kept((), added, dict(zip(added, embeddings, strict=True)))
        rows = torch.from_numpy(self.model.dense_items(list(added), "items"))
        return Kept((), added, dict(zip(added, embeddings, strict=True)),
                    dict(zip(added, means[rows.to(means.device)].cpu().numpy(), strict=True)))

    # -- answers ------------------------------------------------------------------------------------------------

    def ask(self, history: Sequence[str], k: int, exclude_seen: bool, candidates: Sequence[str] | None = None,
            exclude: Sequence[str] = ()) -> tuple[Ask, list[str]]:
        """The request in the model's rows, and the history's unknown ids; unknown ids of `exclude` change nothing.
        Raises UserError if nothing is left of the history, or for an unknown candidate."""
        rows = [self.listing.row(item_id) for item_id in history]
        known = [row for row in rows if row is not None]
        if not known:
            raise UserError("history: none of its items is in the catalogue; add them with POST /v1/items")
        allowed = None if candidates is None else np.array(self._candidates(candidates), dtype=np.int64)
        gone = sorted({row for item_id in exclude if (row := self.listing.row(item_id)) is not None})
        unknown = [item_id for item_id, row in zip(history, rows, strict=True) if row is None]
        hidden = np.array(gone, dtype=np.int64) if gone else None
        return Ask(np.array(known, dtype=np.int64), k, exclude_seen, allowed, hidden), unknown

    def _candidates(self, item_ids: Sequence[str]) -> list[int]:
        rows = {item_id: self.listing.row(item_id) for item_id in item_ids}
        if missing := [item_id for item_id, row in rows.items() if row is None]:
            raise UserError(f"candidates: {len(missing)} unknown item ids, first {missing[:3]}; add them with "
                            "POST /v1/items")
        return [row for row in rows.values() if row is not None]

    def cached(self, ask: Ask) -> Answer | None:
        """The answer to the same request, if it is kept."""
        return self.cache.get(_key(ask))

    def answer(self, asks: Sequence[Ask | Similar]) -> list[Answer | Ranked]:
        """An Answer to each Ask, a Ranked to each Similar."""
        own = [ask for ask in asks if isinstance(ask, Ask)]
        ranked = iter(self.model.rank(own) if own else ())
        return [self.model.nearest(ask.row, ask.k) if isinstance(ask, Similar) else self._explained(ask, next(ranked))
                for ask in asks]

    def _explained(self, ask: Ask, ranked: Ranked) -> Answer:
        answer = Answer(ranked, self._near(ask, ranked))
        self.cache.put(_key(ask), answer)
        return answer

    def _near(self, ask: Ask, ranked: Ranked) -> tuple[tuple[int, float], ...]:
        if not isinstance(self.model.model, TwoTower):
            return ()
        found, history = (F.normalize(self.model.model.items(torch.as_tensor(rows)), dim=-1)
                          for rows in (ranked.items, ask.history))
        values, places = (found @ history.T).max(dim=1)
        return tuple(zip(ask.history[places.cpu().numpy()].tolist(), values.tolist(), strict=True))


def _key(ask: Ask) -> tuple[bytes, int, bool]:
    """The same for the same request. Rows stand in it as a digest: ten thousand candidates would take more memory than
    all else that is kept of an answer."""
    digest = hashlib.blake2b(digest_size=16)
    for rows in (ask.history, ask.candidates, ask.exclude):
        digest.update(b"none" if rows is None else f"{len(rows)}:".encode() + rows.astype(np.int64).tobytes())
    return digest.digest(), ask.k, ask.exclude_seen
