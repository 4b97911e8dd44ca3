"""What the server's callers changed in the catalogue, in one file beside the model, which stays as it was fitted.

  items.parquet  a row per added or removed item: item_id, title, brand, category, removed, embedding, means (what
                 the LLM made of its text, where the model keeps that), model (which made the two), more (JSON of
                 further columns and a vector, if it has any); the file's metadata hold a sha256 of the rows, so that
                 damage on the disk is noticed

The file is written to a temporary name and renamed, so that a killed server leaves the state before or after a change.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
from collections.abc import Collection
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import polars as pl
from pydantic import TypeAdapter, ValidationError

from laserrec.server.listing import More, NewItem, item_of
from laserrec.util.errors import UserError
from laserrec.util.io import parquet_bytes, write_bytes

_SCHEMA = pl.Schema({
    "item_id": pl.String(), "title": pl.String(), "brand": pl.String(), "category": pl.String(),
    "removed": pl.Boolean(), "embedding": pl.List(pl.Float32), "means": pl.List(pl.Float32), "model": pl.String(),
    "more": pl.String(),
})
_LATER = ("means", "more")
"""Columns that files of earlier versions lack."""
_MORE = TypeAdapter(More)
_SHA256 = "laserrec.sha256"
_Value = TypeVar("_Value")


@dataclass(frozen=True)
class Kept:
    """Removed first, then added: an id may be in both."""

    removed: tuple[str, ...] = ()
    """Ids of the fitted catalogue."""
    added: dict[str, NewItem] = field(default_factory=dict)
    embeddings: dict[str, np.ndarray] = field(default_factory=dict)
    """Float32[d_out] of the added items; empty where another model made them."""
    means: dict[str, np.ndarray] = field(default_factory=dict)
    """Float32[d_means], the same of `LaserRecommender.means`; empty where the model keeps none."""

    def of(self, added: Collection[str]) -> Kept:
        """Of the added items, these alone."""
        return Kept(self.removed, _some(self.added, added), _some(self.embeddings, added), _some(self.means, added))

    def with_more(self, other: Kept) -> Kept:
        """With the added items of another."""
        return Kept(self.removed, {**self.added, **other.added}, {**self.embeddings, **other.embeddings},
                    {**self.means, **other.means})


class State:
    """The state folder of one server. Parameters: `model`: tells one fitted model from another (`model_identity`)."""

    def __init__(self, folder: Path, model: str):
        self.file, self._model = folder / "items.parquet", model

    def read(self) -> Kept:
        """Nothing if there is no file. Raises UserError for a damaged one."""
        if not os.path.lexists(self.file):
            return Kept()
        if self.file.is_symlink() or not self.file.is_file():
            raise self._damaged("it is a link or no file")
        try:
            data = self.file.read_bytes()
            frame = pl.read_parquet(io.BytesIO(data))
            there = pl.Schema({name: kind for name, kind in _SCHEMA.items()
                               if name not in _LATER or name in frame.columns})
            frame = frame.select(list(there)).cast(there)
            wanted = pl.read_parquet_metadata(io.BytesIO(data)).get(_SHA256)
        except (pl.exceptions.PolarsError, pl.exceptions.PanicException, OSError) as error:
            raise self._damaged(str(error).splitlines()[0]) from None
        if wanted not in (None, _sha256(frame)):  # none: written by an earlier version
            raise self._damaged("its rows are not those that were written")
        if frame.filter(pl.any_horizontal(pl.col("item_id", "removed").is_null())
                        | (~pl.col("removed") & pl.col("title").is_null())).height:
            raise self._damaged("an id or a title is missing")
        new = frame.filter(~pl.col("removed"))
        rows = new.drop("embedding", "means", strict=False).to_dicts()
        try:
            added = {row["item_id"]: NewItem(**item_of(row), **_MORE.validate_json(row.get("more") or "{}"))
                     for row in rows}
        except ValidationError as error:
            raise self._damaged(f"column more: {error.errors()[0]['msg']}") from None
        own = new.filter(pl.col("model") == self._model)
        return Kept(tuple(frame.filter("removed")["item_id"]), added, _arrays(own, "embedding"), _arrays(own, "means"))

    def write(self, kept: Kept) -> None:
        """All of it, or (on any error) nothing."""
        rows: list[dict[str, Any]] = [{"item_id": name, "removed": True} for name in kept.removed]
        rows += [{**item_of(item), "removed": False, "embedding": kept.embeddings.get(name),
                  "means": kept.means.get(name), "model": self._model, "more": _more(item)}
                 for name, item in kept.added.items()]
        frame = pl.DataFrame(rows, schema=_SCHEMA)
        write_bytes(self.file, parquet_bytes(frame, {_SHA256: _sha256(frame)}))

    def _damaged(self, why: str) -> UserError:
        return UserError(f"{self.file} is damaged: {why}; restore it, or move it away to serve the catalogue as it was "
                         "fitted")


def _some(each: dict[str, _Value], names: Collection[str]) -> dict[str, _Value]:
    return {name: value for name, value in each.items() if name in names}


def _more(item: NewItem) -> str | None:
    more = {name: value for name, value in item.items() if name in More.__annotations__}
    return json.dumps(more) if more else None


def _arrays(frame: pl.DataFrame, column: str) -> dict[str, np.ndarray]:
    """By item_id, where there is one."""
    if column not in frame.columns:
        return {}
    known = frame.drop_nulls(column)
    return {name: value.to_numpy() for name, value in zip(known["item_id"], known[column], strict=True)}


def _sha256(frame: pl.DataFrame) -> str:
    """Of the values, so that it does not depend on how a version of polars lays out files."""
    vectors = [name for name in ("embedding", "means") if name in frame.columns]
    texts = json.dumps([frame.drop(vectors).rows(), *(frame[name].list.len().to_list() for name in vectors)])
    digest = hashlib.sha256(texts.encode())
    for name in vectors:
        digest.update(frame[name].explode().to_numpy().tobytes())
    return digest.hexdigest()
