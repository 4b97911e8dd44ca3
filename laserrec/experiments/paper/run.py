"""Run a table of the paper on data sets, for one or more base presets and seeds: resumable, within a budget of time,
in several processes if asked to."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, replace
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError

from laserrec.config import Config, merge
from laserrec.data.dataset import Dataset
from laserrec.experiments.paper.spec import EXPERIMENTS, Experiment, published_of, shown_name, table7_rows
from laserrec.experiments.table import Measured, Row, Table, chosen, earlier, rank
from laserrec.util.device import choose
from laserrec.util.errors import UserError
from laserrec.util.io import write_json


@dataclass(frozen=True)
class Setup:
    """Where and how; the same for all rows of a call."""

    data: Mapping[str, Path]
    """Name -> data folder."""
    bases: Mapping[str, Config]
    """Preset -> its settings with the caller's own laid over them."""
    out: Path
    """OUT/DATA/BASE holds the models, OUT/NAME.json the result."""
    device: str = "auto"
    progress: bool = True


Job = tuple[str, str, str, int | None]
"""Data set, base, row, seed."""


def reproduce(name: str, setup: Setup, seeds: Sequence[int], until: float | None = None, workers: int = 1,
              models: Sequence[str] | None = None) -> dict[str, Any]:
    """Fit and measure what is not there yet, and collect. {experiment, title, split, rows, missing}: each row is
    {data, base, model, kind, seed, recall@k, ndcg@k, mrr, train_seconds, seconds, published, fingerprint}; missing:
    rows of this call that the settings of a base rule out, with the reason, or that the budget left undone. Written to
    OUT/NAME.json after each row. What stands there of other data sets and bases stays, and of those of this call what
    was measured with the same settings.

    until: from this time.monotonic on nothing new is begun; the same call goes on. workers: processes; what several
    rows share (item texts, ID models) is made first, in this one. Raises UserError for an unknown name.
    """
    if name not in EXPERIMENTS:
        raise UserError(f"there is no {name!r}; there are: {', '.join(EXPERIMENTS)}")
    found = _Found(EXPERIMENTS[name](), setup)
    jobs = [job for data in setup.data for base in setup.bases for job in found.find(data, base, seeds, models)]
    found.write()
    done = set()
    for job, measured in _run(name, setup, jobs, until, workers):
        found.add(job, measured)
        found.write()
        done.add(job)
    found.missing += [{"data": job[0], "base": job[1], "model": found.shown[job[:3]], "seed": job[3],
                       "why": "the budget was used up"} for job in jobs if job not in done]
    return found.result()


