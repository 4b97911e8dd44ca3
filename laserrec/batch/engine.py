"""`laserrec batch`: a file of histories -> a folder of recommendations, chunk by chunk.

  OUT/manifest.json            what goes in: the input's size and digest, the model, the index, the settings
  OUT/part-000000.parquet      user_id, item_id, score, rank of one chunk of users, in the input's order
  OUT/skipped/part-...parquet  user_id, reason: users for whom nothing can be recommended
  OUT/done.json                numbers of the finished run

Each part is written to a temporary name and renamed; which parts are there says what is done. A killed run goes on with
the missing parts, and every user is in exactly one part. A part depends on its users alone, so that it doesn't matter
who writes it: this module's loop, other shards, or the workers of `laserrec.batch.ray_engine`.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from laserrec.recommender.folder import model_identity
from laserrec.recommender.recommender import LaserRecommender
from laserrec.util.errors import UserError
from laserrec.util.interrupt import DeferredInterrupt
from laserrec.util.io import read_json, write_json, write_parquet
from laserrec.util.progress import Progress

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


@dataclass(frozen=True)
class Part:
    """One part's number, and its rows [first, end) of the input."""

    number: int
    first: int
    end: int


class HistoryFile:
    """A Parquet file with a row per user (user_id, items: a list) or per interaction (user_id, item_id; a user's rows
    together, oldest first). Raises UserError for another shape. Opening it reads no rows; the users are found, and
    what is wrong with them is told, when they are first asked for."""

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

    @cached_property
    def _starts(self) -> np.ndarray:
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

    def parts(self, chunk: int) -> list[Part]:
        """All parts of `chunk` users each."""
        edges = [*range(0, self.n_users, chunk), self.n_users]
        rows = self._starts[edges].tolist()
        return [Part(number, a, b) for number, (a, b) in enumerate(pairwise(rows))]

    def read(self, part: Part) -> Iterator[tuple[Any, list[str]]]:
        """(user_id, item ids) of a part's users."""
        frame = self._rows.slice(part.first, part.end - part.first).collect()
        if not self.listed:
            frame = frame.group_by("user_id", maintain_order=True).agg(pl.col("item_id").alias("items"))
        for user, items in frame.iter_rows():
            yield user, [str(i) for i in items or [] if i is not None]

    def ends(self) -> dict[str, Any]:
        """Size and a digest of both ends: tells this input from another."""
        size = self.file.stat().st_size
        with open(self.file, "rb") as file:
            ends = file.read(_DIGEST_BYTES)
            file.seek(max(0, size - _DIGEST_BYTES))
            ends += file.read()
        return {"bytes": size, "sha256_of_ends": hashlib.sha256(ends).hexdigest()}


@dataclass(frozen=True)
class Plan:
    """What a run has to do."""

    source: HistoryFile
    manifest: dict[str, Any]
    numbers: range
    """Of all parts of the folder."""
    own: int
    """Parts of this run's shard."""
    todo: list[Part]
    """Those of them that are missing."""


def plan(model_folder: Path, histories: Path, out: Path, settings: BatchSettings, shard: tuple[int, int] = (1, 1),
         index: str | None = None) -> Plan:
    """Look at the input, claim the folder, see what is missing. index: its kind.

    Raises UserError for bad input, and for a folder that another input, model, index or other settings began.
    """
    source = HistoryFile(histories)
    manifest = {"format": 1, "input": {**source.ends(), "users": source.n_users}, "model": model_identity(model_folder),
                "index": index, **asdict(settings)}
    parts = source.parts(settings.chunk)
    _claim(out, manifest)
    own = [part for part in parts if part.number % shard[1] == shard[0] - 1]
    return Plan(source, manifest, range(len(parts)), len(own), [p for p in own if not _file(out, p.number).is_file()])


