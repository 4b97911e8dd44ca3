"""Tables of histories from files, and frames of recommendations to files, by their ending."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import polars as pl

from laserrec.data.clean import ids, unmixed
from laserrec.data.door import read_histories
from laserrec.data.files import SKIP_HINT, FileOptions, Table, read_table
from laserrec.data.raw import INTERACTION_SCHEMA, first_problem, time_and_order
from laserrec.util.errors import UserError
from laserrec.util.io import write_parquet, write_text


def read_whole(path: Path | str, options: FileOptions | None = None) -> pl.DataFrame:
    """A file, folder of parts or pattern of histories at once. Raises UserError for columns that are missing, and for
    rows without a user or a time, by their place in the file."""
    return checked(path, read_listed(path, options))


def checked(path: Path | str, table: Table) -> pl.DataFrame:
    """The table's frame. Raises UserError as `read_whole`."""
    if table.frame.height:
        check_columns(path, table.frame.head(1))
        check_rows(table.frame, table.where)
    return table.frame


def read_listed(path: Path | str, options: FileOptions | None = None) -> Table:
    """A table as `files.read_table` reads it, without the advice to leave broken lines out: a user whose history lacks
    some would be answered as another. Mixtures of values that are no ids or times are text or lists."""
    try:
        table = read_table(path, options)
    except UserError as error:
        raise UserError(str(error).replace(SKIP_HINT, "Mend the line")) from None
    others = (column for column in table.frame if column.name not in INTERACTION_SCHEMA)
    return replace(table, frame=table.frame.with_columns(unmixed(column) for column in others))


def check_columns(path: Path | str, first: pl.DataFrame) -> None:
    """Raise UserError where columns are missing. first: the first row."""
    times = [name for name in ("timestamp", "position") if name in first.columns]
    try:
        read_histories(first.drop(times).with_columns(user_id=0) if "user_id" in first.columns else first, {}, "drop",
                       tell=False)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None


def check_rows(rows: pl.DataFrame, where: Callable[[int], str]) -> None:
    """Raise UserError for the first row without a user or a time. where: the place of a row, in words."""
    problems = [("user_id", ids(rows["user_id"]).is_null(), ""), *time_and_order(rows)[2]]
    if problem := first_problem(rows, problems, where):
        raise UserError(f"{problem}; mend it")


def write_frame(path: Path, frame: pl.DataFrame) -> None:
    """Raises UserError for an unknown ending or a folder that can't be written."""
    if path.suffix == ".csv":
        write_text(path, frame.write_csv())
    elif path.suffix == ".parquet":
        write_parquet(path, frame)
    else:
        raise UserError(f"{path}: ending {path.suffix!r} is not one of .csv, .parquet")
