"""`laserrec batch`: a file of histories -> a folder of recommendations, chunk by chunk.

  OUT/manifest.json            what goes in: the input's size and digest, the model, the settings
  OUT/part-000000.parquet      user_id, item_id, score, rank of one chunk of users, in the input's order
  OUT/skipped/part-...parquet  user_id, reason: users for whom nothing can be recommended
  OUT/done.json                numbers of the finished run

Each part is written to a temporary name and renamed; which parts are there says what is done. A killed run goes on with
the next missing part, and every user is in exactly one part.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from laserrec.errors import UserError
from laserrec.interrupt import DeferredInterrupt
from laserrec.io import read_json, write_json, write_parquet
from laserrec.model_folder import model_identity
from laserrec.progress import Progress
from laserrec.recommender import LaserRecommender

_DIGEST_BYTES = 1 << 20


@dataclass(frozen=True)
class BatchSettings:
    """What decides the output."""

    k: int = 10
    exclude_seen: bool = False
    chunk: int = 4096
    """Users per part."""
    unknown: str = "skip"
    """Items that the model doesn't know: "skip" leaves them out of the history, "error" stops."""


class HistoryFile:
    """A Parquet file with a row per user (user_id, items: a list) or per interaction (user_id, item_id; a user's rows
    together, oldest first). Raises UserError for another shape."""

    def __init__(self, file: Path):
        self.file = file
        try:
            self._rows = pl.scan_parquet(file)
            schema = self._rows.collect_schema()
            self.n_rows = self._rows.select(pl.len()).collect().item()
        except FileNotFoundError:
            raise UserError(f"no such file: {file}") from None
        except (pl.exceptions.PolarsError, OSError) as error:
            raise UserError(f"{file} is not a Parquet file: {str(error).splitlines()[0]}") from None
        self.listed = "items" in schema
        wanted = ("user_id", "items" if self.listed else "item_id")
        missing = [c for c in wanted if c not in schema]
        if missing or (self.listed and not isinstance(schema["items"], pl.List)):
            raise UserError(f"{file}: give the columns user_id and items (a list), or user_id and item_id; there are: "
                            f"{', '.join(f'{n} {t}' for n, t in schema.items())}")
        self.user_type = schema["user_id"]
        self._rows = self._rows.select(wanted)
        self._starts = self._user_starts()

    def _user_starts(self) -> np.ndarray:
        """Int64[users + 1]: the row where each user begins, and the end."""
        if self._rows.select(pl.col("user_id").is_null().any()).collect().item():
            row = self._rows.select(pl.col("user_id").is_null().arg_max()).collect().item()
            raise UserError(f"{self.file}: row {row + 1} has no user_id")
        first = pl.col("user_id") != pl.col("user_id").shift()
        runs = self._rows.select("user_id").with_row_index("row").filter(first.fill_null(True))
        repeated = runs.group_by("user_id").agg(pl.len(), pl.col("row").max()).filter(pl.col("len") > 1)
        twice = repeated.sort("row").head(1).collect()
        if twice.height:
            user, _, row = twice.row(0)
            advice = "give each user one row" if self.listed else "sort the file by user_id and time"
            raise UserError(f"{self.file}: user {user!r} comes again at row {row + 1}; {advice}")
        starts = runs.select("row").collect()["row"].to_numpy().astype(np.int64)
        if self.listed and len(starts) < self.n_rows:
            row = int(np.flatnonzero(np.r_[np.diff(starts), self.n_rows - starts[-1]] > 1)[0]) + 2
            raise UserError(f"{self.file}: the user of row {row} has another row before; give each user one row")
        return np.r_[starts, self.n_rows]

    @property
    def n_users(self) -> int:
        return len(self._starts) - 1

    def read(self, first: int, count: int) -> Iterator[tuple[Any, list[str]]]:
        """(user_id, item ids) of the users from `first` on."""
        a, b = self._starts[first], self._starts[min(first + count, self.n_users)]
        frame = self._rows.slice(int(a), int(b - a)).collect()
        if not self.listed:
            frame = frame.group_by("user_id", maintain_order=True).agg(pl.col("item_id").alias("items"))
        for user, items in frame.iter_rows():
            yield user, [str(i) for i in items or [] if i is not None]

    def identity(self) -> dict[str, Any]:
        """Size and a digest of both ends: tells this input from another."""
        size = self.file.stat().st_size
        with open(self.file, "rb") as file:
            ends = file.read(_DIGEST_BYTES)
            file.seek(max(0, size - _DIGEST_BYTES))
            ends += file.read()
        return {"bytes": size, "sha256_of_ends": hashlib.sha256(ends).hexdigest(), "users": self.n_users}


