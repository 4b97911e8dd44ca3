"""Tables with the caller's own columns -> `Raw`: two frames with fixed columns, checked ids, times and texts.

Times: integers in any unit are kept; numbers with fractions are multiplied by 1000 and rounded (seconds become
milliseconds, so no order is lost); dates and ISO 8601 text become epoch milliseconds, read as UTC where they name no
zone. One source has one unit; only the order of times is ever used.
"""

from __future__ import annotations

import html
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

import polars as pl

from laserrec.util.errors import UserError

INTERACTION_SCHEMA = {"user_id": pl.String, "item_id": pl.String, "timestamp": pl.Int64, "order": pl.Int64}
ITEM_SCHEMA = {"item_id": pl.String, "title": pl.String, "brand": pl.String, "category": pl.String}
ON_ERROR = ("raise", "skip")
_COLUMNS = {"interactions": ({"user_id", "item_id"}, {"timestamp", "position"}),
            "items": ({"item_id", "title"}, {"brand", "category"})}


@dataclass(frozen=True)
class Raw:
    """What every reader returns."""

    interactions: pl.DataFrame
    """user_id, item_id String; timestamp Int64 (null in every row where the source has none); order Int64: the
    source's position column, else the row's number."""
    items: pl.DataFrame
    """item_id, title, brand, category String, null where unknown; one row per item_id."""
    notes: dict[str, int] = field(default_factory=dict)
    """Counts for the report: skipped_lines (broken, on_error = skip), duplicate_item_rows."""


@dataclass(frozen=True)
class Table:
    """A frame with the caller's columns, and where its rows come from."""

    frame: pl.DataFrame
    name: str
    locate: Callable[[int], str] | None = None
    """0-based row -> "file:line" for messages."""
    skipped: int = 0
    """Broken lines already left out."""

    def where(self, row: int) -> str:
        return self.locate(row) if self.locate else f"{self.name}: row {row + 1}"


def from_frames(interactions: Any, items: Any, columns: Mapping[str, str] | None = None,
                on_error: str = "raise") -> Raw:
    """Polars or pandas frames in memory.

    interactions: user_id, item_id and optionally timestamp, position (whole numbers, small = old). items: item_id,
    title and optionally brand, category (text or lists of text). `columns` maps these names to the frames' own, as
    {"user_id": "customer"}; "interactions.item_id" and "items.item_id" where one name does not fit both.
    Raises UserError for a missing column (it lists those that exist) and for an empty id, an unreadable time or
    position (it names the row), unless on_error is "skip", which leaves such rows out and counts them.
    """
    return from_tables(Table(to_polars(interactions), "interactions"), Table(to_polars(items), "items"), columns,
                       on_error)


def from_tables(interactions: Table, items: Table, columns: Mapping[str, str] | None = None,
                on_error: str = "raise") -> Raw:
    """`from_frames` for tables that know their files."""
    check_on_error(on_error)
    columns = dict(columns or {})
    _check_map(columns)
    acts, goods = _pick(interactions, "interactions", columns), _pick(items, "items", columns)
    acts, skipped_acts = _checked_interactions(acts, on_error)
    goods, skipped_items = _checked_items(goods, on_error)
    skipped = interactions.skipped + items.skipped + skipped_acts + skipped_items
    goods, duplicates = _one_row_per_item(goods)
    return Raw(acts, goods, {"skipped_lines": skipped, "duplicate_item_rows": duplicates})


def to_polars(frame: Any) -> pl.DataFrame:
    """A polars (eager or lazy) or pandas frame as an eager polars frame; UserError for anything else."""
    if isinstance(frame, pl.DataFrame):
        return frame
    if isinstance(frame, pl.LazyFrame):
        return frame.collect()
    if type(frame).__module__.split(".")[0] == "pandas":
        try:
            return pl.from_pandas(frame)
        except ImportError as error:  # polars needs pyarrow for pandas' string columns
            raise UserError(f"reading a pandas frame needs one more package ({error}); "
                            "pip install 'laserrec[pandas]'") from None
        except (TypeError, ValueError, pl.exceptions.PolarsError) as error:
            raise UserError(f"the pandas frame holds a column of mixed types: {error}; "
                            "make it one type, e.g. .astype(str)") from None
    raise UserError(f"expected a polars or pandas frame, not {type(frame).__name__}")


def check_on_error(on_error: str) -> None:
    """UserError unless it is a known way to treat broken lines."""
    if on_error not in ON_ERROR:
        raise UserError(f"on_error is 'raise' or 'skip', not {on_error!r}")


# -- columns ------------------------------------------------------------------------------------------------------


