"""Everything the report shows, as plain data, computed once. Only this file touches the model and the histories."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float

from laserrec.data.dataset import Cases, Dataset
from laserrec.methods.all import find_method
from laserrec.methods.laser.model import Laser
from laserrec.methods.protocol import TwoTower
from laserrec.recommender.ranking import Ask, Ranked
from laserrec.recommender.recommender import LaserRecommender
from laserrec.recommender.validated import validated
from laserrec.report.categories import short_names
from laserrec.report.curves import Training, read
from laserrec.report.experts import Experts, profile
from laserrec.report.item_map import ItemMap, draw
from laserrec.report.places import Places
from laserrec.report.results import Results, read_results
from laserrec.util.errors import UserError
from laserrec.util.io import read_json

_EXAMPLES, _TOP, _SHOWN_HISTORY = 5, 5, 8
_EXAMPLE_SEED = 0
_USERS_AT_ONCE = 512
_NO_LOSSES = ("format", "users_whose_last_item_is_a_repeat")
_LIBRARIES = {"jinja2": "jinja2", "matplotlib": "matplotlib", "sklearn": "scikit-learn"}


@dataclass(frozen=True)
class Suggestion:
    """rank: from 1. seen: stands in the history."""

    rank: float
    title: str
    score: float
    seen: bool
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
    next: Suggestion | None
    """The true next item; None if it was removed from the catalogue."""
    expert: int | None
    """From 1."""


@dataclass(frozen=True)
class Report:
    """One run. What does not apply to its method is None or empty."""

    name: str
    model: dict[str, Any]
    """model.json: method, config, backbone, training, ..., each only if the method has it."""
    data: dict[str, Any]
    """The data folder's report.json, if it is there, and meta.json."""
    trainings: tuple[Training, ...]
    results: Results | None
    experts: Experts | None
    items: ItemMap | None
    examples: tuple[Example, ...]
    n_items: int

    @property
    def validated(self) -> dict[str, Any]:
        """Of the whole model on validation."""
        return validated(self.model.get("training", {}))

    @property
    def counts(self) -> dict[str, int]:
        """What the reader of the data counted (rows it could not use and the like), where there is any."""
        return {k: v for k, v in self.data.items() if type(v) is int and v and k not in _NO_LOSSES}

    def numbers(self) -> dict[str, Any]:
        """For JSON; without the single steps and the map's points."""
        points = self.items and {"method": self.items.method, "items": len(self.items.titles),
                                 "groups": self.items.counts()}
        return {"name": self.name, "training": self.model.get("training"), "backbone": self.model.get("backbone"),
                "parts": self.model.get("parts"), "data": self.data.get("table1"),
                "epochs": {t.name: t.epochs for t in self.trainings}, "results": self.results and asdict(self.results),
                "experts": self.experts and asdict(self.experts), "map": points,
                "examples": [asdict(example) for example in self.examples]}


class _Texts(NamedTuple):
    """Of the catalogue, by item row."""

    titles: list[str]
    categories: list[str | None]
    brands: list[str | None]


def check_libraries() -> None:
    """Raises UserError where the extra `report` is not installed."""
    missing = [name for module, name in _LIBRARIES.items() if find_spec(module) is None]
    if missing:
        raise UserError(f"a report needs {', '.join(missing)}: pip install 'laserrec[report]'")


def collect(places: Places, map_method: str | None = None, device: str = "auto") -> Report:
    """Loads the model; device: auto, cpu, cuda, cuda:N or mps. Raises UserError without the extra `report`, for damaged
    folders, and for items that are not the data folder's."""
    check_libraries()
    results = None if places.results is None else read_results(places.results)
    dataset, note = Dataset.load(places.data), read_json(places.model / "model.json", "fit again")
    model = LaserRecommender.from_pretrained(places.model, device=device)
    if model.items["item_id"].to_list()[: dataset.n_items] != dataset.items["item_id"].to_list():
        raise UserError(f"{places.model} has another catalogue than {places.data}; name its own: "
                        "laserrec report RUN --data DATA")
    texts = _Texts([title or "untitled" for title in model.items["title"].to_list()],
                   *([text or None for text in model.items[name].to_list()] for name in ("category", "brand")))
    cases = dataset.cases("test")
    last = {user: row for row, user in enumerate(cases.users.tolist())}  # a temporal split has several cases a user
    if not last:
        raise UserError("the data folder's test split is empty; there are no users to report on")
    names = dict(dataset.users.select("user", "user_id").iter_rows())
    users = {row: str(names[user]) for user, row in sorted(last.items())}
    name, report = places.model.resolve(), places.data / "report.json"
    facts = read_json(report, "prepare again") if report.is_file() else {}
    return Report(
        name=f"{name.parent.name}/{name.name}", model=_with_own_settings(note, dataset),
        data={**facts, **dataset.meta}, trainings=_trainings(places, note), results=results,
        experts=_experts(model, cases, users, texts), items=_map(model, texts, map_method),
        examples=_examples(model, cases, users, texts), n_items=model.items.height - len(model.removed))


