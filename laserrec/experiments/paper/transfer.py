"""`laserrec reproduce figure3`: models go from one shop to another, with none, few or all of the new shop's users.

Each point is a model that was fitted on the source and goes on with a share of the target's training users, beside one
that begins with nothing on the same users. With no users (zero-shot) the source's model is used as it is: nothing of
the target is known but its items' texts. All of the target's test users are ranked, with their whole histories.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from typing import Any

import numpy as np
import polars as pl

from laserrec.data.dataset import Dataset
from laserrec.evaluation.evaluate import Scorer
from laserrec.experiments.paper.run import Setup, late
from laserrec.experiments.paper.spec import transferred
from laserrec.experiments.table import Place, Row, Table, chosen, earlier, rank
from laserrec.llm.text_features import TextFeatures
from laserrec.recommender.fitting import open_folder
from laserrec.recommender.scorers import zero_shot
from laserrec.util.device import choose
from laserrec.util.errors import UserError
from laserrec.util.io import write_json

NAME, TITLE = "figure3", "Transfer to another shop with few users"
PERCENTS = (0.0, 1.0, 5.0, 10.0, 20.0, 50.0, 100.0)
"""Of the target's training users."""


def few_users(dataset: Dataset, percent: float, seed: int) -> Dataset:
    """The same catalogue with the interactions of some of its training users, drawn at random, without the test split.
    Of one seed, a larger share holds all users of a smaller one. Raises UserError for a share that is no user."""
    users = np.unique(dataset.train_users)
    count = round(len(users) * percent / 100)
    if not count:
        raise UserError(f"{percent:g}% of {len(users):,} training users is no user; give a larger share")
    kept = np.random.default_rng(seed).permutation(users)[:count]
    own = dataset.interactions.filter(pl.col("user").is_in(kept.tolist()) & (pl.col("split") != "test"))
    mark = f"{dataset.fingerprint}, {percent:g}% of the training users, seed {seed}"
    return replace(dataset, interactions=own, meta={**dataset.meta, "sha256": mark})


def reproduce(setup: Setup, seeds: Sequence[int], percents: Sequence[float] = PERCENTS,
              models: Sequence[str] | None = None, sources: Sequence[str] | None = None,
              until: float | None = None) -> dict[str, Any]:
    """Fit and measure what is not there yet, and collect. {experiment, title, split, rows, missing}: each row is
    {source, target, base, model, kind, seed, percent, start: "transfer" or "nothing", training_users, recall@k, ndcg@k,
    mrr, train_seconds (without the source's), seconds, fingerprint}; missing: what the budget left undone. Written to
    OUT/figure3.json after each row. What stands there of other data sets and bases stays, and of those of this call
    what was measured with the same settings.

    models: rows to measure (see `chosen`); None: all. sources: data sets from which models go to all others; None: from
    each. until: from this time.monotonic on nothing new is begun; the same call goes on. Raises UserError for fewer
    than two data sets, and for shares and names that make no sense.
    """
    if len(setup.data) < 2:
        raise UserError(f"{NAME} takes models from one data set to another; give two or more")
    if unknown := [name for name in sources or () if name not in setup.data]:
        raise UserError(f"source {unknown[0]!r} is none of the data sets: {', '.join(setup.data)}")
    if wrong := [percent for percent in percents if not 0 <= percent <= 100]:
        raise UserError(f"a share of {wrong[0]:g}% of the training users makes no sense; give 0 to 100")
    result: dict[str, Any] = {"experiment": NAME, "title": TITLE, "split": "test", "rows": [], "missing": []}
    names = chosen([row.name for row in transferred()], models, NAME)
    left = _earlier(setup)

    def asked(point: _Point) -> bool:
        return (point.row.name in names and point.source in (sources or setup.data) and point.seed in seeds
                and point.percent in percents)

    rows: list[dict[str, Any]] = []
    for point, table in _points(setup, lambda point: asked(point) or point.key in left,
                                {*seeds, *(key[4] for key in left)}, {*percents, *(key[5] for key in left)}):
        found = table.kept(point.row.name, point.seed)
        left.pop(point.key, None)
        if found is None and not asked(point):
            continue
        if found is None and late(until):
            result["missing"].append({**point.told(table), "why": "the budget was used up"})
            continue
        found = found or table.result(point.row.name, point.seed)
        rows.append({**{key: value for key, value in found.items() if key not in ("split", "users", "ranks")},
                     **point.told(table)})
        result["rows"] = [*rows, *left.values()]
        write_json(setup.out / f"{NAME}.json", result)
    result["rows"] = [*rows, *left.values()]
    return result


