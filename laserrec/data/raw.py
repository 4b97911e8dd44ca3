"""Tables with the caller's own columns -> `Raw`: two frames with fixed columns, checked ids, times and texts."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import polars as pl

from laserrec.data.clean import (
    column_of,
    epoch_units,
    holds_dates,
    ids,
    is_empty,
    is_nested,
    short,
    texts,
    times,
    value_at,
    why_no_id,
)
from laserrec.data.extras import VECTOR, like, read_texts, with_vectors
from laserrec.data.files import POLARS_ERRORS, SKIP_HINT, FileOptions, Table, header_hint, reason
from laserrec.util.errors import UserError

INTERACTION_SCHEMA = {"user_id": pl.String, "item_id": pl.String, "timestamp": pl.Int64, "order": pl.Int64}
ITEM_SCHEMA = {"item_id": pl.String, "title": pl.String, "brand": pl.String, "category": pl.String}
_COLUMNS = {"interactions": ({"user_id", "item_id"}, {"timestamp", "position"}),
            "items": ({"item_id", "title"}, {"brand", "category"})}


@dataclass(frozen=True)
class Raw:
    """What every reader returns."""

    interactions: pl.DataFrame
    """user_id, item_id String; timestamp Int64 (null in every row where the source has none); order Int64: the
    source's position column, else the row's number."""
    items: pl.DataFrame
    """item_id, title, brand, category String, null where unknown; one row per item_id. Further columns of text, and
    `vector`, where they were asked for."""
    notes: dict[str, Any] = field(default_factory=dict)
    """For the report: the counts skipped_lines (broken, on_error = skip) and duplicate_item_rows; where nothing but
    the order of the rows tells the order in time, the interactions' unused_columns and unused_dates among them; where
    the timestamps look like several units, time_units (see `clean.epoch_units`)."""


def from_frames(interactions: Any, items: Any = None, columns: Mapping[str, str] | None = None,
                on_error: str = "raise", extra: Sequence[str] = (), vectors: Any = None) -> Raw:
    """Polars or pandas frames or Arrow tables in memory.

    interactions: user_id, item_id and optionally timestamp, position (numbers, small = old). items: item_id,
    title and optionally brand, category (text or lists of text); None: the interactions' own columns of these names,
    and no text where there are none. `columns` maps these names to the frames' own, as
    {"user_id": "customer"}; "interactions.item_id" and "items.item_id" where one name does not fit both. extra: further
    columns of the items to keep as text. vectors: a frame of item vectors (see `extras.with_vectors`).
    Raises UserError for a missing column (it lists those that exist) and for an empty id, an unreadable time or
    position (it names the row), unless on_error is "skip", which leaves such rows out and counts them.
    """
    FileOptions(on_error)
    acts = Table(to_polars(interactions, "interactions"), "interactions")
    goods = None if items is None else Table(to_polars(items, "items"), "items")
    raw = from_tables(acts, goods, columns, on_error, extra)
    return raw if vectors is None else join_vectors(raw, Table(to_polars(vectors, "vectors"), "vectors"), columns)


def join_vectors(raw: Raw, vectors: Table, columns: Mapping[str, str] | None = None) -> Raw:
    """With the items' own vectors, whose item_id may be called as the items' is. Raises UserError, see
    `extras.with_vectors`."""
    theirs = _chosen("items", column_map(columns))["item_id"]
    if "item_id" not in vectors.frame.columns and theirs in vectors.frame.columns:
        vectors = replace(vectors, frame=vectors.frame.rename({theirs: "item_id"}))
    items = with_vectors(raw.items, vectors)
    return replace(raw, items=items, notes={**raw.notes, "items_without_vector": items[VECTOR].null_count()})


def from_tables(interactions: Table, items: Table | None, columns: Mapping[str, str] | None = None,
                on_error: str = "raise", extra: Sequence[str] = ()) -> Raw:
    """`from_frames` for tables that know their files."""
    columns = column_map(columns)
    _check_map(columns, extra)
    picked = _pick(interactions, "interactions", columns)
    goods = (_pick(interactions, "items", columns, extra, needed={"item_id"}) if items is None
             else _pick(items, "items", columns, extra))
    acts, skipped = _checked_interactions(picked, on_error)
    goods, skipped_items = _checked_items(goods, on_error, extra=extra)
    goods, duplicates = _one_row_per_item(goods)
    skipped += interactions.skipped
    if items is None:
        duplicates = 0  # each row is an interaction first, and was counted as one
    else:
        skipped += items.skipped + skipped_items
    notes: dict[str, Any] = {"skipped_lines": skipped, "duplicate_item_rows": duplicates}
    if "position" not in picked.frame.columns and acts["timestamp"].null_count() == acts.height:
        used = {*_chosen("interactions", columns).values(),
                *(_chosen("items", columns, extra).values() if items is None else ())}
        notes.update(unused(interactions.frame, used))
    elif "timestamp" in picked.frame.columns and len(units := epoch_units(picked.frame["timestamp"])) > 1:
        notes["time_units"] = units
    return Raw(acts, goods, notes)


def read_items(frame: Any, name: str = "new items", catalogue: pl.DataFrame | None = None) -> pl.DataFrame:
    """A frame of items to add (item_id, title, and brand, category if known) with ITEM_SCHEMA, cleaned as `from_frames`
    does, and with the further columns that a catalogue has, null where the frame lacks them. Raises UserError for a
    missing column, for an empty or repeated id or an empty title (with the row), and for vectors of another length."""
    given = Table(to_polars(frame, name), name)
    items, _ = _checked_items(_pick(given, "items", None), "raise", "Mend it")
    check_items(items, name)
    return items if catalogue is None else like(items, given, catalogue)


def check_items(items: pl.DataFrame, name: str = "new items") -> pl.DataFrame:
    """The same frame of cleaned items to add. Raises UserError, with the row, for a repeated id or an empty title."""
    for bad, what in ((items["item_id"].is_duplicated(), "stands in more than one row; keep one"),
                      (items["title"].is_null(), "has no title; give it one, its text is what a model reads")):
        if bad.any():
            row = int(bad.arg_max() or 0)
            raise UserError(f"{name}: row {row + 1}: item {items['item_id'][row]!r} {what}")
    return items


def to_polars(frame: Any, name: str = "the frame") -> pl.DataFrame:
    """A polars frame (eager or lazy), pandas frame, Arrow table, dict of columns, list of dicts or one dict as an eager
    polars frame, pandas' named index levels as columns. Raises UserError for anything else."""
    try:
        if isinstance(frame, (pl.DataFrame, pl.LazyFrame)):
            return frame.lazy().collect()
        module = type(frame).__module__.split(".")[0]
        if module == "pyarrow" and hasattr(frame, "column_names"):
            return pl.DataFrame(pl.from_arrow(frame))
        if module == "pandas" and hasattr(frame, "columns"):
            return _from_pandas(frame)
        if isinstance(frame, Mapping) and all(map(is_nested, frame.values())):
            return pl.DataFrame([column_of(str(c), values) for c, values in frame.items()])
        rows = [frame] if isinstance(frame, Mapping) else frame
        if isinstance(rows, (list, tuple)) and all(isinstance(row, Mapping) for row in rows):
            names = dict.fromkeys(name for row in rows for name in row)
            return pl.DataFrame([column_of(str(n), [row.get(n) for row in rows]) for n in names])
    except ImportError as error:  # polars needs pyarrow for pandas' string columns
        raise UserError(f"reading {name} from pandas needs one more package ({error}); "
                        "pip install 'laserrec[pandas]'") from None
    except (TypeError, ValueError, *POLARS_ERRORS) as error:
        raise UserError(f"{name} can't be read: {reason(error)}") from None
    raise UserError(f"{name}: expected a polars or pandas frame, a dict of columns or a list of dicts, not "
                    f"{type(frame).__name__}")


