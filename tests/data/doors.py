"""Every door by which histories come in, under one signature, for the tests that hold them against each other.

A door takes a table of interactions (user_id String; item_id as a caller has it; timestamp Int64), an index item_id ->
row and an empty folder, and returns {user_id: item rows, oldest first} of what was understood. Add another (HTTP,
batch, the Python facade) to DOORS.
"""

from __future__ import annotations

import gzip
from collections.abc import Callable, Mapping
from pathlib import Path

import polars as pl

from laserrec.data.door import read_histories
from laserrec.data.tables import read_frame

Door = Callable[[pl.DataFrame, Mapping[str, int], Path], dict[str, list[int]]]


def _read(histories: object, index: Mapping[str, int]) -> dict[str, list[int]]:
    asked = read_histories(histories, index, unknown="drop", tell=False)
    return dict(zip(map(str, asked.users), asked.rows, strict=True))


def lists(table: pl.DataFrame) -> pl.DataFrame:
    """A row per user, items in time order (equal times in the rows' order)."""
    return table.sort("timestamp", maintain_order=True).group_by("user_id", maintain_order=True).agg("item_id")


def _as_dict(table: pl.DataFrame, index: Mapping[str, int], folder: Path) -> dict[str, list[int]]:
    return _read(dict(lists(table).iter_rows()), index)


def _as_lists(table: pl.DataFrame, index: Mapping[str, int], folder: Path) -> dict[str, list[int]]:
    users, items = lists(table).get_columns()
    return dict(zip(users, _read(items.to_list(), index).values(), strict=True))


def _as_series(table: pl.DataFrame, index: Mapping[str, int], folder: Path) -> dict[str, list[int]]:
    users, items = lists(table).get_columns()
    return dict(zip(users, _read(items, index).values(), strict=True))


def _as_pandas_groups(table: pl.DataFrame, index: Mapping[str, int], folder: Path) -> dict[str, list[int]]:
    ordered = table.to_pandas().sort_values("timestamp", kind="stable")
    return _read(ordered.groupby("user_id")["item_id"].agg(list), index)


def _file(name: str, write: Callable[[pl.DataFrame, Path], object]) -> Door:
    def door(table: pl.DataFrame, index: Mapping[str, int], folder: Path) -> dict[str, list[int]]:
        write(table, folder / name)
        return _read(read_frame(folder / name), index)

    return door


def _write_parts(table: pl.DataFrame, path: Path) -> None:
    path.mkdir()
    (path / "_SUCCESS").touch()
    for part, at in enumerate(range(0, table.height, 3)):
        table.slice(at, 3).write_parquet(path / f"part-{part:05}.parquet")


DOORS: dict[str, Door] = {
    "dict": _as_dict,
    "list of lists": _as_lists,
    "Series of lists": _as_series,
    "polars": lambda table, index, folder: _read(table, index),
    "polars lists": lambda table, index, folder: _read(lists(table), index),
    "pandas": lambda table, index, folder: _read(table.to_pandas(), index),
    "pandas objects": lambda table, index, folder: _read(table.to_pandas().astype(object), index),
    "pandas groups": _as_pandas_groups,
    "arrow": lambda table, index, folder: _read(table.to_arrow(), index),
    "csv": _file("x.csv", lambda table, path: table.write_csv(path)),
    "csv of pandas": _file("x.csv", lambda table, path: table.to_pandas().to_csv(path, index=False)),
    "csv, packed, with UTF-8 mark": _file("x.csv.gz", lambda table, path: path.write_bytes(gzip.compress(
        table.write_csv(include_bom=True).encode()))),
    "tsv": _file("x.tsv", lambda table, path: table.write_csv(path, separator="\t")),
    "json lines": _file("x.jsonl", lambda table, path: table.write_ndjson(path)),
    "json lines, lists": _file("x.jsonl", lambda table, path: lists(table).write_ndjson(path)),
    "parquet": _file("x.parquet", lambda table, path: table.write_parquet(path)),
    "parquet, lists": _file("x.parquet", lambda table, path: lists(table).write_parquet(path)),
    "folder of parts": _file("parts.parquet", _write_parts),
}
