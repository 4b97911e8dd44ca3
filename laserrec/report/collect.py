"""Everything the report shows, as plain data: read from a run's folders, computed once, no markup."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from laserrec.config import Config
from laserrec.data.dataset import Cases, Dataset
from laserrec.evaluation.metrics import mean_ranks
from laserrec.recommender.recommender import LaserRecommender
from laserrec.report.categories import short_names
from laserrec.report.experts import Experts, profile, router_scores
from laserrec.report.item_map import ItemMap, draw
from laserrec.report.places import Places
from laserrec.report.results import Results, read_results
from laserrec.training.watch import read_training
from laserrec.util.errors import UserError
from laserrec.util.io import read_json

_EXAMPLES, _TOP, _SHOWN_HISTORY = 5, 5, 8
_EXAMPLE_SEED = 0


@dataclass(frozen=True)
class Curves:
    """One training: log.jsonl (a line an epoch), training.jsonl (a line every few steps), the epoch that was kept."""

    epochs: list[dict[str, Any]]
    steps: list[dict[str, Any]]
    kept: dict[str, Any]
    """{stage, epoch} or {epoch}."""


@dataclass(frozen=True)
class Suggestion:
    """rank: from 1."""

    rank: float
    title: str
    score: float
    seen: bool
    """Stands in the history."""
    is_next: bool


@dataclass(frozen=True)
class Example:
    """A user of the test split, and what the model would have recommended before the last item."""

    user_id: str
    history: tuple[str, ...]
    """The last titles, oldest first."""
    earlier: int
    """How many stand before them."""
    top: tuple[Suggestion, ...]
    next: Suggestion
    expert: int | None
    """From 1."""


@dataclass(frozen=True)
class Report:
    """One run."""

    name: str
    config: Config
    model: dict[str, Any]
    """model.json without its config."""
    data: dict[str, Any]
    """The data folder's report.json, or its meta.json where that is missing."""
    fit: Curves
    pretraining: Curves | None
    results: Results | None
    experts: Experts | None
    items: ItemMap
    examples: tuple[Example, ...]


def collect(places: Places, map_method: str | None = None) -> Report:
    """Loads the model with its LLM. Raises UserError for damaged folders, or items that are not the data's."""
    results = None if places.results is None else read_results(places.results)
    dataset = Dataset.load(places.data)
    model = LaserRecommender.from_pretrained(places.model)
    if model.items["item_id"].to_list()[: dataset.n_items] != dataset.items["item_id"].to_list():
        raise UserError(f"{places.model} has another catalogue than {places.data}; name its own data folder: --data")
    note = read_json(places.model / "model.json", "fit again")
    cases = _last_cases(dataset)
    texts = model.items.select("title", "brand", "category").fill_null("").to_dict(as_series=False)
    titles = [t or "untitled" for t in texts["title"]]
    categories, brands = ([t or None for t in texts[c]] for c in ("category", "brand"))
    names = dict(zip(dataset.users["user"].to_list(), dataset.users["user_id"].to_list(), strict=True))
    user_ids = [str(names[u]) for u in cases.users.tolist()]

    scores = router_scores(model.encoder, cases.histories)
    experts = None if scores is None else profile(scores, user_ids, cases.histories, titles, short_names(categories),
                                                  brands)
    chosen = None if scores is None else scores.argmax(dim=1)
    present = [j for j in range(len(titles)) if j + 1 not in model.removed]
    items = draw(model.embeddings[present], *([of[j] for j in present] for of in (titles, categories, brands)),
                 method=map_method)
    name = places.model.resolve()
    return Report(
        name=name.parent.name + "/" + name.name, config=model.encoder.laser.config,
        model={k: v for k, v in note.items() if k != "config"}, data=_data_facts(places.data, dataset),
        fit=Curves(_read_lines(places.model / "log.jsonl"), read_training(places.model),
                   {k: note["training"]["best"][k] for k in ("stage", "epoch")}),
        pretraining=None if places.id_model is None else _pretraining(places.id_model), results=results,
        experts=experts, items=items, examples=_examples(model, cases, user_ids, titles, chosen))


def _last_cases(dataset: Dataset) -> Cases:
    """One test case a user: the last one, where a temporal split has several."""
    cases = dataset.cases("test")
    last = {user: row for row, user in enumerate(cases.users.tolist())}
    if not last:
        raise UserError("the data folder's test split is empty; there are no users to report on")
    return cases.take(np.array(sorted(last.values())))


def _examples(model: LaserRecommender, cases: Cases, user_ids: Sequence[str], titles: Sequence[str],
              experts: torch.Tensor | None) -> tuple[Example, ...]:
    """Drawn at random, the same ones every time; nothing is filtered, as in the evaluation."""
    rng = np.random.default_rng(_EXAMPLE_SEED)
    rows = np.sort(rng.choice(len(cases), min(_EXAMPLES, len(cases)), replace=False))
    drawn = cases.take(rows)
    scores = model.score(drawn.histories)
    ranks = mean_ranks(scores, torch.as_tensor(drawn.targets.astype(np.int64)) - 1)
    best = scores.topk(min(_TOP, scores.shape[1]), dim=1).indices + 1

    def suggestion(row: int, rank: float, item: int) -> Suggestion:
        return Suggestion(rank, titles[item - 1], float(scores[row, item - 1]), item in drawn.histories[row].tolist(),
                          item == int(drawn.targets[row]))

    examples = []
    for row, history in enumerate(drawn.histories):
        shown = tuple(titles[i - 1] for i in history[-_SHOWN_HISTORY:].tolist())
        top = tuple(suggestion(row, rank, item) for rank, item in enumerate(best[row].tolist(), 1))
        examples.append(Example(user_ids[rows[row]], shown, len(history) - len(shown), top,
                                suggestion(row, float(ranks[row]), int(drawn.targets[row])),
                                None if experts is None else int(experts[rows[row]]) + 1))
    return tuple(examples)


def _pretraining(folder: Path) -> Curves:
    metrics = read_json(folder / "metrics.json", "pretrain again")
    return Curves(_read_lines(folder / "log.jsonl"), read_training(folder), {"epoch": metrics["best_epoch"]})


def _data_facts(folder: Path, dataset: Dataset) -> dict[str, Any]:
    report = folder / "report.json"
    facts = read_json(report, "prepare again") if report.is_file() else {}
    return {**facts, **dataset.meta}


def _read_lines(file: Path) -> list[dict[str, Any]]:
    if not file.is_file():
        return []
    try:
        return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    except ValueError as error:
        raise UserError(f"{file} is damaged: {error}; fit again or delete it") from None