def _from_pandas(frame: Any) -> pl.DataFrame:
    from pandas.api.types import infer_dtype

    frame = frame.reset_index([n for n in frame.index.names if n is not None and n not in frame.columns])
    objects = [c for c in frame.select_dtypes(object) if infer_dtype(frame[c]) != "string"]
    objects += [c for c in frame.columns if c not in objects and not _in_arrow(frame[c])]
    mixed = [column_of(str(c), frame[c]) for c in objects]
    plain = pl.from_pandas(frame.drop(columns=objects))
    return plain.with_columns(mixed) if plain.width else pl.DataFrame(mixed)


def _in_arrow(column: Any) -> bool:
    """Whether polars reads such a column of pandas: not complex numbers, sparse columns and the like."""
    try:
        pl.from_pandas(column.head(0))
    except ImportError:
        raise
    except Exception:  # of pandas, Arrow or polars, which share no class
        return False
    return True


# -- columns ------------------------------------------------------------------------------------------------------


def no_column(name: str, missing: Iterable[str], have: list[str]) -> UserError:
    """The error for columns that a table lacks."""
    return UserError(f"{name}: no column for {', '.join(missing)}; there are: {', '.join(have) or 'none'}"
                     f"{header_hint(have)}")


def column_map(columns: Mapping[str, str] | None) -> dict[str, str]:
    """A caller's column map; names that are numbers, as pandas has them, as text. Raises UserError for anything else
    than a dict."""
    if columns is None or isinstance(columns, Mapping):
        return {str(ours): str(theirs) for ours, theirs in (columns or {}).items()}
    raise UserError("columns is a dict of our names and yours, such as {'user_id': 'customer'}, not "
                    f"{short(columns)}")


