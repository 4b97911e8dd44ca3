"""What an item may have beside title, brand and category: further columns of text, and a vector of one's own."""

from __future__ import annotations

import json
from collections.abc import Sequence

import numpy as np
import polars as pl
from jaxtyping import Float

from laserrec.data.clean import ids, short, texts, unmixed, value_at, why_no_id
from laserrec.data.files import Table
from laserrec.data.losses import mismatch
from laserrec.util.errors import UserError

VECTOR = "vector"
"""The column that holds an item's vector, pl.Array(pl.Float32, d); null where an item has none."""
RESERVED = ("item", "item_id", "title", "brand", "category", VECTOR)
"""Columns of the items' table that have a meaning of their own."""


def extra_names(items: pl.DataFrame) -> list[str]:
    """Its further columns of text."""
    return [name for name in items.columns if name not in RESERVED]


def read_texts(table: Table, names: Sequence[str]) -> list[pl.Series]:
    """Further columns as cleaned text; null where the table lacks them."""
    have = table.frame.columns
    return [texts(table.frame[name]) if name in have else pl.Series(name, [None] * table.frame.height, dtype=pl.String)
            for name in names]


def with_vectors(items: pl.DataFrame, given: Table) -> pl.DataFrame:
    """`items` with the column `vector` of a table of item_id and vector: a column of lists, or one number per column.
    Items that it lacks, or has no numbers of, have null; ids that are no items' are left out.

    Raises UserError, with the row, for an unreadable or repeated id, for vectors of unequal length or with values that
    are no finite numbers, and if no item has a vector.
    """
    found = _vectors(given)
    out = items.drop(VECTOR, strict=False).join(found, "item_id", "left", maintain_order="left")
    if out[VECTOR].null_count() == out.height:
        raise UserError(f"{given.name}: none of its {found.height:,} ids is among the items: "
                        f"{mismatch(found['item_id'], items['item_id'])}")
    return out


def _vectors(given: Table) -> pl.DataFrame:
    frame = given.frame
    if "item_id" not in frame.columns or frame.width < 2:
        raise UserError(f"{given.name}: a table of item vectors has the column item_id and a column vector (or one "
                        f"number per column); there are: {', '.join(frame.columns) or 'none'}")
    names = ids(frame["item_id"])
    for bad, what in ((names.is_null(), "no id"), (names.is_duplicated(), "an id that stands in more than one row")):
        if bad.any():
            row = int(bad.arg_max() or 0)
            value = value_at(frame["item_id"], row)
            told = why_no_id(value) if what == "no id" else what
            raise UserError(f"{given.where(row)}, column item_id: {told} (found {str(value)[:80]!r})")
    column, places = _as_lists(given)
    width = _width(column, given)
    found = pl.DataFrame([names, column.alias(VECTOR)]).with_row_index("row").drop_nulls(VECTOR)
    values = found[VECTOR].explode().to_numpy().reshape(-1, width)
    if not np.isfinite(values).all():
        row, place = np.argwhere(~np.isfinite(values))[0]
        where = f"column {places[place]}" if places else f"number {place + 1} of its vector"
        at = given.where(found["row"][int(row)])
        raise UserError(f"{at}, {where}: no finite number (found {values[row, place]})")
    return found.select("item_id", pl.col(VECTOR).cast(pl.Array(pl.Float32, width)))


def _width(column: pl.Series, given: Table) -> int:
    """The length of all lists. Raises UserError where they differ or there are none."""
    lengths = column.list.len()
    known = lengths.drop_nulls()
    if known.is_empty():
        raise UserError(f"{given.name}: no row has a vector")
    wrong = ((lengths != known[0]) | (lengths == 0)).fill_null(False)
    if wrong.any():
        row = int(wrong.arg_max() or 0)
        raise UserError(f"{given.where(row)}: its vector has {lengths[row]} numbers and the first one {known[0]}; all "
                        "must have as many")
    return int(known[0])