def _check_map(columns: dict[str, str]) -> None:
    known = sorted(set().union(*(needed | optional for needed, optional in _COLUMNS.values())))
    for key in columns:
        kind, _, name = key.rpartition(".")
        if name not in known or (kind and (kind not in _COLUMNS or name not in set().union(*_COLUMNS[kind]))):
            raise UserError(f"column map: {key!r} is not a column of ours; map {', '.join(known)} to your names, "
                            "with 'items.' or 'interactions.' before it for one table alone")


def _pick(table: Table, kind: str, columns: dict[str, str]) -> Table:
    needed, optional = _COLUMNS[kind]
    chosen = {name: columns.get(f"{kind}.{name}", columns.get(name, name)) for name in sorted(needed | optional)}
    asked = {name for name in chosen if name in columns or f"{kind}.{name}" in columns}
    have = table.frame.columns
    missing = [name for name in chosen if chosen[name] not in have and (name in needed or name in asked)]
    if missing:
        wanted = ", ".join(f"{name} (looked for {chosen[name]!r})" if name in asked else name for name in missing)
        raise UserError(f"{table.name}: no column for {wanted}; there are: {', '.join(have) or 'none'}. "
                        f"Map it: --columns {missing[0]}=YOUR_COLUMN, in Python columns={{'{missing[0]}': ...}}")
    frame = table.frame.select(pl.col(theirs).alias(name) for name, theirs in chosen.items() if theirs in have)
    return Table(frame, table.name, table.locate)


def _checked_interactions(table: Table, on_error: str) -> tuple[pl.DataFrame, int]:
    frame = table.frame.with_columns(_id(table, "user_id"), _id(table, "item_id"))
    problems = _empty_ids(frame, ("user_id", "item_id"))
    time, order = pl.Series("timestamp", [None] * frame.height, dtype=pl.Int64), None
    if "timestamp" in frame.columns and not _is_empty(frame["timestamp"]).all():
        time = parse_times(frame["timestamp"]).rename("timestamp")
        problems.append(("timestamp", time.is_null(), "neither a number nor an ISO 8601 date"))
    if "position" in frame.columns:
        order = _whole(frame["position"]).rename("order")
        problems.append(("position", order.is_null(), "not a whole number"))
    out = frame.select("user_id", "item_id").with_columns(
        time, order if order is not None else pl.int_range(pl.len(), dtype=pl.Int64).alias("order"))
    keep, skipped = _without(problems, table, on_error)
    return out.filter(keep).select(list(INTERACTION_SCHEMA)), skipped


def _checked_items(table: Table, on_error: str) -> tuple[pl.DataFrame, int]:
    frame = table.frame.with_columns(_id(table, "item_id"))
    keep, skipped = _without(_empty_ids(frame, ("item_id",)), table, on_error)
    texts = [clean_text(frame[c] if c in frame.columns else pl.Series(c, [None] * frame.height, dtype=pl.String))
             for c in ("title", "brand", "category")]
    return frame.select("item_id").with_columns(texts).filter(keep), skipped


def _id(table: Table, column: str) -> pl.Series:
    ids = table.frame[column]
    if ids.dtype.is_nested() or ids.dtype == pl.Object:
        raise UserError(f"{table.name}: column {column} holds {ids.dtype}, not ids; use text or numbers")
    if ids.dtype.is_float() and ids.drop_nulls().is_finite().all() and (ids.drop_nulls() % 1 == 0).all():
        ids = ids.cast(pl.Int64)  # pandas turns whole numbers into floats as soon as one is missing
    return ids.cast(pl.String)


def _is_empty(series: pl.Series) -> pl.Series:
    if series.dtype == pl.String:
        return series.is_null() | (series.str.strip_chars() == "")
    return series.is_null() | series.is_nan() if series.dtype.is_float() else series.is_null()


def _empty_ids(frame: pl.DataFrame, columns: tuple[str, ...]) -> list[tuple[str, pl.Series, str]]:
    return [(c, _is_empty(frame[c]).fill_null(True), "empty id") for c in columns]


def _without(problems: list[tuple[str, pl.Series, str]], table: Table, on_error: str) -> tuple[pl.Series, int]:
    """Mask of good rows and the number of bad ones; raises on the first bad one unless they are skipped."""
    keep = pl.Series([True] * table.frame.height, dtype=pl.Boolean)
    for column, bad, why in problems:
        if on_error == "raise" and bad.any():
            row = int(bad.arg_max() or 0)
            value = str(table.frame[column][row])[:80]
            raise UserError(f"{table.where(row)}, column {column}: {why} (found {value!r}). Mend it, or leave broken "
                            "lines out: --on-error skip")
        keep = keep & ~bad
    return keep, int((~keep).sum())


# -- values -------------------------------------------------------------------------------------------------------