def _check_map(columns: dict[str, str], extra: Sequence[str] = ()) -> None:
    own = {kind: {*needed, *optional, *(extra if kind == "items" else ())}
           for kind, (needed, optional) in _COLUMNS.items()}
    known = sorted(set().union(*own.values()))
    for key in columns:
        kind, _, name = key.rpartition(".")
        if name not in known or (kind and (kind not in own or name not in own[kind])):
            raise UserError(f"column map: {key!r} is not a column of ours; map {', '.join(known)} to your names, "
                            "with 'items.' or 'interactions.' before it for one table alone")


def _pick(table: Table, kind: str, given: dict[str, str] | None, extra: Sequence[str] = (),
          needed: set[str] | None = None) -> Table:
    """Our columns under our names, and the `extra` ones. given: the caller's names for them; None where the caller
    can't give any. needed: those that the table must have, in place of this kind's."""
    needed = (_COLUMNS[kind][0] if needed is None else needed) | set(extra)
    columns = given or {}
    chosen = _chosen(kind, columns, extra)
    asked = {name for name in chosen if name in columns or f"{kind}.{name}" in columns}
    have = table.frame.columns
    missing = [name for name in chosen if chosen[name] not in have and (name in needed or name in asked)]
    if missing:
        wanted = [f"{name} (looked for {chosen[name]!r})" if name in asked else name for name in missing]
        advice = (f"; name yours so: --columns {missing[0]}=YOURS (Python: columns={{{missing[0]!r}: 'YOURS'}})"
                  if given is not None else "")
        raise UserError(f"{no_column(table.name, wanted, have)}{'' if header_hint(have) else advice}")
    frame = table.frame.select(pl.col(theirs).alias(name) for name, theirs in chosen.items() if theirs in have)
    return Table(frame, table.name, table.locate)


def _chosen(kind: str, columns: Mapping[str, str], extra: Sequence[str] = ()) -> dict[str, str]:
    """All names of ours for a table, and the caller's for them, whether it has them or not."""
    ours = sorted(set().union(*_COLUMNS[kind], extra))
    return {name: columns.get(f"{kind}.{name}", columns.get(name, name)) for name in ours}


def _checked_interactions(table: Table, on_error: str) -> tuple[pl.DataFrame, int]:
    names, problems = _ids(table, ("user_id", "item_id"))
    time, order, more = time_and_order(table.frame)
    keep, skipped = _without([*problems, *more], table, on_error)
    return names.with_columns(time, order).filter(keep).select(list(INTERACTION_SCHEMA)), skipped


def time_and_order(frame: pl.DataFrame) -> tuple[pl.Series, pl.Series, list[tuple[str, pl.Series, str]]]:
    """`timestamp` (all null where there are none) and `order` Int64 of a table's rows, and what is wrong with them."""
    problems = []
    time = pl.Series("timestamp", [None] * frame.height, dtype=pl.Int64)
    order = pl.int_range(frame.height, eager=True, dtype=pl.Int64).alias("order")
    if "timestamp" in frame.columns and not is_empty(frame["timestamp"]).all():
        time = times(frame["timestamp"])
        problems.append(_times_problem(frame["timestamp"], time))
    if "position" in frame.columns:
        order = times(frame["position"]).alias("order")
        problems.append(_times_problem(frame["position"], order))
    return time, order, problems


