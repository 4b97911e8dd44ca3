"""The model behind the server: answers, the catalogue and its changes, without HTTP.

Everything that touches the model runs in the worker's one thread. A change of the catalogue is made in small steps
between requests, and is on disk before it is acknowledged.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Generator, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import wait as wait_for_futures
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import torch
import torch.nn.functional as F

from laserrec.methods.protocol import Growing, TwoTower
from laserrec.recommender.folder import model_identity
from laserrec.recommender.ranking import Ask, Ranked
from laserrec.recommender.recommender import LaserRecommender
from laserrec.server.cache import AnswerCache
from laserrec.server.changes import Change, Changes
from laserrec.server.listing import Item, Listing, item_of
from laserrec.server.settings import Limits
from laserrec.server.state import Kept, State
from laserrec.server.worker import Worker
from laserrec.util.errors import UserError
from laserrec.util.io import check_folder, locked

_SLICE_SECONDS = 0.05
"""How long new items are encoded before requests have their turn again."""
_log = logging.getLogger(__name__)


class ConflictError(Exception):
    """An item of this id is in the catalogue with other texts."""


class StorageError(Exception):
    """A change could not be written; nothing was changed."""


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


class Service:
    """One model folder, served. Use `opened`. Thread-safe but for the constructor."""

    def __init__(self, model: LaserRecommender, state: State, limits: Limits, name: str):
        self.model, self.name, self.limits = model, name, limits
        self._state = state
        self._fitted = frozenset(model.items["item_id"].to_list())
        self._kept = state.read()
        self._apply_kept()
        self.listing = Listing(self._live_items())
        self.cache = AnswerCache(limits.cache)
        self.changes = Changes(limits.max_changes)
        self.worker = Worker(self._answer, limits)
        # One thread each: searches must not crowd out the model, and files are written one after another.
        self._searching, self._writing = ThreadPoolExecutor(1), ThreadPoolExecutor(1)

    @classmethod
    @contextlib.contextmanager
    def opened(cls, folder: Path, state_folder: Path, limits: Limits, index: Path | None = None,
               name: str | None = None, device: str = "auto", backbone: Path | str | None = None,
               trust_remote_code: bool = False) -> Iterator[Service]:
        """Load the model, an index of it if one is named, and the changes that were made to its catalogue, and start
        the worker; at the end, answer what is queued. name: what callers are told, else the folder's. device,
        backbone, trust_remote_code: as in `LaserRecommender.from_pretrained`. Raises UserError for a folder that is no
        model, an index of another model, a damaged state or one in use."""
        state = State(state_folder, model_identity(folder))
        check_folder(state_folder)
        with locked(state_folder, "a server"):  # before the model, which takes long to load
            model = LaserRecommender.from_pretrained(folder, backbone, device=device,
                                                     trust_remote_code=trust_remote_code)
            model.use_index(index)  # before the changes: it is of the catalogue as it was fitted
            service = cls(model, state, limits, name or folder.name)
            service.worker.start()
            try:
                yield service
            finally:
                service.worker.close(limits.timeout_seconds)
                service._searching.shutdown(cancel_futures=True)
                service._writing.shutdown()

    def _apply_kept(self) -> None:
        if gone := [i for i in self._kept.removed if i in self._fitted]:
            self.model.remove_items(gone)
        # What a newer model was fitted with is no longer an added item, unless it had been removed and added anew.
        stale = self._fitted.difference(gone) & self._kept.added.keys()
        added = {name: item for name, item in self._kept.added.items() if name not in stale}
        if added and not isinstance(self.model.model, Growing):
            _log.warning("%d items that were added to an earlier model are left out: method %s can't take new items",
                         len(added), self.model.method)
            return
        known, other = [], []
        for name, item in added.items():
            (known if self._fits(self._kept.embeddings.get(name)) else other).append(item)
        if known:
            stored = np.stack([self._kept.embeddings[item["item_id"]] for item in known])
            self.model.add_items(_frame(known), torch.from_numpy(stored))
        if other:  # added to an earlier model
            self.model.add_items(_frame(other))
        if other or stale:
            self._kept = replace(self._kept, added=added, embeddings=self._embeddings(list(added)))
            self._state.write(self._kept)

    def _fits(self, embedding: np.ndarray | None) -> bool:
        return embedding is not None and embedding.shape == self.model.embeddings.shape[1:] \
            and bool(np.isfinite(embedding).all())

    def _live_items(self) -> list[tuple[int, Item]]:
        names = list(Item.__annotations__)
        texts = {row["item_id"]: item_of(row) for row in self.model.items.select(names).iter_rows(named=True)}
        for gone in self.model.unknown_items(list(texts)):  # their rows stay in the model's table
            del texts[gone]
        return self._with_rows(list(texts.values()))

    def _with_rows(self, items: Sequence[Item]) -> list[tuple[int, Item]]:
        rows = self.model.dense_items([item["item_id"] for item in items], "items")
        return list(zip(rows.tolist(), items, strict=True))

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

    def submit(self, ask: Ask | Similar) -> Future[Any]:
        """Queue it; the future holds an Answer, or for Similar a Ranked. Raises OverloadedError or ClosedError."""
        return self.worker.submit(ask)

    def cached(self, ask: Ask) -> Answer | None:
        return self.cache.get(_key(ask))

    def _answer(self, payloads: list[Ask | Similar]) -> list[Answer | Ranked]:
        asks = [p for p in payloads if isinstance(p, Ask)]
        ranked = iter(self.model.rank(asks) if asks else ())
        return [self.model.nearest(p.row, p.k) if isinstance(p, Similar) else self._explained(p, next(ranked))
                for p in payloads]

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

    async def search(self, query: str, limit: int, offset: int) -> tuple[Sequence[Item], int]:
        """As `Listing.search`, in a thread of its own. Raises TimeoutError."""
        return await wait(self._searching.submit(self.listing.search, query, limit, offset),
                          self.limits.timeout_seconds)

    # -- changes ------------------------------------------------------------------------------------------------

    def add(self, items: Sequence[Item]) -> Change:
        """Encode, list and keep new items. What is there already with the same texts is left out, so that a request
        can be repeated. Raises OverloadedError; the change's future ConflictError for an id of other texts, UserError
        for items that the model refuses, StorageError."""
        return self.changes.begin(["add", items], len(items),
                                  lambda change: self.worker.change(self._adding(change, items)))

    def remove(self, item_id: str) -> Change:
        """Take one item out of the catalogue. Raises OverloadedError; the change's future
        StorageError."""
        return self.changes.begin(["remove", item_id], 1,
                                  lambda change: self.worker.change(self._removing(change, item_id)))

    def _adding(self, change: Change, items: Sequence[Item]) -> Generator[None, None, int]:
        new = self._new(items)
        change.done = len(items) - len(new)
        at, size = 0, 1
        try:
            while at < len(new):
                part, start = new[at : at + size], time.monotonic()
                at += len(part)
                self.model.add_items(_frame(part))
                self.listing.add(self._with_rows(part))
                self.cache.clear()
                change.done += len(part)
                size = max(1, min(2 * size, round(len(part) * _SLICE_SECONDS / (time.monotonic() - start))))
                yield
            if new:
                names = [item["item_id"] for item in new]
                yield from self._keep(replace(
                    self._kept, added={**self._kept.added, **dict(zip(names, new, strict=True))},
                    embeddings={**self._kept.embeddings, **self._embeddings(names)}))
        except BaseException:  # the server's end too
            names = [item["item_id"] for item in new]
            missing = set(self.model.unknown_items(names))
            self._take_out([name for name in names if name not in missing])
            raise
        return len(new)

    def _new(self, items: Sequence[Item]) -> list[Item]:
        new: dict[str, Item] = {}
        for item in items:
            row = self.listing.row(item["item_id"])
            there = new.get(item["item_id"]) if row is None else self.listing[row]
            if there is None:
                new[item["item_id"]] = item
            elif there != item:
                raise ConflictError(f"item {item['item_id']!r} has other texts "
                                    + ("elsewhere in this request" if row is None else "in the catalogue; remove it "
                                       "first: DELETE /v1/items/{id}") + "; nothing was added")
        return list(new.values())

    def _removing(self, change: Change, item_id: str) -> Generator[None, None, int]:
        if self.listing.row(item_id) is None:
            return 0
        added = {name: item for name, item in self._kept.added.items() if name != item_id}
        removed = self._kept.removed
        if item_id in self._fitted and item_id not in self._kept.added:
            removed = (*removed, item_id)
        yield from self._keep(Kept(removed, added, {n: v for n, v in self._kept.embeddings.items() if n in added}))
        self._take_out([item_id])
        change.done = 1
        return 1

    def _keep(self, kept: Kept) -> Generator[None, None, None]:
        """Write it while requests go on."""
        writing = self._writing.submit(self._state.write, kept)
        while not wait_for_futures([writing], 0.005).done:
            yield
        try:
            writing.result()
        except OSError as error:
            _log.error("a change of the catalogue could not be written: %s", error)
            raise StorageError(f"the change could not be written ({error.strerror}); nothing was changed") from None
        self._kept = kept

    def _take_out(self, item_ids: list[str]) -> None:
        if item_ids:
            self.model.remove_items(item_ids)
            self.listing.remove(item_ids)
            self.cache.clear()

    def _embeddings(self, names: list[str]) -> dict[str, np.ndarray]:
        """To keep them, so that a restart does not read the texts again."""
        if not names or not isinstance(self.model.model, TwoTower):
            return {}
        return dict(zip(names, self.model.encode_items(names), strict=True))

    @property
    def kept(self) -> Kept:
        """The changes that are on disk."""
        return self._kept


async def wait(future: Future, timeout_seconds: float) -> Any:
    """Await a future of another thread; TimeoutError after `timeout_seconds`. A request that has not begun by then is
    not answered any more; a change of the catalogue goes on."""
    return await asyncio.wait_for(asyncio.wrap_future(future), timeout_seconds)


def _key(ask: Ask) -> tuple:
    rows = (None if rows is None else tuple(rows.tolist()) for rows in (ask.history, ask.candidates, ask.exclude))
    return *rows, ask.k, ask.exclude_seen


def _frame(items: Sequence[Item]) -> pl.DataFrame:
    return pl.DataFrame(list(items), schema=dict.fromkeys(Item.__annotations__, pl.String))
