"""The histories of `laserrec batch`, cut into parts of so many users."""

from __future__ import annotations

import hashlib
from bisect import bisect_right
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import polars as pl

from laserrec.data.clean import ids
from laserrec.data.door import tell_dates
from laserrec.data.files import POLARS_ERRORS, FileOptions, Table, below_each_other, ending, parts_of, reason
from laserrec.data.tables import check_columns, check_rows, read_listed
from laserrec.util.errors import UserError, reading

_DIGEST_BYTES = 1 << 20
_SMALL = (pl.Int8, pl.Int16, pl.Int32, pl.Int64, pl.UInt8, pl.UInt16, pl.UInt32)
_T = TypeVar("_T")


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

    def __init__(self, path: Path | str, options: FileOptions | None = None):
        self.path, self.files = path, parts_of(path)
        parquet = ending(self.files[0]) == ".parquet"
        self._rows = _Parquet(path, self.files) if parquet else _Whole(read_listed(path, options))
        self.n_rows = self._rows.spans[-1][1]
        if not self.n_rows:
            raise UserError(f"{path} has no rows; there is nothing to recommend for")
        first = self._rows.read(0, 1)
        check_columns(path, first)
        check_rows(first, self._rows.where)
        tell_dates(first)

    @cached_property
    def _users(self) -> tuple[np.ndarray, bool]:
        """Int64[users + 1]: the row where each user begins, and the end; and whether all ids are whole numbers."""
        names, starts = [], []
        for first, end in self._rows.spans:  # one after the other, so that memory holds one's column alone
            runs = self._rows.read(first, end, ["user_id"])["user_id"].rle().struct.unnest()
            name, start = ids(runs["value"]), first + runs["len"].cast(pl.Int64).cum_sum() - runs["len"].cast(pl.Int64)
            if name.null_count():
                row = start[name.is_null().arg_max() or 0]
                check_rows(self._rows.read(row, row + 1), lambda at, row=row: self._rows.where(row + at))
            names.append(name)
            starts.append(start)
        name, start = pl.concat(names), pl.concat(starts)
        begins = (name != name.shift()).fill_null(True)
        name, start = name.filter(begins), start.filter(begins)
        again = ~name.is_first_distinct()
        if again.any():
            place = again.arg_max() or 0
            raise UserError(f"{self._rows.where(start[place])}: user {name[place]!r} comes again; sort the rows by "
                            "user_id")
        whole = name.cast(pl.Int64, strict=False).null_count() == 0
        return np.append(start.to_numpy().astype(np.int64), self.n_rows), whole

    @cached_property
    def _numbers(self) -> bool:
        """Whether users are written as numbers: where all are, and whole. As `recommend` answers them."""
        kind = self._rows.kinds["user_id"]
        return kind in _SMALL or ((kind.is_integer() or kind.is_float()) and self._users[1])

    @property
    def n_users(self) -> int:
        """Raises UserError where a row has no user, or a user's rows are apart."""
        return len(self._users[0]) - 1

    def names(self) -> Iterator[pl.Series]:
        """The users' ids, file by file; one who comes in two files comes twice."""
        for first, end in self._rows.spans:
            yield ids(self._rows.read(first, end, ["user_id"])["user_id"].rle().struct.field("value"))

    def parts(self, chunk: int) -> list[Part]:
        """All parts of `chunk` users each."""
        edges = [*range(0, self.n_users, chunk), self.n_users]
        return [Part(number, a, b) for number, (a, b) in enumerate(pairwise(self._users[0][edges].tolist()))]

    def read(self, part: Part) -> tuple[pl.Series, pl.DataFrame]:
        """The part's users (Int64 or String), and its rows with the users' places (from 0) as user_id. Raises UserError
        for a row without a time, by its place in the file."""
        rows = self._rows.read(part.first, part.end)
        check_rows(rows, lambda row: self._rows.where(part.first + row))
        names = ids(rows["user_id"])
        users = names.rle().struct.field("value").alias("user_id")
        return (users.cast(pl.Int64) if self._numbers else users,
                rows.with_columns(names.rle_id().cast(pl.Int64).alias("user_id")))

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


# -- rows ---------------------------------------------------------------------------------------------------------


class _Whole:
    """Rows in memory."""

    def __init__(self, table: Table):
        self._table, self.kinds, self.spans = table, table.frame.schema, [(0, table.frame.height)]

    def read(self, first: int, end: int, columns: list[str] | None = None) -> pl.DataFrame:
        """Rows [first, end); None: all columns."""
        return self._table.frame.select(columns or pl.all()).slice(first, end - first)

    def where(self, row: int) -> str:
        """The row's place, in words."""
        return self._table.where(row)


class _Parquet:
    """Files of which only what is asked for is read, with the columns and types that `files.read_parts` gives them:
    those of all parts, each as wide as any part has it. Raises UserError where there is no such type."""

    def __init__(self, path: Path | str, files: list[Path]):
        self._files = files
        kinds, heights = zip(*(_scanned(file, lambda scan: (
            scan.collect_schema(), scan.select(pl.len()).collect().item())) for file in files), strict=True)
        self._none = below_each_other(path, [pl.DataFrame(schema=kind) for kind in kinds])
        self.kinds, self.spans = self._none.schema, list(pairwise(accumulate(heights, initial=0)))
        """Of columns; and each file's rows [first, end)."""

    def read(self, first: int, end: int, columns: list[str] | None = None) -> pl.DataFrame:
        """Rows [first, end); None: all columns."""
        wanted = columns or self._none.columns
        pieces = [self._none.select(wanted), *self._pieces(first, end, wanted)]
        return pl.concat(pieces, how="diagonal_relaxed")

    def _pieces(self, first: int, end: int, wanted: list[str]) -> Iterator[pl.DataFrame]:
        for number in range(self._file_of(first), len(self._files)):
            start, stop = self.spans[number]
            if start >= end:
                return
            if (count := min(end, stop) - (here := max(first, start))) > 0:
                yield _scanned(self._files[number], lambda scan, at=here - start, count=count: scan.slice(at, count)
                               .select([name for name in wanted if name in scan.collect_schema()]).collect())

    def _file_of(self, row: int) -> int:
        return bisect_right(self.spans, row, key=lambda span: span[1])

    def where(self, row: int) -> str:
        """The row's place, in words."""
        number = self._file_of(row)
        return f"{self._files[number]}: row {row - self.spans[number][0] + 1}"


def _scanned(file: Path, read: Callable[[pl.LazyFrame], _T]) -> _T:
    """What `read` makes of a Parquet file."""
    try:
        with reading(file):
            return read(pl.scan_parquet(file, glob=False))
    except (*POLARS_ERRORS, OSError) as error:
        raise UserError(f"{file} is not readable as Parquet: {reason(error)}; write it again") from None