def _run(name: str, setup: Setup, jobs: Sequence[Job], until: float | None, workers: int
         ) -> Iterator[tuple[Job, Measured]]:
    experiment = EXPERIMENTS[name]()
    tables: dict[tuple[str, str], Table] = {}
    for job in jobs if workers == 1 else ():
        if late(until):
            return
        data, base, row, seed = job
        if (data, base) not in tables:
            tables = {(data, base): _table(experiment, setup, data, base)}  # one in memory at a time
        yield job, tables[data, base].result(row, seed)
    if workers > 1 and jobs:
        for data, base in dict.fromkeys(job[:2] for job in jobs):
            own = [job for job in jobs if job[:2] == (data, base)]
            shared = _table(experiment, setup, data, base)
            shared.prepare([(row, seed) for _, _, row, seed in own], partial(late, until))
        if late(until):
            return
        threads = max(1, torch.get_num_threads() // workers)
        with ProcessPoolExecutor(workers, get_context("spawn"), torch.set_num_threads, (threads,)) as pool:
            quiet = Setup(setup.data, setup.bases, setup.out, setup.device, progress=False)
            waiting = {pool.submit(_job, name, quiet, job, until): job for job in jobs}
            for future in as_completed(waiting):
                if (measured := future.result()) is not None:
                    yield waiting[future], measured


def late(until: float | None) -> bool:
    """Whether this time.monotonic is over; None never is."""
    return until is not None and time.monotonic() > until


def _job(name: str, setup: Setup, job: Job, until: float | None) -> Measured | None:
    """One row in a process of its own; None where the time is over. time.monotonic is the machine's, for all."""
    if late(until):
        return None
    data, base, row, seed = job
    return _table(EXPERIMENTS[name](), setup, data, base).result(row, seed)


def _wanted(experiment: Experiment, base: Config) -> tuple[Row, ...]:
    if experiment.name == "table7":
        return table7_rows(base.mformer.experts, base.mformer.queries)
    return experiment.rows


def _table(experiment: Experiment, setup: Setup, data: str, base: str) -> Table:
    """All experiments on one data set and base share a folder, so that what several have in common is fitted once."""
    config, dataset = setup.bases[base], Dataset.load(setup.data[data])
    others = [str(folder) for name, folder in setup.data.items() if name != data]
    rows = [_with_other(row, others) for row in _wanted(experiment, config)]
    return Table(rows, dataset, config, setup.out / data / base, choose(setup.device), setup.progress,
                 measure=partial(rank, split=experiment.split), measured_by=experiment.split)


def _with_other(row: Row, others: Sequence[str]) -> Row:
    """RecGURU learns from two data sets, if there is a second one."""
    if row.method != "recguru" or not others:
        return row
    return replace(row, settings=merge(row.settings, {"recguru": {"other": others[0]}}))


def _ruled_out(row: Row, base: Config) -> str | None:
    """Why a row can't be fitted on this base; None if it can."""
    try:
        Config.model_validate(merge(base.model_dump(), row.settings))
    except ValidationError as error:
        return error.errors()[0]["msg"].removeprefix("Value error, ")
    return None


class _Found:
    """Rows so far."""

    def __init__(self, experiment: Experiment, setup: Setup):
        self.experiment, self.setup = experiment, setup
        self.rows: list[dict[str, Any]] = []
        self.missing: list[dict[str, Any]] = []
        self.shown: dict[tuple[str, str, str], str] = {}
        """Data set, base and row -> the row's name in the result."""
        k = next(iter(setup.bases.values())).eval.k
        numbers = (f"recall@{k}", f"ndcg@{k}", "mrr", "train_seconds")
        self.earlier = earlier(self.file, ("data", "base", "model", "seed", *numbers))

    @property
    def file(self) -> Path:
        return self.setup.out / f"{self.experiment.name}.json"

    def find(self, data: str, base: str, seeds: Sequence[int], models: Sequence[str] | None) -> list[Job]:
        """Add what was measured of a data set and base before; returns what is left to measure."""
        table, jobs = _table(self.experiment, self.setup, data, base), []
        asked = chosen([*table.rows], models, self.experiment.name)
        before = [row["seed"] for row in self.earlier
                  if (row["data"], row["base"]) == (data, base) and row["seed"] is not None]
        for name, row in table.rows.items():
            if (why := _ruled_out(row, table.config)) is not None:
                self.shown[data, base, name] = name
                self.missing.append({"data": data, "base": base, "model": name, "why": why})
                continue
            self.shown[data, base, name] = shown_name(row, table.settings(name))
            wanted: Sequence[int | None] = seeds if row.seeded else [None]
            for seed in dict.fromkeys([*wanted, *(before if row.seeded else ())]):
                if (kept := table.kept(name, seed)) is not None:
                    self.add((data, base, name, seed), kept)
                elif name in asked and seed in wanted:
                    jobs.append((data, base, name, seed))
        return jobs

    def add(self, job: Job, measured: Measured) -> None:
        own = {key: value for key, value in measured.items() if key not in ("model", "ranks", "split", "users")}
        shown = self.shown[job[:3]]
        self.rows.append({"data": job[0], "base": job[1], "model": shown, **own,
                          "published": published_of(self.experiment, shown)})

    def write(self) -> None:
        write_json(self.file, self.result())

    def result(self) -> dict[str, Any]:
        rows = [*self.rows, *self._others()]
        return {"experiment": self.experiment.name, "title": self.experiment.title, "split": self.experiment.split,
                "rows": sorted(rows, key=self._place(rows)), "missing": self.missing}

    def _others(self) -> list[dict[str, Any]]:
        """Rows of the file that this call can't measure: of other data sets and bases, and under names that no row has
        with these settings. A row that has got another name is known by its fingerprint."""
        mine = {(data, base, shown) for (data, base, _), shown in self.shown.items()}
        prints = {(row["data"], row["base"], row["fingerprint"]) for row in self.rows}
        return [row for row in self.earlier if (row["data"], row["base"], row["model"]) not in mine
                and (row["data"], row["base"], row.get("fingerprint")) not in prints]

    def _place(self, rows: Sequence[dict[str, Any]]) -> Callable[[dict[str, Any]], tuple[int, int, int, str, int]]:
        names = [own.name for own in self.experiment.rows]
        data, bases = ([*dict.fromkeys([*given, *(row[key] for row in rows)])]
                       for key, given in (("data", self.setup.data), ("base", self.setup.bases)))

        def key(row: dict[str, Any]) -> tuple[int, int, int, str, int]:
            at = next((n for n, name in enumerate(names) if f"{row['model']}, ".startswith(f"{name}, ")), len(names))
            return data.index(row["data"]), bases.index(row["base"]), at, row["model"], row["seed"] or 0

        return key