def _as_lists(given: Table) -> tuple[pl.Series, list[str]]:
    """A column of lists of float32, null where a row has none; and where each number of them is a column, its name."""
    frame = given.frame.select(unmixed(given.frame[name]) for name in given.frame.columns if name != "item_id")
    frame = frame.with_columns(_from_json(frame[name], given) for name in frame.columns)
    lists = [name for name in frame.columns if isinstance(frame[name].dtype, pl.List | pl.Array)]
    if VECTOR in lists:
        lists = [VECTOR]
    if not lists:
        frame = frame.with_columns(_numbers(column, given) for column in frame if column.dtype == pl.String)
        if not all(dtype.is_numeric() for dtype in frame.dtypes):
            wrong = next(name for name in frame.columns if not frame[name].dtype.is_numeric())
            raise UserError(f"{given.name}: column {wrong} holds no numbers; give a column vector with lists of "
                            "numbers, or numbers in all columns but item_id")
        numbers = pl.concat_list(pl.all().cast(pl.Float32).fill_null(float("nan")))
        given_some = ~pl.all_horizontal(pl.all().is_null())
        return frame.select(pl.when(given_some).then(numbers).alias(VECTOR)).to_series(), frame.columns
    if len(lists) > 1:
        raise UserError(f"{given.name}: several columns hold lists ({', '.join(lists)}); name the one with the vectors "
                        "vector")
    try:
        return frame[lists[0]].cast(pl.List(pl.Float32)), []
    except pl.exceptions.PolarsError:
        raise UserError(f"{given.name}: column {lists[0]} holds lists of something else than numbers") from None


def _numbers(column: pl.Series, given: Table) -> pl.Series:
    """Numbers from the text that files of delimited text have. Raises UserError, with the row, for another text."""
    numbers = column.cast(pl.Float64, strict=False)
    wrong = numbers.is_null() & column.is_not_null()
    if wrong.any():
        row = int(wrong.arg_max() or 0)
        raise UserError(f"{given.where(row)}, column {column.name}: no number (found {short(column[row])}); all "
                        "columns but item_id hold numbers, with a decimal point, or one column vector holds lists of "
                        "them")
    return numbers


def _from_json(column: pl.Series, given: Table) -> pl.Series:
    """Lists from text such as [0.1, 2], as files of delimited text have them; other columns as they are. Raises
    UserError, with the row, for a text that begins so and is no list of numbers."""
    if column.dtype != pl.String or not column.str.contains(r"^\s*\[").any():
        return column
    found: list[list[float] | None] = []
    for row, text in enumerate(column.to_list()):
        try:
            value = None if text is None else json.loads(text)
            if value is not None and not all(type(number) in (int, float) for number in value):
                raise ValueError
        except (ValueError, TypeError, RecursionError):
            raise UserError(f"{given.where(row)}, column {column.name}: lists are written as text here, and this is no "
                            f"list of numbers in JSON, as [0.1, 2] is (found {short(text)}); write it so, or Parquet, "
                            "or one number per column") from None
        found.append(value)
    return pl.Series(column.name, found, dtype=pl.List(pl.Float64))


def vectors_of(items: pl.DataFrame) -> Float[np.ndarray, "n_items d_own"] | None:
    """The items' own vectors, rows of NaN where an item has none; None where the table has no such column. Raises
    UserError for a column of another type."""
    if VECTOR not in items.columns:
        return None
    kind = items[VECTOR].dtype
    if not isinstance(kind, pl.Array) or kind.inner != pl.Float32 or len(kind.shape) != 1:
        raise UserError(f"the items' column {VECTOR} is {kind}, not vectors of float32 of one length; prepare the data "
                        "again")
    out = np.full((items.height, kind.shape[0]), np.nan, dtype=np.float32)
    known = items[VECTOR].is_not_null()
    out[known.to_numpy()] = items[VECTOR].drop_nulls().to_numpy()
    return out


def like(new: pl.DataFrame, table: Table, items: pl.DataFrame) -> pl.DataFrame:
    """`new` with the further columns that a catalogue `items` has, from a caller's table of new items; null where that
    table lacks them. Raises UserError for a vector of another length."""
    out = new.with_columns(read_texts(table, extra_names(items)))
    if VECTOR not in items.columns:
        return out
    kind = items[VECTOR].dtype
    if VECTOR not in table.frame.columns or table.frame[VECTOR].null_count() == table.frame.height:
        return out.with_columns(pl.lit(None, kind).alias(VECTOR))
    frame = pl.DataFrame([new["item_id"], unmixed(table.frame[VECTOR])])
    given = Table(frame, table.name, table.locate)
    found = with_vectors(new, given)
    own, wanted = (frame[VECTOR].dtype for frame in (found, items))
    if isinstance(own, pl.Array) and isinstance(wanted, pl.Array) and own != wanted:
        raise UserError(f"{table.name}: vectors of new items have {own.shape[0]} numbers and those of the catalogue "
                        f"{wanted.shape[0]}")
    return out.with_columns(found[VECTOR])
