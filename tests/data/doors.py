"""Tables of interactions as callers have them, and every form in which they are handed over.

One table in all forms means one thing: {user: item rows, oldest first}, which `expected` works out by hand. The tests
of this room hold the reader against it, those of the command line the whole product.
"""

from __future__ import annotations

import gzip
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import polars as pl
from hypothesis import strategies as st

from laserrec.data.clean import as_id

INDEX = {name: row for row, name in enumerate(["1", "2", "3", "0", "007", "i 1", "ä", "A-1", "a-1", "1.5", "-4"])}
"""The catalogue: item id -> row."""

# -- tables ---------------------------------------------------------------------------------------------------------

_TEXTS = st.sampled_from(["1", " 1", "2.0", "3\t", "007", "i 1", "\u00a0ä ", "A-1", "a-1", "1.5", "7", "nada", "00",
                          None])
_WHOLE = st.sampled_from([-4, 0, 1, 2, 3, 7, None])
_START = datetime(2023, 11, 14, 22, 13, 20, tzinfo=UTC)
_TIMES: tuple[Callable[[list[int]], pl.Series], ...] = (
    lambda steps: pl.Series(steps, dtype=pl.Int64),
    lambda steps: pl.Series([1_700_000_000 + t for t in steps], dtype=pl.Int64),
    lambda steps: pl.Series([1_700_000_000_000_000_000 + t for t in steps], dtype=pl.Int64),
    lambda steps: pl.Series([1_700_000_000 + t / 4 for t in steps], dtype=pl.Float64),
    lambda steps: pl.Series([_START + timedelta(milliseconds=t) for t in steps], dtype=pl.Datetime("ms", "UTC")),
    lambda steps: pl.Series([_START.replace(tzinfo=None) + timedelta(hours=t) for t in steps], dtype=pl.Datetime("us")),
    lambda steps: pl.Series([_START.date() + timedelta(days=t) for t in steps], dtype=pl.Date),
    lambda steps: pl.Series([(_START + timedelta(minutes=t)).isoformat() for t in steps], dtype=pl.String),
)


def _ids(values: st.SearchStrategy, kind: Any) -> st.SearchStrategy[pl.Series]:
    return st.lists(values, min_size=1, max_size=12).map(lambda v: pl.Series(v, dtype=kind))


_ITEM_IDS = st.one_of(
    _ids(_TEXTS, pl.String), _ids(_TEXTS, pl.Categorical), _ids(_WHOLE, pl.Int64), _ids(st.integers(0, 5), pl.UInt8),
    _ids(_WHOLE, pl.Decimal(10, 2)), _ids(st.sampled_from([1.0, 2.0, 3.0, 1.5, 0.0, -0.0, -4.0, None]), pl.Float64))


@st.composite
def tables(draw: Any) -> pl.DataFrame:
    """user_id, item_id, timestamp: ids and times of many kinds, the times distinct and the rows in any order."""
    items = draw(_ITEM_IDS)
    users = draw(st.lists(st.sampled_from(["u1", "u2", "ö"]), min_size=len(items), max_size=len(items)))
    times = draw(st.sampled_from(_TIMES))(draw(st.permutations(range(len(items)))))
    return pl.DataFrame({"user_id": users, "item_id": items, "timestamp": times})


def expected(table: pl.DataFrame) -> dict[str, list[int]]:
    """Item rows of each user, oldest first, worked out row by row."""
    histories: dict[str, list[int]] = {user: [] for user in table["user_id"]}
    for user, item, _ in sorted(table.iter_rows(), key=lambda row: row[2]):
        if (name := as_id(item)) in INDEX:
            histories[user].append(INDEX[name])
    return histories


def lists(table: pl.DataFrame) -> pl.DataFrame:
    """A row per user, items in time order."""
    return table.sort("timestamp").group_by("user_id", maintain_order=True).agg("item_id")


# -- forms ----------------------------------------------------------------------------------------------------------


def _pandas_groups(table: pl.DataFrame) -> Any:
    return table.to_pandas().sort_values("timestamp").groupby("user_id")["item_id"].agg(list)


FRAMES: dict[str, Callable[[pl.DataFrame], Any]] = {
    "dict": lambda table: dict(lists(table).iter_rows()),
    "polars": lambda table: table,
    "polars lists": lists,
    "lazy": lambda table: table.lazy(),
    "pandas": lambda table: table.to_pandas(),
    "pandas objects": lambda table: table.to_pandas().astype(object),
    "pandas groups": _pandas_groups,
    "arrow": lambda table: table.to_arrow(),
}
"""In memory, with the users' names."""
NAMELESS: dict[str, Callable[[pl.DataFrame], Any]] = {
    "list of lists": lambda table: lists(table)["item_id"].to_list(),
    "Series of lists": lambda table: lists(table)["item_id"],
}
"""In memory; users are the places in `lists`."""


def _write_parts(table: pl.DataFrame, path: Path) -> None:
    path.mkdir()
    (path / "_SUCCESS").touch()
    for part, at in enumerate(range(0, table.height, 3)):
        table.slice(at, 3).write_parquet(path / f"part-{part:05}.parquet")


def _pack(table: pl.DataFrame, path: Path) -> None:
    path.write_bytes(gzip.compress(table.write_csv(include_bom=True).encode()))


FILES: dict[str, tuple[str, Callable[[pl.DataFrame, Path], object]]] = {
    "csv": ("x.csv", lambda table, path: table.write_csv(path)),
    "csv of pandas": ("x.csv", lambda table, path: table.to_pandas().to_csv(path, index=False)),
    "csv, packed, with UTF-8 mark": ("x.csv.gz", _pack),
    "tsv": ("x.tsv", lambda table, path: table.write_csv(path, separator="\t")),
    "json lines": ("x.jsonl", lambda table, path: table.write_ndjson(path)),
    "json lines, lists": ("x.jsonl", lambda table, path: lists(table).write_ndjson(path)),
    "parquet": ("x.parquet", lambda table, path: table.write_parquet(path)),
    "parquet, lists": ("x.parquet", lambda table, path: lists(table).write_parquet(path)),
    "folder of parts": ("parts.parquet", _write_parts),
}
"""Name of the file, and how it is written."""


def written(form: str, table: pl.DataFrame, folder: Path) -> Path:
    """A file of FILES in an empty folder."""
    name, write = FILES[form]
    write(table, folder / name)
    return folder / name