_Key = tuple[str, str, str, str, int, float, str]
_KEY = ("source", "target", "base", "model", "seed", "percent", "start")


def _earlier(setup: Setup) -> dict[_Key, dict[str, Any]]:
    """Rows of the file that earlier calls wrote."""
    k = next(iter(setup.bases.values())).eval.k
    rows = earlier(setup.out / f"{NAME}.json", (*_KEY, f"recall@{k}", f"ndcg@{k}"))
    return {tuple(row[name] for name in _KEY): row for row in rows}


@dataclass(frozen=True)
class _Point:
    source: str
    target: str
    base: str
    row: Row
    seed: int
    percent: float
    transfer: bool

    @property
    def key(self) -> _Key:
        start = "transfer" if self.transfer else "nothing"
        return self.source, self.target, self.base, self.row.name, self.seed, self.percent, start

    def told(self, table: Table) -> dict[str, Any]:
        users = len(table.dataset.train_users) if self.percent else 0
        return {**dict(zip(_KEY, self.key, strict=True)), "training_users": users}


def _points(setup: Setup, wanted: Callable[[_Point], bool], seeds: Collection[int], percents: Collection[float]
            ) -> Iterator[tuple[_Point, Table]]:
    """Those that are wanted, and the table that each is a row of. A source's model is in memory for its own points
    alone."""
    tables = _Tables(setup)
    for base, source, row, seed in itertools.product(setup.bases, setup.data, transferred(), sorted(seeds)):
        starts = tables.whole(source, base, row)
        targets = [name for name in setup.data if name != source]
        for target, percent, transfer in itertools.product(targets, sorted(percents), (True, False)):
            point = _Point(source, target, base, row, seed, percent, transfer)
            if not wanted(point):
                continue
            if percent and transfer:
                yield point, tables.part(point, starts)
            elif percent:
                yield point, tables.part(point)
            elif transfer:
                yield point, tables.zero_shot(point, starts)


class _Tables:
    """One for each way to train. Models of whole data sets lie where the paper's tables have theirs."""

    def __init__(self, setup: Setup):
        self.setup, self.device = setup, choose(setup.device)
        self.data = {name: Dataset.load(folder) for name, folder in setup.data.items()}
        self.features = cache(self._features)

    def _features(self, base: str) -> TextFeatures:
        """One for all catalogues, so that each is read once."""
        config = self.setup.bases[base]
        return TextFeatures(config.backbone, config.prompt, self.device, self.setup.out / "text_features",
                            self.setup.progress)

    def whole(self, data: str, base: str, row: Row) -> Table:
        """Fitted on all of a data set."""
        return Table([row], self.data[data], self.setup.bases[base], self.setup.out / data / base, self.device,
                     self.setup.progress, self.features(base))

    def part(self, point: _Point, starts: Table | None = None) -> Table:
        """Fitted on some of the target's users."""
        if point.percent == 100 and starts is None:
            return self.whole(point.target, point.base, point.row)
        whole = self.data[point.target]
        return self._table([point.row], point, few_users(whole, point.percent, point.seed), starts)

    def zero_shot(self, point: _Point, starts: Table) -> Table:
        """Fitted on nothing of the target."""
        row, items, features = point.row, self.data[point.target].items, self.features(point.base)

        def make(place: Place) -> tuple[Scorer, float]:
            starts.fitted(row.name, point.seed)
            own = open_folder(starts.folder(row.name, point.seed), self.device, features=features)  # it may grow
            return zero_shot(own, items), 0.0

        unfitted = Row(row.name, row.kind, settings=row.settings, make=make)
        return self._table([unfitted], point, self.data[point.target], starts)

    def _table(self, rows: Sequence[Row], point: _Point, dataset: Dataset, starts: Table | None) -> Table:
        origin = "from-nothing" if starts is None else f"from-{point.source}"
        out = self.setup.out / NAME / point.target / point.base / origin / f"{point.percent:g}-percent"
        whole = self.data[point.target]
        return Table(rows, dataset, self.setup.bases[point.base], out, self.device, self.setup.progress,
                     self.features(point.base), partial(rank, other=whole), ["test", whole.fingerprint], starts)