def run(model: LaserRecommender, model_folder: Path, histories: Path, out: Path, settings: BatchSettings,
        shard: tuple[int, int] = (1, 1), progress: bool = True) -> dict[str, Any]:
    """Recommend for every user of the file. shard: (i, n) does the i-th of n shares of the parts, so that n machines
    fill one folder. Returns {"users", "skipped", "parts", "parts_missing"} of the whole folder.

    Raises UserError for bad input, and for a folder that another input, model or other settings began.
    """
    source = HistoryFile(histories)
    _claim(out, {"format": 1, "input": source.identity(), "model": model_identity(model_folder), **asdict(settings)})
    parts = range(-(-source.n_users // settings.chunk))
    own = [p for p in parts if p % shard[1] == shard[0] - 1]
    todo = [p for p in own if not _part(out, p).is_file()]
    done = (len(own) - len(todo)) * settings.chunk
    with (DeferredInterrupt() as interrupt,
          Progress("recommending", len(own) * settings.chunk, progress, done=done) as bar):
        for part in todo:
            _write_part(model, source, out, part, settings)
            bar.advance(settings.chunk)
            interrupt.check()
    return _summary(out, parts, source.n_users)


def _claim(out: Path, manifest: dict[str, Any]) -> None:
    file = out / "manifest.json"
    if file.is_file():
        found = read_json(file, "name another folder")
        other = [name for name in manifest if manifest[name] != found.get(name)]
        if other:
            raise UserError(f"{out} was begun with another {', '.join(other)}; name another folder or delete it")
    elif out.is_dir() and any(out.iterdir()):
        raise UserError(f"{out} holds other files; name another folder")
    else:
        write_json(file, manifest)


def _part(out: Path, part: int, skipped: bool = False) -> Path:
    return (out / "skipped" if skipped else out) / f"part-{part:06}.parquet"


def _write_part(model: LaserRecommender, source: HistoryFile, out: Path, part: int, settings: BatchSettings) -> None:
    rows: dict[Any, list[str]] = {}
    skipped = []
    for user, items in source.read(part * settings.chunk, settings.chunk):
        gone = set(model.unknown_items(items))
        if gone and settings.unknown == "error":
            raise UserError(f"{source.file}: the history of user {user!r} holds unknown items, first "
                            f"{sorted(gone)[:3]}; --unknown skip leaves them out")
        if known := [i for i in items if i not in gone]:
            rows[user] = known
        else:
            skipped.append({"user_id": user, "reason": "no known item" if items else "empty history"})
    if skipped:  # before the part, whose presence says that all of it is done
        write_parquet(_part(out, part, skipped=True), pl.DataFrame(skipped, schema={
            "user_id": source.user_type, "reason": pl.String}))
    frame = pl.DataFrame(schema={"user_id": source.user_type, "item_id": pl.String, "score": pl.Float32,
                                 "rank": pl.Int32})
    if rows:
        frame = model.recommend(list(rows.values()), k=settings.k, exclude_seen=settings.exclude_seen)
        users = pl.Series("user_id", list(rows), dtype=source.user_type)
        frame = frame.with_columns(users.gather(frame["user_id"]).alias("user_id"))
    write_parquet(_part(out, part), frame)


def _summary(out: Path, parts: range, users: int) -> dict[str, Any]:
    missing = sum(not _part(out, part).is_file() for part in parts)
    files = [_part(out, part, skipped=True) for part in parts]
    skipped = sum(pl.scan_parquet(f).select(pl.len()).collect().item() for f in files if f.is_file())
    result = {"users": users, "skipped": skipped, "parts": len(parts), "parts_missing": missing}
    if not missing:
        write_json(out / "done.json", json.loads(json.dumps(result)))
    return result
