"""The model behind the server, and the changes of its catalogue, without HTTP.

Everything that touches the model runs in the worker's one thread. A change of the catalogue is made in small steps
between requests, and is on disk before it is acknowledged. A newer model is loaded beside the one that serves, and
takes its place between two batches.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Generator, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import wait as wait_for_futures
from dataclasses import replace
from pathlib import Path
from typing import Any

from laserrec.recommender.folder import model_identity
from laserrec.recommender.ranking import Ask, Ranked
from laserrec.recommender.recommender import LaserRecommender
from laserrec.server.changes import Change, Changes
from laserrec.server.listing import Item, Listing, NewItem
from laserrec.server.served import Answer, Loader, Served, Similar
from laserrec.server.settings import Limits
from laserrec.server.state import Kept
from laserrec.server.worker import Worker
from laserrec.util.errors import UserError
from laserrec.util.io import check_folder, locked

_SLICE_SECONDS = 0.05
"""How long new items are encoded before requests have their turn again."""
_FEWEST = 8
"""Items that are encoded together even so, since in a large catalogue one takes as long as several."""
_log = logging.getLogger(__name__)


class ConflictError(Exception):
    """An item of this id is in the catalogue with other texts or another vector."""


class StorageError(Exception):
    """A change could not be written; nothing was changed."""


class Service:
    """Model folders, one at a time, served. Use `opened`. Thread-safe but for the constructor."""

    def __init__(self, loader: Loader, served: Served):
        self.limits, self.served, self._loader = loader.limits, served, loader
        self.changes = Changes(self.limits.max_changes)
        self.worker = Worker(self._answer, self.limits)
        self._reloads = 0
        """Reloads of the folder that serves which have begun to read it."""
        # One thread each: searches must not crowd out the model, and files are written one after another.
        self._searching, self._writing, self._loading = (ThreadPoolExecutor(1) for _ in range(3))

    @classmethod
    @contextlib.contextmanager
    def opened(cls, folder: Path, state_folder: Path, limits: Limits, index: Path | None = None,
               name: str | None = None, device: str = "auto", backbone: Path | str | None = None,
               trust_remote_code: bool = False) -> Iterator[Service]:
        """Load the model as `Loader.load` does, and start the worker; at the end, answer what is queued. name: what
        callers are told, else the folder's. Raises UserError as `Loader.load`, and for a state folder in use."""
        model_identity(folder)  # what is no model is told before anything is made
        check_folder(state_folder)
        with locked(state_folder, "a server"):  # before the model, which takes long to load
            loader = Loader(state_folder, limits, device, backbone, trust_remote_code)
            # No name here for what is served: it would keep the first model for as long as the server runs.
            service = cls(loader, _written(loader.load(folder, index, name or folder.name)))
            service.worker.start()
            try:
                yield service
            finally:
                service.worker.close(limits.timeout_seconds)
                for pool in (service._searching, service._loading):
                    pool.shutdown(cancel_futures=True)
                service._writing.shutdown()

    @property
    def model(self) -> LaserRecommender:
        """That serves now."""
        return self.served.model

    @property
    def listing(self) -> Listing:
        """Of the model that serves now."""
        return self.served.listing

    @property
    def kept(self) -> Kept:
        """The changes of the catalogue that are on disk."""
        return self.served.kept

    # -- answers ------------------------------------------------------------------------------------------------

    def submit(self, served: Served, ask: Ask | Similar) -> Future[Any]:
        """Queue a request in the rows of `served`; the future holds an Answer, or for Similar a Ranked. Raises
        OverloadedError or ClosedError."""
        return self.worker.submit((served, ask))

    def _answer(self, asked: list[tuple[Served, Ask | Similar]]) -> list[Answer | Ranked]:
        models = dict.fromkeys(served for served, _ in asked)  # one, but where a newer one has just taken its place
        answers = {served: iter(served.answer([ask for own, ask in asked if own is served])) for served in models}
        return [next(answers[served]) for served, _ in asked]

    async def search(self, query: str, limit: int, offset: int) -> tuple[Sequence[Item], int]:
        """As `Listing.search`, in a thread of its own. Raises TimeoutError."""
        return await wait(self._searching.submit(self.listing.search, query, limit, offset),
                          self.limits.timeout_seconds)

    # -- another model ------------------------------------------------------------------------------------------

    def swap(self, folder: Path | None = None, index: Path | None = None) -> Change:
        """Load a model folder and serve it from then on; None: the one that serves by then, anew, with its index unless
        another one is named. Requests that came before are answered by the model that served then, which goes on
        serving where the change's future has an error: UserError as `Loader.load`. Items that callers added and removed
        stay so. Raises OverloadedError."""
        # What has been read may have been replaced since, so that a further reload is one of its own.
        asked = ["reload", self._reloads] if folder is None else ["model", str(folder)]
        return self.changes.begin([*asked, str(index)], 1, lambda change: self.worker.change(
            self._swapping(change, folder, index)))

    def _swapping(self, change: Change, folder: Path | None, index: Path | None) -> Generator[None, None, int]:
        """No other change runs meanwhile, so that what the newer model finds on disk is what the older one has."""
        name = self.served.name if folder is None else folder.name
        if folder is None:
            self._reloads += 1
            folder, index = self.served.folder, index or self.served.index
        loading = self._loading.submit(self._loaded, folder, index, name)
        while not wait_for_futures([loading], 0.001).done:
            yield
        self.served = loading.result()
        change.done = 1
        _log.info("serving %s, %d items", folder, len(self.listing))
        return 1

    def _loaded(self, folder: Path, index: Path | None, name: str) -> Served:
        """Not written yet where it is stale: should the server start with the older model again, its items are there.
        The next change writes it."""
        served = self._loader.load(folder, index, name)
        for item in served.listing.search("", 1, 0)[0]:  # it answers
            served.model.rank([served.ask([item["item_id"]], 1, exclude_seen=False)[0]])
        return served

    # -- changes ------------------------------------------------------------------------------------------------

    def add(self, items: Sequence[NewItem]) -> Change:
        """Encode, list and keep new items. What is there already just so is left out, so that a request
        can be repeated. Raises OverloadedError, and UserError for columns and vectors that the catalogue does not have;
        the change's future ConflictError for an id of other content, UserError for items that the model refuses,
        StorageError."""
        self.served.check(items)
        return self.changes.begin(["add", items], len(items),
                                  lambda change: self.worker.change(self._adding(change, items)))

    def remove(self, item_id: str) -> Change:
        """Take one item out of the catalogue. Raises OverloadedError; the change's future
        StorageError."""
        return self.changes.begin(["remove", item_id], 1,
                                  lambda change: self.worker.change(self._removing(change, item_id)))

    def _adding(self, change: Change, items: Sequence[NewItem]) -> Generator[None, None, int]:
        served, new = self.served, self._new(items)
        change.done = len(items) - len(new)
        at, size = 0, 1
        try:
            while at < len(new):
                part, start = new[at : at + size], time.monotonic()
                at += len(part)
                served.model.add_cleaned(served.frame(part))
                served.listing.add(served.with_rows(part))
                served.cache.clear()
                change.done += len(part)
                size = min(2 * size, max(_FEWEST, round(len(part) * _SLICE_SECONDS / (time.monotonic() - start))))
                yield
            if new:
                yield from self._keep(served.kept.with_more(served.kept_of(new)))
        except BaseException:  # the server's end too
            names = [item["item_id"] for item in new]
            missing = set(served.model.unknown_items(names))
            self._take_out([name for name in names if name not in missing])
            raise
        return len(new)

    def _new(self, items: Sequence[NewItem]) -> list[NewItem]:
        new: dict[str, NewItem] = {}
        contents = dict(self.served.contents_in_catalogue(items))
        for item, content in zip(items, self.served.contents(items), strict=True):
            name = item["item_id"]
            if name not in contents:
                new[name], contents[name] = item, content
            elif contents[name] != content:
                raise ConflictError(f"item {name!r} has other texts or another vector "
                                    + ("elsewhere in this request" if name in new else "in the catalogue; remove it "
                                       "first: DELETE /v1/items/{id}") + "; nothing was added")
        return list(new.values())

    def _removing(self, change: Change, item_id: str) -> Generator[None, None, int]:
        if self.listing.row(item_id) is None:
            return 0
        kept = self.kept
        removed = kept.removed
        if item_id in self.served.fitted and item_id not in kept.added:
            removed = (*removed, item_id)
        yield from self._keep(replace(kept.of(kept.added.keys() - {item_id}), removed=removed))
        self._take_out([item_id])
        change.done = 1
        return 1

    def _keep(self, kept: Kept) -> Generator[None, None, None]:
        """Write it while requests go on."""
        writing = self._writing.submit(self.served.state.write, kept)
        while not wait_for_futures([writing], 0.005).done:
            yield
        try:
            writing.result()
        except (OSError, UserError) as error:  # what the disk refuses is mostly the latter (util.io.disk_errors)
            _log.error("a change of the catalogue could not be written: %s", error)
            cause = error.__cause__ if isinstance(error, UserError) else error
            why = getattr(cause, "strerror", None) or "the server's log has it"  # no path of the server's machine
            raise StorageError(f"the change could not be written ({why}); nothing was changed") from None
        self.served.kept = kept

    def _take_out(self, item_ids: list[str]) -> None:
        if item_ids:
            self.model.remove_items(item_ids)
            self.listing.remove(item_ids)
            self.served.cache.clear()


def _written(served: Served) -> Served:
    """With its changes on disk."""
    if served.stale:
        served.state.write(served.kept)
    return served


async def wait(future: Future, timeout_seconds: float) -> Any:
    """Await a future of another thread; TimeoutError after `timeout_seconds`. A request that has not begun by then is
    not answered any more; a change of the catalogue goes on."""
    return await asyncio.wait_for(asyncio.wrap_future(future), timeout_seconds)
