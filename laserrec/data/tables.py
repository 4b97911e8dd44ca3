"""Frames of histories and recommendations from and to files, by their ending."""

from __future__ import annotations

from pathlib import Path

import polars as pl

from laserrec.data.files import FileOptions, read_table
from laserrec.util.errors import UserError
from laserrec.util.io import write_parquet, write_text


def read_frame(path: Path | str, separator: str | None = None, encoding: str = "utf-8") -> pl.DataFrame:
    """Any file, folder of parts or pattern that `files.read_table` reads, with its errors."""
    return read_table(path, FileOptions(separator=separator, encoding=encoding)).frame


def write_frame(path: Path, frame: pl.DataFrame) -> None:
    """Raises UserError for an unknown ending or a folder that can't be written."""
    if path.suffix == ".csv":
        write_text(path, frame.write_csv())
    elif path.suffix == ".parquet":
        write_parquet(path, frame)
    else:
        raise UserError(f"{path}: ending {path.suffix!r} is not one of .csv, .parquet")