def _trainings(places: Places, note: dict[str, Any]) -> tuple[Training, ...]:
    """Those of at least an epoch that left a log: the model's own, and that of the ID model it was built on."""
    found = [read(note["method"], places.model, note.get("training", {}).get("kept", {}))]
    if places.id_model is not None:
        below = read_json(places.id_model / "model.json", "fit again")
        found.append(read(f"ID model ({below['method']})", places.id_model, below.get("training", {}).get("kept", {})))
    return tuple(t for t in found if t.steps or any(e.get("epoch") for e in t.epochs))


def _with_own_settings(note: dict[str, Any], dataset: Dataset) -> dict[str, Any]:
    """Without the sections of the settings that this method does not read, and with the data's as they were prepared,
    which a model.json of earlier versions may tell otherwise."""
    read_by_all = ("data", "eval", *(("backbone", "prompt") if note.get("backbone") else ()))
    wanted = {*read_by_all, *find_method(note["method"]).sections} - ({"student"} - note.keys())
    config = {**note["config"], "data": dataset.meta.get("settings", note["config"]["data"])}
    return {**note, "config": {name: tree for name, tree in config.items() if name in wanted}}


def _experts(model: LaserRecommender, cases: Cases, users: dict[int, str], texts: _Texts) -> Experts | None:
    scores = _router_scores(model, cases, list(users))
    if scores is None:
        return None
    lists = cases.histories.lists()
    return profile(scores, list(users.values()), [lists[row] for row in users], texts.titles,
                   short_names(texts.categories), texts.brands)


def _router_scores(model: LaserRecommender, cases: Cases, rows: Sequence[int]
                   ) -> Float[np.ndarray, "users experts"] | None:
    """The router's scores r_j (Eq. 7); None for a model that routes no users. The LLM is not asked."""
    laser, parts = model.model, []
    if not isinstance(laser, Laser) or laser.reader is None or laser.student is not None:
        return None
    for at in range(0, len(rows), _USERS_AT_ONCE):
        route = laser.reader.route(cases.histories.take(rows[at : at + _USERS_AT_ONCE]).to(laser.device))
        if route is None:
            return None
        parts.append(route.scores)
    return torch.cat(parts).float().cpu().numpy()


def _map(model: LaserRecommender, texts: _Texts, method: str | None) -> ItemMap | None:
    """None for a model without item embeddings."""
    if not isinstance(model.model, TwoTower):
        return None
    present = [row for row in range(len(texts.titles)) if row not in model.removed]
    return draw(model.embeddings[present].float().cpu().numpy(), [texts.titles[row] for row in present],
                [texts.categories[row] for row in present], [texts.brands[row] for row in present], method)


def _examples(model: LaserRecommender, cases: Cases, users: dict[int, str], texts: _Texts) -> tuple[Example, ...]:
    """Drawn at random, the same ones every time; nothing is filtered, as in the evaluation."""
    rng = np.random.default_rng(_EXAMPLE_SEED)
    rows = [list(users)[at] for at in np.sort(rng.choice(len(users), min(_EXAMPLES, len(users)), replace=False))]
    answers = model.rank([Ask(cases.histories[row].numpy(), k=model.items.height) for row in rows])
    targets = cases.targets.tolist()
    return tuple(_example(users[row], cases.histories[row].tolist(), targets[row], answer, texts)
                 for row, answer in zip(rows, answers, strict=True))


def _example(user_id: str, history: list[int], target: int, answer: Ranked, texts: _Texts) -> Example:
    """answer: the whole catalogue, ranked."""
    items, scores = answer.items.tolist(), answer.scores.tolist()

    def suggestion(at: int, rank: float) -> Suggestion:
        title = texts.titles[items[at]]
        return Suggestion(rank, title, scores[at], items[at] in history, items[at] == target)

    top = tuple(suggestion(at, at + 1) for at in range(min(_TOP, len(items))))
    true_next = None
    if target in items:
        at = items.index(target)
        ties = [i for i, score in enumerate(scores) if score == scores[at]]
        true_next = suggestion(at, 1 + (ties[0] + ties[-1]) / 2)  # the mean rank of equal scores, as the evaluator's
    shown = tuple(texts.titles[item] for item in history[-_SHOWN_HISTORY:])
    return Example(user_id, shown, len(history) - len(shown), top, true_next,
                   None if answer.expert is None else answer.expert + 1)
