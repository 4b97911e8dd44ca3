"""The histories that `laserrec batch` reads, cut into parts of so many users."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from laserrec.data.door import read_histories
from laserrec.data.files import POLARS_ERRORS, ending, parts_of, reason
from laserrec.data.tables import read_frame
from laserrec.util.errors import UserError, reading

_DIGEST_BYTES = 1 << 20


@dataclass(frozen=True)
class Part:
    """One part's number, and its rows [first, end) of the input."""

    number: int
    first: int
    end: int


class Source:
    """A file, a folder of parts or a pattern, with a row per user (user_id and a list column) or per interaction
    (user_id, item_id; a user's rows together). Parquet is read part by part, other formats at once. Raises UserError
    for another shape; what is wrong with the users is told when they are first asked for."""

    def __init__(self, path: Path | str):
        self.path, self.files = path, parts_of(path)
        if ending(self.files[0]) == ".parquet":
            self._rows = pl.scan_parquet(self.files)
        else:
            self._rows = read_frame(path).lazy()
        try:
            with reading(path):
                first = self._rows.head(1).collect()
                self.n_rows = self._rows.select(pl.len()).collect().item()
        except (*POLARS_ERRORS, OSError) as error:
            raise UserError(f"{path} is not readable as Parquet: {reason(error)}; write it again") from None
        if not self.n_rows:
            raise UserError(f"{path} has no rows; there is nothing to recommend for")
        try:
            read_histories(first, {}, "drop", tell=False)
        except UserError as error:
            raise UserError(f"{path}: {error}") from None

    @cached_property
    def _starts(self) -> np.ndarray:
        """Int64[users + 1]: the row where each user begins, and the end."""
        users = self._rows.select("user_id")
        missing = users.with_row_index("row").filter(pl.col("user_id").is_null()).head(1).collect()
        if missing.height:
            raise UserError(f"{self.path}: row {missing['row'][0] + 1} has no user_id")
        changes = (pl.col("user_id") != pl.col("user_id").shift()).fill_null(True)
        runs = users.with_row_index("row").filter(changes)
        repeated = runs.group_by("user_id").agg(pl.len(), pl.col("row").max()).filter(pl.col("len") > 1)
        twice = repeated.sort("row").head(1).collect()
        if twice.height:
            user, _, row = twice.row(0)
            raise UserError(f"{self.path}: user {user!r} comes again at row {row + 1}; sort the rows by user_id")
        return np.append(runs.select("row").collect()["row"].to_numpy().astype(np.int64), self.n_rows)

    @property
    def n_users(self) -> int:
        """Raises UserError where a row has no user, or a user's rows are apart."""
        return len(self._starts) - 1

    def parts(self, chunk: int) -> list[Part]:
        """All parts of `chunk` users each."""
        edges = [*range(0, self.n_users, chunk), self.n_users]
        return [Part(number, a, b) for number, (a, b) in enumerate(pairwise(self._starts[edges].tolist()))]

    def read(self, part: Part) -> tuple[pl.Series, pl.DataFrame]:
        """The part's users, and its rows with the users' places (from 0) as user_id."""
        rows = self._rows.slice(part.first, part.end - part.first).collect()
        users = rows["user_id"].rle().struct.field("value").alias("user_id")
        return users, rows.with_columns(rows["user_id"].rle_id().cast(pl.Int64).alias("user_id"))

    def ends(self) -> dict[str, Any]:
        """Tells this input from another."""
        return {**digest_of_ends(self.files), "users": self.n_users}


def digest_of_ends(files: list[Path]) -> dict[str, Any]:
    """Sizes, and a digest of the beginning and the end of each file: cheap, and enough to tell files from others."""
    digest, total = hashlib.sha256(), 0
    for path in files:
        size = path.stat().st_size
        total += size
        with open(path, "rb") as file:
            digest.update(size.to_bytes(8) + file.read(_DIGEST_BYTES))
            file.seek(max(0, size - _DIGEST_BYTES))
            digest.update(file.read())
    return {"bytes": total, "sha256_of_ends": digest.hexdigest()}
