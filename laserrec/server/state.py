"""What the server's callers changed in the catalogue, in one file beside the model, which stays as it was fitted.

  items.parquet  a row per added or removed item: item_id, title, brand, category, removed, embedding, model
  lock           held by the running server

The file is written to a temporary name and renamed, so that a killed server leaves the state before or after a change.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import polars as pl

from laserrec.server.listing import Item
from laserrec.util.errors import UserError
from laserrec.util.io import write_parquet

_SCHEMA = {"item_id": pl.String, "title": pl.String, "brand": pl.String, "category": pl.String, "removed": pl.Boolean,
           "embedding": pl.List(pl.Float32), "model": pl.String}


@dataclass(frozen=True)
class Kept:
    """Removed first, then added: an id may be in both."""

    removed: tuple[str, ...] = ()
    """Ids of the fitted catalogue."""
    added: dict[str, Item] = field(default_factory=dict)
    embeddings: dict[str, np.ndarray] = field(default_factory=dict)
    """Float32[d_out] of the added items; empty where another model made them."""


def model_sha256(folder: Path) -> str:
    """Tells one fitted model from another."""
    try:
        with open(folder / "adapter.safetensors", "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except FileNotFoundError:
        raise UserError(f"no such file: {folder / 'adapter.safetensors'}; the model folder is not whole") from None


class State:
    """The state folder of one server. Parameters: `model`: the model's sha256 (`model_sha256`)."""

    def __init__(self, folder: Path, model: str):
        self.file, self._folder, self._model = folder / "items.parquet", folder, model

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """Hold the folder's lock. Raises UserError if another server has it, or if the folder can't be written."""
        from filelock import FileLock, Timeout

        lock = FileLock(self._folder / "lock", thread_local=False)
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            lock.acquire(blocking=False)
        except Timeout:
            raise UserError(f"{self._folder} is in use by another server; end that one, or give --state another folder"
                            ) from None
        except OSError as error:
            raise UserError(f"{self._folder} can't be written: {error.strerror}; give --state another folder") from None
        try:
            yield
        finally:
            lock.release()

    def read(self) -> Kept:
        """Nothing if there is no file. Raises UserError for a damaged one."""
        if not self.file.is_file():
            return Kept()
        try:
            frame = pl.read_parquet(self.file).select(list(_SCHEMA)).cast(_SCHEMA)
        except (pl.exceptions.PolarsError, OSError) as error:
            raise UserError(f"{self.file} is damaged: {str(error).splitlines()[0]}; restore it, or move it away to "
                            "serve the catalogue as it was fitted") from None
        rows = frame.filter(~pl.col("removed")).to_dicts()
        return Kept(
            tuple(frame.filter("removed")["item_id"]),
            {row["item_id"]: Item(**{name: row[name] for name in Item.__annotations__}) for row in rows},
            {row["item_id"]: np.array(row["embedding"], dtype=np.float32) for row in rows
             if row["model"] == self._model and row["embedding"] is not None})

    def write(self, kept: Kept) -> None:
        """All of it, or (on any error) nothing."""
        rows = [{"item_id": name, "removed": True} for name in kept.removed]
        rows += [{**item, "removed": False, "embedding": kept.embeddings[name], "model": self._model}
                 for name, item in kept.added.items()]
        write_parquet(self.file, pl.DataFrame(rows, schema=_SCHEMA))
