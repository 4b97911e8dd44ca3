"""Frames of histories and recommendations from and to files, by their ending."""

from __future__ import annotations

import os
from pathlib import Path

import polars as pl

from laserrec.util.errors import UserError
from laserrec.util.io import write_parquet, write_text

_READERS = {".csv": lambda p: pl.read_csv(p, infer_schema=False), ".parquet": pl.read_parquet, ".jsonl": pl.read_ndjson}


def read_frame(path: Path) -> pl.DataFrame:
    """Raises UserError for a missing file, an unknown ending, or broken content."""
    if not path.is_file():
        raise UserError(f"no such file: {path}")
    if path.suffix not in _READERS:
        raise UserError(f"{path}: ending {path.suffix!r} is not one of {', '.join(_READERS)}")
    try:
        return _READERS[path.suffix](path)
    except (pl.exceptions.PolarsError, OSError) as error:
        raise UserError(f"{path} could not be read: {str(error).splitlines()[0]}") from None


def write_frame(path: Path, frame: pl.DataFrame) -> None:
    """Raises UserError for an unknown ending or a folder that can't be written."""
    try:
        if path.suffix == ".csv":
            write_text(path, frame.write_csv())
        elif path.suffix == ".parquet":
            write_parquet(path, frame)
        else:
            raise UserError(f"{path}: ending {path.suffix!r} is not one of .csv, .parquet")
    except OSError as error:
        raise UserError(f"{path} could not be written: {os.strerror(error.errno or 0)}") from None
