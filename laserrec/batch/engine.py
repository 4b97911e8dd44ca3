"""`laserrec batch`: histories -> a folder of recommendations, part by part.

  OUT/manifest.json         what goes in: digests of the input, the model, the index, the settings
  OUT/part-000000.parquet   user_id, item_id, score, rank of one part's users, in the input's order
  OUT/done.json             numbers of the finished run

Every user of the input is in exactly one part. A user who can't be answered, because no item of the history is known or
because nothing is left to recommend, has one row in which item_id, score and rank are null. A part's footer holds what
was lost in it.

Each part is written to a temporary name and renamed; which parts are there says what is done. A killed run goes on with
the missing parts. The manifest comes with the first part: a run that fails before leaves the folder to other settings.
A part depends on its users alone, so that it doesn't matter who writes it: this module's loop, other shards, or the
workers of `laserrec.batch.ray_engine`.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from laserrec.batch.exclusion import Exclusions
from laserrec.batch.source import Part, Source, digest_of_ends
from laserrec.data.door import Asked, read_histories
from laserrec.data.files import FileOptions, parts_of
from laserrec.data.losses import Losses
from laserrec.recommender.folder import known_items, model_identity
from laserrec.recommender.ranking import Ask, Ranked
from laserrec.recommender.recommender import LaserRecommender
from laserrec.retrieval.folder import index_kind
from laserrec.util.errors import UserError
from laserrec.util.interrupt import DeferredInterrupt
from laserrec.util.io import check_folder, clean, json_text, new_file, parquet_bytes, read_json, write_json, write_once
from laserrec.util.memory import rows_at_once
from laserrec.util.progress import Progress

_FORMAT, _LOST, _MANIFEST = 3, "laserrec", "manifest.json"


@dataclass(frozen=True)
class BatchSettings:
    """What decides the output. Raises UserError for values that can't be."""

    k: int = 10
    exclude_seen: bool = False
    chunk: int = 4096
    """Users per part."""
    unknown: str = "drop"
    """Items of a history that the model doesn't know: "drop" leaves them out, "error" stops."""
    exclude: tuple[str, ...] = ()
    """Item ids that nobody is recommended."""

    def __post_init__(self) -> None:
        if self.k < 1 or self.chunk < 1:
            raise UserError(f"k is {self.k} and chunk is {self.chunk}; both must be at least 1")
        if self.unknown not in ("error", "drop"):
            raise UserError(f'unknown is "error" or "drop", not {self.unknown!r}')


@dataclass(frozen=True)
class Job:
    """All that a run, or a worker on another machine, is told."""

    model: Path
    histories: Path
    out: Path
    settings: BatchSettings = BatchSettings()
    index: Path | None = None
    """Folder of the model's index; None: compare with all items."""
    exclude_file: Path | None = None
    """A table of items not to be recommended: user_id and item_id, or item_id alone for all users."""
    device: str = "auto"
    backbone: str | None = None
    """The LLM, where it is not what the model names."""
    trust_remote_code: bool = False
    reading: FileOptions = field(default_factory=FileOptions)
    """How the histories and `exclude_file` are read where they are text."""


@dataclass(frozen=True)
class Plan:
    """What a run has to do."""

    source: Source
    manifest: dict[str, Any]
    count: int
    """Parts of the folder."""
    own: int
    """Parts of this run's shard."""
    todo: list[Part]
    """Those of them that are missing."""
    exclusions: Exclusions | None
    """None where nothing is excluded."""


def run(job: Job, shard: tuple[int, int] = (1, 1), progress: bool = True, model: LaserRecommender | None = None
        ) -> dict[str, Any]:
    """Recommend for every user of the input, in this process. shard: (i, n) does the i-th of n shares of the parts, so
    that n machines fill one folder. model: `job.model`, loaded already, with its index.

    Returns {users, answered, no_known_item, nothing_left, items, unknown_items, parts, parts_missing} of the folder:
    users without a known item, users for whom exclusions left nothing, items of all histories and those dropped.
    Raises UserError for bad input, for a folder that another input, model or other settings began, and where no item of
    any history is known.
    """

    def here(work: Plan) -> AbstractContextManager[Iterator[None]]:
        worker = Worker(job, work.source, work.manifest, model, work.exclusions)
        return nullcontext(worker.write(part) for part in work.todo)

    return complete(job, shard, progress, here)