def parse_times(raw: pl.Series) -> pl.Series:
    """Int64 per row by the rules at this module's top; null where a value can't be read."""
    if raw.dtype.is_temporal():
        return raw.cast(pl.Datetime("ms")).dt.epoch("ms")
    if raw.dtype == pl.String:
        text = raw.str.strip_chars()
        first = text.filter(~_is_empty(text)).head(1)
        if first.cast(pl.Float64, strict=False).null_count():
            return _iso(text)
        whole, number = text.cast(pl.Int64, strict=False), text.cast(pl.Float64, strict=False)
    elif raw.dtype.is_integer():
        return raw.cast(pl.Int64, strict=False)
    else:
        whole, number = pl.Series([None] * len(raw), dtype=pl.Int64), raw.cast(pl.Float64, strict=False)
    # Integers are never read by way of floats: nanoseconds since 1970 have more digits than a float keeps.
    number = number.set(~number.is_finite().fill_null(False), None)
    if (number % 1 != 0).any():
        return pl.select(pl.coalesce(whole * 1000, (number * 1000).round().cast(pl.Int64, strict=False))).to_series()
    return pl.select(pl.coalesce(whole, number.cast(pl.Int64, strict=False))).to_series()


def _iso(text: pl.Series) -> pl.Series:
    def milliseconds(value: str) -> int | None:
        try:
            moment = datetime.fromisoformat(value)
        except ValueError:
            return None
        moment = moment if moment.tzinfo else moment.replace(tzinfo=UTC)
        return round(moment.timestamp() * 1000)

    values = text.drop_nulls().unique()
    known = {value: milliseconds(value) for value in values.to_list()}
    return text.replace_strict(known, default=None, return_dtype=pl.Int64)


def _whole(raw: pl.Series) -> pl.Series:
    if raw.dtype.is_integer():
        return raw.cast(pl.Int64, strict=False)
    number = (raw.str.strip_chars() if raw.dtype == pl.String else raw).cast(pl.Float64, strict=False)
    return number.set((number % 1 != 0).fill_null(True), None).cast(pl.Int64, strict=False)


_TAGS = ("a|abbr|b|big|br|center|code|dd|div|dl|dt|em|font|form|h[1-6]|hr|i|iframe|img|input|label|li|link|meta|nobr|"
         "noscript|ol|option|p|pre|s|script|section|select|small|span|strike|strong|style|sub|sup|table|tbody|td|th|"
         "thead|tr|tt|u|ul")
_BLOCK = re.compile(r"<(style|script)\b.*?(?:</\1\s*>|$)", re.IGNORECASE | re.DOTALL)
_IMAGE = re.compile(r"<img\b[^<>]*?\balt=\"([^\"<>]*)\"[^<>]*>", re.IGNORECASE)
_TAG = re.compile(rf"</?(?:{_TAGS})(?:\s[^<>]*)?/?>", re.IGNORECASE)
_OPEN_TAG = re.compile(rf"<(?:{_TAGS})\s[^<>]*$", re.IGNORECASE)
_PAGE_CODE = r"aPageStart|getTime\(\)|P\.when\("


def clean_text(text: pl.Series) -> pl.Series:
    """Any column as String, null where nothing readable is left.

    Lists are joined with spaces; HTML entities are unescaped; style and script blocks are dropped; known HTML tags
    are dropped and their content kept (an image leaves its alt text), "<" otherwise stays; a text that is a page's
    own code instead of words (Amazon 2018 has titles like "var aPageStart = (new Date()).getTime();") is unknown;
    white space and control characters are folded to single spaces.
    """
    if text.dtype == pl.List:
        text = text.cast(pl.List(pl.String)).list.drop_nulls().list.join(" ")
    text = text.cast(pl.String)
    marked = text.str.contains(f"[&<]|{_PAGE_CODE}").fill_null(False)
    if marked.any():
        text = text.clone().scatter(marked.arg_true(), [_plain(t) for t in text.filter(marked).to_list()])
    text = text.str.replace_all(r"[\s\x00-\x1f\x7f]+", " ").str.strip_chars()
    return text.set((text == "").fill_null(False), None)


def _plain(text: str) -> str:
    text = html.unescape(text)
    text = _OPEN_TAG.sub(" ", _TAG.sub(" ", _IMAGE.sub(r"\1", _BLOCK.sub(" ", text))))
    # A script cut out above took its code along; what still looks like code is the text itself.
    return "" if re.search(_PAGE_CODE, text) else text


def _one_row_per_item(items: pl.DataFrame) -> tuple[pl.DataFrame, int]:
    """Of several rows of one item the fullest stays (a title counts first), the alphabetically first among equals:
    a choice that does not depend on the rows' order."""
    double = items["item_id"].is_duplicated()
    if not double.any():
        return items, 0
    empty = pl.sum_horizontal(pl.col("title", "brand", "category").is_null())
    best = (items.filter(double).sort("item_id", pl.col("title").is_null(), empty, "title", "brand", "category",
                                      nulls_last=True)
            .unique("item_id", keep="first", maintain_order=True))
    out = pl.concat([items.filter(~double), best])
    return out, items.height - out.height
