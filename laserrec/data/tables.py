"""Frames of histories and recommendations from and to files, by their ending."""

from __future__ import annotations

from pathlib import Path

import polars as pl

from laserrec.data.clean import ids, is_mixed, short, unmixed, value_at, why_no_id
from laserrec.data.files import FileOptions, read_table
from laserrec.data.raw import INTERACTION_SCHEMA
from laserrec.util.errors import UserError
from laserrec.util.io import write_parquet, write_text


def read_frame(path: Path | str, separator: str | None = None, encoding: str = "utf-8") -> pl.DataFrame:
    """Any file, folder of parts or pattern that `files.read_table` reads, with its errors.

    Raises UserError, with the line, for a user of JSON lines who has no id; other mixtures that have a meaning in
    histories stay as they are, and the rest is text or lists.
    """
    table = read_table(path, FileOptions(separator=separator, encoding=encoding))
    frame = table.frame
    if "user_id" in frame.columns and is_mixed(frame["user_id"].dtype):
        users = ids(frame["user_id"])
        if users.null_count():
            row = int(users.is_null().arg_max() or 0)
            value = value_at(frame["user_id"], row)
            raise UserError(f"{table.where(row)}, column user_id: {why_no_id(value)} (found {short(value)}); mend it")
        frame = frame.with_columns(users)
    return frame.with_columns(unmixed(frame[name]) for name in frame.columns if name not in INTERACTION_SCHEMA)


def write_frame(path: Path, frame: pl.DataFrame) -> None:
    """Raises UserError for an unknown ending or a folder that can't be written."""
    if path.suffix == ".csv":
        write_text(path, frame.write_csv())
    elif path.suffix == ".parquet":
        write_parquet(path, frame)
    else:
        raise UserError(f"{path}: ending {path.suffix!r} is not one of .csv, .parquet")