def run(model: LaserRecommender, model_folder: Path, histories: Path, out: Path, settings: BatchSettings,
        shard: tuple[int, int] = (1, 1), progress: bool = True) -> dict[str, Any]:
    """Recommend for every user of the file, in this process, through the model's index if it has one. shard: (i, n)
    does the i-th of n shares of the parts, so that n machines fill one folder. Returns {"users", "skipped", "parts",
    "parts_missing"} of the whole folder.

    Raises UserError for bad input, and for a folder that another input, model or other settings began.
    """
    work = plan(model_folder, histories, out, settings, shard, None if model.index is None else model.index.kind)
    with DeferredInterrupt() as interrupt, bar_of(work, settings.chunk, progress) as bar:
        for part in work.todo:
            write_part(model, work.source, out, part, settings)
            bar.advance(settings.chunk)
            interrupt.check()
    return summary(out, work)


def bar_of(work: Plan, chunk: int, show: bool) -> Progress:
    """A progress bar over users."""
    return Progress("recommending", work.own * chunk, show, done=(work.own - len(work.todo)) * chunk)


def _claim(out: Path, manifest: dict[str, Any]) -> None:
    file = out / "manifest.json"
    if file.is_file():
        found = read_json(file, "name another folder")
        if other := differing(manifest, found):
            raise UserError(f"{out} was begun with another {', '.join(other)}; name another folder or delete it")
    elif out.is_dir() and any(not entry.name.startswith(".") for entry in out.iterdir()):  # another shard's, just now
        raise UserError(f"{out} holds other files; name another folder")
    else:
        write_json(file, manifest)


def differing(manifest: dict[str, Any], found: dict[str, Any]) -> list[str]:
    """Names of what differs; what an older manifest doesn't name yet is None."""
    return [name for name in manifest if manifest[name] != found.get(name)]


def _file(out: Path, number: int, skipped: bool = False) -> Path:
    return (out / "skipped" if skipped else out) / f"part-{number:06}.parquet"


def parts_in(out: Path) -> int:
    """How many parts a folder has."""
    return sum(1 for _ in out.glob("part-*.parquet"))


def write_part(model: LaserRecommender, source: HistoryFile, out: Path, part: Part, settings: BatchSettings) -> None:
    """Recommend for a part's users; whole or not at all. Raises UserError for unknown items, if they shall stop it."""
    rows: dict[Any, list[str]] = {}
    skipped = []
    for user, items in source.read(part):
        gone = set(model.unknown_items(items))
        if gone and settings.unknown == "error":
            raise UserError(f"{source.file}: the history of user {user!r} holds unknown items, first "
                            f"{sorted(gone)[:3]}; --unknown skip leaves them out")
        if known := [i for i in items if i not in gone]:
            rows[user] = known
        else:
            skipped.append({"user_id": user, "reason": "no known item" if items else "empty history"})
    if skipped:  # before the part, whose presence says that all of it is done
        write_parquet(_file(out, part.number, skipped=True), pl.DataFrame(skipped, schema={
            "user_id": source.user_type, "reason": pl.String}))
    frame = pl.DataFrame(schema={"user_id": source.user_type, "item_id": pl.String, "score": pl.Float32,
                                 "rank": pl.Int32})
    if rows:
        frame = model.recommend(list(rows.values()), k=settings.k, exclude_seen=settings.exclude_seen)
        users = pl.Series("user_id", list(rows), dtype=source.user_type)
        frame = frame.with_columns(users.gather(frame["user_id"]).alias("user_id"))
    write_parquet(_file(out, part.number), frame)


def summary(out: Path, work: Plan) -> dict[str, Any]:
    """Numbers of the whole folder; done.json once nothing is missing."""
    missing = sum(not _file(out, number).is_file() for number in work.numbers)
    files = [_file(out, number, skipped=True) for number in work.numbers]
    skipped = sum(pl.scan_parquet(f).select(pl.len()).collect().item() for f in files if f.is_file())
    result = {"users": work.source.n_users, "skipped": skipped, "parts": len(work.numbers), "parts_missing": missing}
    if not missing:
        write_json(out / "done.json", json.loads(json.dumps(result)))
    return result