def _times_problem(column: pl.Series, read: pl.Series) -> tuple[str, pl.Series, str]:
    """What is wrong with the values that `times` has not read. Of two kinds in a column it reads the first value's."""
    bad = read.is_null()
    alone = times(column.filter(bad).head(1))
    mixed = "this column mixes numbers and dates; write all of it in one form"
    return column.name, bad, mixed if alone.null_count() < len(alone) else "neither a number nor an ISO 8601 date"


def unused(frame: pl.DataFrame, used: Iterable[str]) -> dict[str, list[str]]:
    """Columns that are not used, and those of them that hold dates: there the order in time may be."""
    names = [name for name in frame.columns if name not in used]
    return {"unused_columns": names, "unused_dates": [name for name in names if holds_dates(frame[name])]}


def first_problem(frame: pl.DataFrame, problems: Iterable[tuple[str, pl.Series, str]], where: Callable[[int], str]
                  ) -> str | None:
    """What is wrong with the first row that the first problem has, in words, for an error; None where nothing is.

    problems: (column, mask of bad rows, why; "" where a value is no id). where: the place of a row, in words.
    """
    for column, bad, why in problems:
        if bad.any():
            row = int(bad.arg_max() or 0)
            value = value_at(frame[column], row)
            return f"{where(row)}, column {column}: {why or why_no_id(value)} (found {short(value)})"
    return None


def _checked_items(table: Table, on_error: str, advice: str = SKIP_HINT, extra: Sequence[str] = ()
                   ) -> tuple[pl.DataFrame, int]:
    names, problems = _ids(table, ("item_id",))
    keep, skipped = _without(problems, table, on_error, advice)
    readable = [texts(table.frame[c]) if c in table.frame.columns else pl.lit(None, pl.String).alias(c)
                for c in ("title", "brand", "category")]
    return names.with_columns(*readable, *read_texts(table, extra)).filter(keep), skipped


def _ids(table: Table, columns: tuple[str, ...]) -> tuple[pl.DataFrame, list[tuple[str, pl.Series, str]]]:
    frame = table.frame.select(ids(table.frame[c]) for c in columns)
    return frame, [(c, frame[c].is_null(), "") for c in columns]


def _without(problems: list[tuple[str, pl.Series, str]], table: Table, on_error: str, advice: str = SKIP_HINT
             ) -> tuple[pl.Series, int]:
    """Mask of good rows and the number of bad ones; raises on the first bad one unless they are skipped, and where no
    good one is left."""
    keep = pl.Series([True] * table.frame.height, dtype=pl.Boolean)
    for _, bad, _ in problems:
        keep = keep & ~bad
    if (on_error == "raise" or not keep.any()) and (problem := first_problem(table.frame, problems, table.where)):
        raise UserError(f"{problem}. {advice}" if on_error == "raise" else
                        f"{table.name}: all of {len(keep):,} lines are broken, none is left; the first is {problem}")
    return keep, int((~keep).sum())


def _one_row_per_item(items: pl.DataFrame) -> tuple[pl.DataFrame, int]:
    """Of several rows of one item, of which one is kept whole, the most frequent title wins, then the fullest row, then
    the most frequent, then the alphabetically first: a choice that does not depend on the rows' order."""
    double = items["item_id"].is_duplicated()
    if not double.any():
        return items, 0
    known, count = items.columns[1:], pl.col("laserrec: count")  # no caller's column is called so
    rows = items.filter(double).group_by(items.columns).agg(pl.len().cast(pl.Int64).alias(count.meta.output_name()))
    votes = count.sum().over("item_id", "title")
    empty = pl.sum_horizontal(pl.col(known).is_null())
    best = (rows.sort("item_id", pl.col("title").is_null(), -votes, empty, -count, *known, nulls_last=True)
            .unique("item_id", keep="first", maintain_order=True))
    out = pl.concat([items.filter(~double), best.select(items.columns)])
    return out, items.height - out.height
