"""Write files and folders whole or not at all: to a temporary name beside the target, then rename.

A killed process can leave `.NAME.PID-XXXX.tmp` behind, never a half-written NAME; such leftovers may be deleted.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import polars as pl

from laserrec.util.errors import UserError


def write_bytes(path: Path | str, data: bytes) -> None:
    """Write `data` atomically; missing parent folders are made."""
    path = Path(path)
    temporary = _temporary(path)
    try:
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())  # without it a power cut after the rename can leave an empty file
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: Path | str, text: str) -> None:
    """UTF-8, atomically; line ends as they are in `text`."""
    write_bytes(path, text.encode("utf-8"))


def read_json(path: Path, advice: str) -> Any:
    """Raises UserError for a missing file, and for a damaged one with `advice` on what to do."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"no such file: {path}") from None
    except ValueError as error:  # bad JSON and bad UTF-8 alike
        raise UserError(f"{path} is damaged: {error}; {advice}") from None


def write_json(path: Path | str, value: Any) -> None:
    """`json_text`, atomically. Raises ValueError for NaN and infinity, which JSON does not have."""
    write_text(path, json_text(value))


def json_text(value: Any) -> str:
    """Indented, key order kept, unicode as it is, with a final newline."""
    return json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def write_parquet(path: Path | str, frame: pl.DataFrame) -> None:
    """`parquet_bytes`, atomically."""
    write_bytes(path, parquet_bytes(frame))


def parquet_bytes(frame: pl.DataFrame) -> bytes:
    """The same frame gives the same bytes (under one polars version): what shapes them is fixed here, and the
    frame's chunks, which depend on how it was made, are merged first."""
    buffer = io.BytesIO()
    frame.rechunk().write_parquet(buffer, compression="zstd", compression_level=3, statistics=True,
                                  row_group_size=1_000_000)
    return buffer.getvalue()


@contextlib.contextmanager
def new_folder(path: Path | str) -> Iterator[Path]:
    """An empty folder to fill. It takes the name `path` when the block ends (what stood there is removed only then)
    and vanishes when the block fails."""
    path = Path(path)
    temporary = _temporary(path)
    temporary.mkdir()
    try:
        yield temporary
        if path.exists():
            # Moved aside first: removing takes long, and the new folder should be missing for no longer than a rename.
            old = _temporary(path)
            path.rename(old)
            temporary.rename(path)
            shutil.rmtree(old)
        else:
            temporary.rename(path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _temporary(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    return path.with_name(f".{path.name}.{os.getpid()}-{secrets.token_hex(3)}.tmp")
