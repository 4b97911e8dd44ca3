"""Ids as numbers, while data are cleaned: they sort as the ids do and take a quarter of the memory."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import polars as pl

_COLUMNS = ("user_id", "item_id")


@dataclass(frozen=True)
class Ids:
    """All ids of some tables, each once, sorted by bytes. An id's number is its place here."""

    user_id: pl.Series
    item_id: pl.Series

    @staticmethod
    def of(interactions: pl.DataFrame, items: pl.DataFrame) -> Ids:
        """Of interactions (user_id, item_id) and items (item_id)."""
        names = pl.concat([interactions["item_id"].unique(), items["item_id"]])
        return Ids(interactions["user_id"].unique().sort(), names.unique().sort())

    def numbered(self, frame: pl.DataFrame) -> pl.DataFrame:
        """The frame with numbers (UInt32) in place of ids, its rows in the same order."""
        return frame.with_columns(self._places(frame[name]) for name in _COLUMNS if name in frame.columns)

    def named(self, frame: pl.DataFrame) -> pl.DataFrame:
        """Inverse of `numbered`."""
        return frame.with_columns(getattr(self, name).gather(frame[name]).alias(name)
                                  for name in _COLUMNS if name in frame.columns)

    def _places(self, column: pl.Series) -> pl.Series:
        own = getattr(self, column.name)
        table = pl.DataFrame({column.name: own, "place": pl.int_range(len(own), dtype=pl.UInt32, eager=True)})
        found = column.to_frame().join(table, on=column.name, how="left", maintain_order="left")
        return found["place"].alias(column.name)


def ranks(column: pl.Series, kept: pl.Series) -> pl.Series:
    """Of each of a column's numbers its row (Int32, from 0) among those kept, which ascend and are all of them."""
    old = kept.to_numpy()
    rows = np.zeros(int(old.max(initial=0)) + 1, np.int32)
    rows[old] = np.arange(len(old), dtype=np.int32)
    return pl.Series(column.name, rows[column.to_numpy()])