def complete(job: Job, shard: tuple[int, int], progress: bool,
             working: Callable[[Plan], AbstractContextManager[Iterator[None]]]) -> dict[str, Any]:
    """As `run`. working: opens an iterator that writes a missing part with each step."""
    work = plan(job, shard)
    if work.exclusions is not None:
        work.exclusions.tell(work.source)
    if work.todo:
        chunk = job.settings.chunk
        done = (work.own - len(work.todo)) * chunk
        with (working(work) as parts, DeferredInterrupt() as interrupt,
              Progress("recommending", work.own * chunk, progress, done=done) as bar):
            for _ in parts:
                bar.advance(chunk)
                interrupt.check()
    return summary(job, work)


# -- what there is to do --------------------------------------------------------------------------------------------


def plan(job: Job, shard: tuple[int, int] = (1, 1)) -> Plan:
    """Look at the input and the folder, see what is missing. Raises UserError as `run`."""
    source = Source(job.histories, job.reading)
    manifest = {"format": _FORMAT, "input": source.ends(), "separator": job.reading.separator,
                "encoding": job.reading.encoding, "model": model_identity(job.model),
                "index": None if job.index is None else str(index_kind(job.index)), **asdict(job.settings),
                "exclude": exclusion_digest(job)}
    parts = source.parts(job.settings.chunk)
    _check_out(job.out, manifest)
    clean(job.out)
    own = [part for part in parts if part.number % shard[1] == shard[0] - 1]
    todo = [part for part in own if not part_file(job.out, part.number).is_file()]
    excludes = job.settings.exclude or job.exclude_file
    return Plan(source, manifest, len(parts), len(own), todo,
                exclusions(job, known_items(job.model)) if excludes else None)


def exclusions(job: Job, known: Mapping[str, int]) -> Exclusions:
    """What the job excludes. known: item id -> row. Raises UserError for a file of another shape."""
    return Exclusions(job.settings.exclude, job.exclude_file, job.reading, known)


def exclusion_digest(job: Job) -> dict[str, Any] | None:
    """Tells what is excluded from other exclusions."""
    file = None if job.exclude_file is None else digest_of_ends(parts_of(job.exclude_file))
    return {"items": sorted(job.settings.exclude), "file": file} if job.settings.exclude or file else None


def _check_out(out: Path, manifest: dict[str, Any]) -> None:
    check_folder(out)
    if (out / _MANIFEST).is_file():
        _check_manifest(out, manifest)
    elif out.is_dir() and any(not entry.name.startswith(".") for entry in out.iterdir()):  # another shard's, just now
        raise UserError(f"{out} holds other files; name another folder")


def _claim(out: Path, manifest: dict[str, Any]) -> None:
    """Raises UserError where another run was faster, with other settings."""
    if not (out / _MANIFEST).is_file():
        write_once(out / _MANIFEST, json_text(manifest))
    _check_manifest(out, manifest)


def _check_manifest(out: Path, manifest: dict[str, Any]) -> None:
    if other := differing(manifest, out / _MANIFEST):
        raise UserError(f"{out} was begun with another {', '.join(other)}; name another folder or delete it")


def differing(manifest: dict[str, Any], file: Path) -> list[str]:
    """Names of what differs from a manifest file. Raises UserError for a damaged one."""
    found = read_json(file, "name another folder")
    if not isinstance(found, dict):
        raise UserError(f"{file} is damaged: it holds no names; name another folder")
    return [name for name in manifest if manifest[name] != found.get(name)]


def part_file(out: Path, number: int) -> Path:
    """Path of the part of this number, from 0."""
    return out / f"part-{number:06}.parquet"


def parts_in(out: Path) -> int:
    """How many parts a folder has."""
    return sum(1 for _ in out.glob("part-*.parquet"))


# -- one part after the other ---------------------------------------------------------------------------------------


