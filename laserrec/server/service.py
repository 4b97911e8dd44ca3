"""The model behind the server: answers, the catalogue and its changes, without HTTP.

Everything that touches the model runs in the worker's one thread; a change of the catalogue is on disk before it is
acknowledged.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import torch

from laserrec.data.raw import ITEM_SCHEMA
from laserrec.recommender.ranking import Ask, Ranked
from laserrec.recommender.recommender import LaserRecommender
from laserrec.server.cache import AnswerCache
from laserrec.server.listing import Item, Listing
from laserrec.server.settings import Limits
from laserrec.server.state import Changes, State, model_sha256
from laserrec.server.worker import OverloadedError, Worker
from laserrec.util.errors import UserError


@dataclass(frozen=True)
class Answer:
    """`ranked`, and (explained) per item the nearest item of the history with their cosine."""

    ranked: Ranked
    near: tuple[tuple[int, float], ...]


class Service:
    """One model folder, served. Use `opened`. Thread-safe but for the constructor."""

    def __init__(self, model: LaserRecommender, state: State, limits: Limits, name: str):
        self.model, self.name, self.limits = model, name, limits
        self._state = state
        self._fitted = set(model.items["item_id"].to_list())
        self._changes = state.read()
        self._apply_changes()
        texts = model.items.select(list(ITEM_SCHEMA)).to_dicts()
        live = [(dense, Item(**row)) for dense, row in enumerate(texts, 1) if dense not in model.removed]
        self.listing = Listing(live)
        self.cache = AnswerCache(limits.cache)
        self.batch_sizes: list[int] = []
        """Of batches since the metrics were last read."""
        self.worker = Worker(self._answer, limits.max_batch, limits.max_wait, limits.max_queue, self.batch_sizes.append)
        self._changing = 0

    @classmethod
    @contextlib.contextmanager
    def opened(cls, folder: Path, state_folder: Path, limits: Limits, index: Path | None = None,
               name: str | None = None) -> Iterator[Service]:
        """Load the model, an index of it if one is named, and the changes that were made to its catalogue, and start
        the worker; at the end, finish what is queued. name: what callers are told, else the folder's. Raises UserError
        for a folder that is no model, an index of another model, a damaged state or one in use."""
        state = State(state_folder, model_sha256(folder) if (folder / "model.json").is_file() else "")
        model = LaserRecommender.from_pretrained(folder)
        model.use_index(index)  # before the changes: it is of the catalogue as it was fitted
        with state.held():
            service = cls(model, state, limits, name or folder.name)
            service.worker.start()
            try:
                yield service
            finally:
                service.worker.close()

    def _apply_changes(self) -> None:
        gone = [i for i in self._changes.removed if i in self._fitted]
        if gone:
            self.model.remove_items(gone)
        known, other = [], []
        for name, item in self._changes.added.items():
            (known if name in self._changes.embeddings else other).append(item)
        if known:
            stored = np.stack([self._changes.embeddings[item["item_id"]] for item in known])
            self.model.add_items(_frame(known), torch.from_numpy(stored))
        if other:  # added to an earlier model
            self.model.add_items(_frame(other))
            self._changes = replace(self._changes, embeddings=self._embeddings(self._changes.added))
            self._state.write(self._changes)

    # -- answers ------------------------------------------------------------------------------------------------

    def ask(self, history: Sequence[str], k: int, exclude_seen: bool, candidates: Sequence[str] | None
            ) -> tuple[Ask, list[str]]:
        """The request in dense items, and the history's unknown ids. Raises UserError if nothing is left of the
        history, or for an unknown candidate."""
        unknown = self.model.unknown_items(history)
        gone = set(unknown)
        rows = [self.model.dense_items([i], "history")[0] for i in history if i not in gone]
        if not rows:
            raise UserError("history: none of its items is in the catalogue; add them with POST /v1/items")
        allowed = None if candidates is None else self.model.dense_items(candidates, "candidates")
        return Ask(np.array(rows, dtype=np.int32), k, exclude_seen, allowed), unknown

    def submit(self, ask: Ask) -> Future[Answer]:
        """Queue it. Raises OverloadedError or ClosedError."""
        return self.worker.submit(ask)

    def cached(self, ask: Ask) -> Answer | None:
        return self.cache.get(_key(ask))

    def _answer(self, asks: list[Ask]) -> list[Answer]:
        answers = [Answer(r, self._near(a, r)) for a, r in zip(asks, self.model.rank(asks), strict=True)]
        for ask, answer in zip(asks, answers, strict=True):
            self.cache.put(_key(ask), answer)
        return answers

    def _near(self, ask: Ask, ranked: Ranked) -> tuple[tuple[int, float], ...]:
        items = self.model.embeddings
        found, history = torch.as_tensor(ranked.items).long() - 1, torch.as_tensor(ask.history).long() - 1
        if not len(found):
            return ()
        values, places = (items[found] @ items[history].T).max(dim=1)
        return tuple(zip(ask.history[places.numpy()].tolist(), values.tolist(), strict=True))

    def similar(self, item_id: str, k: int) -> Future[Ranked]:
        """The items nearest to one. Raises UserError for an unknown id."""
        dense = int(self.model.dense_items([item_id], "item")[0])
        return self.worker.call(lambda: self.model.nearest(dense, k))

    # -- changes ------------------------------------------------------------------------------------------------

    def add(self, items: Sequence[Item]) -> Future[int]:
        """Encode and list new items. Raises OverloadedError; the future a UserError for ids that are there."""

        def work() -> int:
            first = len(self.model.embeddings) + 1
            count = self.model.add_items(_frame(items))
            added = {**self._changes.added, **{item["item_id"]: item for item in items}}
            try:
                self._write(replace(self._changes, added=added, embeddings=self._embeddings(added)))
            except BaseException:
                self.model.remove_items([item["item_id"] for item in items])
                raise
            self.listing.add((first + i, item) for i, item in enumerate(items))
            return count

        return self._change(work)

    def remove(self, item_id: str) -> Future[int]:
        """Take one item out of the catalogue. Raises OverloadedError; the future a UserError for an unknown id."""

        def work() -> int:
            dense = self.model.dense_items([item_id], "item").tolist()
            added = {name: item for name, item in self._changes.added.items() if name != item_id}
            removed = self._changes.removed
            if item_id in self._fitted and item_id not in self._changes.added:
                removed = (*removed, item_id)
            self._write(Changes(removed, added, {n: self._changes.embeddings[n] for n in added}))
            self.model.remove_items([item_id])
            self.listing.remove(dense)
            return 1

        return self._change(work)

    def _change(self, work: Any) -> Future[int]:
        if self._changing >= self.limits.max_changes:
            raise OverloadedError(5)

        def counted() -> int:
            try:
                return work()
            finally:
                self._changing -= 1
                self.cache.clear()

        self._changing += 1
        try:
            return self.worker.call(counted)
        except BaseException:
            self._changing -= 1
            raise

    def _write(self, changes: Changes) -> None:
        self._state.write(changes)
        self._changes = changes

    def _embeddings(self, added: dict[str, Item]) -> dict[str, np.ndarray]:
        names = list(added)
        return dict(zip(names, self.model.encode_items(names), strict=True)) if names else {}

    @property
    def changes(self) -> Changes:
        return self._changes


async def wait(future: Future, timeout: float) -> Any:
    """Await a worker's future; TimeoutError after `timeout` seconds. What has not begun by then is not done."""
    return await asyncio.wait_for(asyncio.wrap_future(future), timeout)


def _key(ask: Ask) -> tuple:
    allowed = None if ask.candidates is None else ask.candidates.tobytes()
    return ask.history.tobytes(), ask.k, ask.exclude_seen, allowed


def _frame(items: Sequence[Item]) -> pl.DataFrame:
    return pl.DataFrame(list(items), schema=dict.fromkeys(Item.__annotations__, pl.String))