class Worker:
    """A loaded model that writes parts of a job. excluded: what the job excludes, read already. Raises UserError for a
    model or an index that can't be loaded."""

    def __init__(self, job: Job, source: Source, manifest: dict[str, Any], model: LaserRecommender | None = None,
                 excluded: Exclusions | None = None):
        self.job, self.source, self._manifest = job, source, manifest
        if model is None:
            model = LaserRecommender.from_pretrained(job.model, job.backbone, device=job.device,
                                                     trust_remote_code=job.trust_remote_code)
            model.use_index(job.index)
        self.model = model
        self.known = model.rows
        self._exclusions = excluded or exclusions(job, self.known)

    def write(self, part: Part) -> None:
        """Recommend for a part's users; whole or not at all. Raises UserError for unknown items, if they shall stop
        it, and for a folder that another run has begun meanwhile."""
        users, histories = self.source.read(part)
        asked = read_histories(histories, self.known, "drop", tell=False)
        if self.job.settings.unknown == "error" and (asked.lost.unknown or asked.lost.empty_users):
            self._refuse(users, histories)
        answers = self._answers(users, asked)
        counts = [max(1, len(answer.items)) for answer in answers]
        frame = pl.DataFrame({
            "user_id": users.gather(np.repeat(np.arange(len(users)), counts)),
            "item_id": [i for a in answers for i in self.model.item_ids(a.items) or [None]],
            "score": [s for a in answers for s in a.scores.tolist() or [None]],
            "rank": [r for a in answers for r in range(1, len(a.items) + 1) or [None]],
        }, schema_overrides={"item_id": pl.String, "score": pl.Float32, "rank": pl.Int32})
        nothing = sum(not len(a.items) for a in answers) - asked.lost.empty_users
        lost = {**asdict(asked.lost), "examples": asked.lost.examples[:20], "nothing_left": nothing}
        with new_file(part_file(self.job.out, part.number)) as file:
            file.write_bytes(parquet_bytes(frame, {_LOST: json.dumps(lost)}))
            _claim(self.job.out, self._manifest)

    def _answers(self, users: pl.Series, asked: Asked) -> list[Ranked]:
        """In the users' order; empty where no item is known or nothing is left."""
        model, settings = self.model, self.job.settings
        asks = [Ask(np.array(rows, dtype=np.int64), settings.k, settings.exclude_seen, None, self._exclusions.of(user))
                for user, rows in zip(users.to_list(), asked.rows, strict=True)]
        size = rows_at_once(len(model.items) if model.index is None else settings.k, model.batch_size)
        return [answer for at in range(0, len(asks), size) for answer in model.rank(asks[at : at + size])]

    def _refuse(self, users: pl.Series, histories: pl.DataFrame) -> None:
        """Raise the error of the first user who has one, under the user's own name."""
        for place, user in enumerate(users.to_list()):
            try:
                read_histories(histories.filter(pl.col("user_id") == place).with_columns(user_id=pl.lit(str(user))),
                               self.known, "error")
            except UserError as error:
                raise UserError(f"{self.source.path}: {error}") from None


# -- what came out --------------------------------------------------------------------------------------------------


def summary(job: Job, work: Plan) -> dict[str, Any]:
    """Numbers of the whole folder; done.json once nothing is missing. Warns of large losses and raises UserError where
    no item was known."""
    files = [file for number in range(work.count) if (file := part_file(job.out, number)).is_file()]
    found = [_lost(file) for file in files]
    nothing, lost = sum(n for _, n in found), sum((lost for lost, _ in found), Losses())
    result = {"users": work.source.n_users, "answered": lost.users - lost.empty_users - nothing,
              "no_known_item": lost.empty_users, "nothing_left": nothing, "items": lost.items,
              "unknown_items": lost.unknown, "parts": work.count, "parts_missing": work.count - len(files)}
    if not result["parts_missing"]:
        known = known_items(job.model)
        try:
            lost.tell(known)
        except UserError:  # no item is known: a mended input may have the folder
            for file in (*files, job.out / _MANIFEST):
                file.unlink(missing_ok=True)
            raise
        write_json(job.out / "done.json", result)
    return result


def _lost(file: Path) -> tuple[Losses, int]:
    """What a part's footer says, and its users for whom nothing was left."""
    try:
        facts: dict[str, Any] = json.loads(pl.read_parquet_metadata(file)[_LOST])
        nothing = int(facts.pop("nothing_left"))
        facts["examples"] = tuple(facts["examples"])
        return Losses(**facts), nothing
    except (*(pl.exceptions.PolarsError, OSError), ValueError, KeyError, TypeError):
        raise UserError(f"{file} is damaged; delete it and run the same command again") from None
