"""`laserrec reproduce datasets`: Laser with one default config on many data sets, beside rivals that are tuned on each.

ROOT/NAME/ holds interactions.csv.gz and items.jsonl.gz. Everything about a data set lies in OUT/NAME; results are found
again by their fingerprints (laserrec.experiments.table), trials by theirs (laserrec.experiments.tuning).
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import polars as pl
from pydantic import ValidationError

from laserrec.config import Config
from laserrec.data.dataset import Dataset
from laserrec.data.prepare import prepare_source
from laserrec.experiments.quality import LASER, id_settings
from laserrec.experiments.table import Measured, Row, Table, chosen, earlier
from laserrec.experiments.tuning import Choices, Tuned, tune
from laserrec.llm.text_features import TextFeatures
from laserrec.presets import EASE, EASE_TEXT
from laserrec.util.device import choose
from laserrec.util.errors import UserError
from laserrec.util.io import write_json

INTERACTIONS, ITEMS = "interactions.csv.gz", "items.jsonl.gz"
_REGRESSION: Choices = {"neighbours.l2": [100.0, 200.0, 400.0, 800.0, 1600.0],
                        "neighbours.length_power": [0.0, 0.5, 1.0], "neighbours.decay": [0.5, 0.8, 1.0],
                        "neighbours.row_power": [0.0, 0.5]}
_TEXT: Choices = {"neighbours.text_weight": [1.0, 4.0, 16.0], **_REGRESSION}
_ORDER: Choices = {"neighbours.order": [0.2, 0.5, 0.8, 1.0], **_TEXT}
_SEQUENCE_START: dict[str, Any] = {"dropout": 0.2, "weight_decay": 0.1, "shuffle": 0.0}
_SEQUENCE: Choices = {("id_model.dropout", "id_model.weight_decay"): [(0.5, 1.0), (0.3, 0.3), (0.2, 0.1)],
                      "id_model.shuffle": [0.0, 0.5], "id_model.d_id": [64, 128]}


@dataclass(frozen=True)
class Rival:
    """A method that is tuned on each data set."""

    name: str
    kind: str
    method: str
    start: dict[str, Any]
    choices: Choices
    seeded: bool


RIVALS = (
    Rival("popularity", "id", "popularity", {}, {}, False),
    Rival("EASE", "id", "ease", {"neighbours": EASE}, _REGRESSION, False),
    Rival("EASE with LLM text", "text", "ease-text", {"neighbours": EASE_TEXT}, _TEXT, False),
    Rival("EASE with LLM text and order", "text", "ease-text", {"neighbours": {"order": 0.5}}, _ORDER, False),
    Rival("untrained LLM, nearest items", "text", "nearest-text", {}, {"neighbours.decay": [0.5, 0.8, 1.0]}, False),
    Rival("SASRec", "id", "sasrec", id_settings("sasrec", **_SEQUENCE_START), _SEQUENCE, True),
    Rival("text SASRec", "text", "sasrec", id_settings("sasrec", items="text", **_SEQUENCE_START), _SEQUENCE, True),
)


def reproduce(root: Path, names: Sequence[str], out: Path, config: Config, seeds: Sequence[int], trials: int,
              progress: bool = True, device: str = "auto", models: Sequence[str] | None = None) -> list[dict[str, Any]]:
    """All rows: {data, model, kind, seed, recall@k, ndcg@k, mrr, exclude_seen, train_seconds, trials, settings}, also
    written to OUT/datasets.json after each data set. What stands there of other data sets stays, and of those of this
    call what was measured with the same settings. names: of folders in ROOT; none: all of them.

    trials: most settings that each rival is tried with on validation. models: names of rows; None: all of them. Raises
    UserError for a missing data set, an unknown model, and rivals without validation.
    """
    models = chosen((LASER, *(rival.name for rival in RIVALS)), models, "this table")
    if not config.eval.validates and models != [LASER]:
        raise UserError("rivals are tuned on the validation split, and eval.validates is false; set it to true, or fit "
                        f"{LASER} alone")
    there = sorted(file.parent.name for file in root.glob(f"*/{INTERACTIONS}"))
    if missing := [name for name in names if name not in there]:
        raise UserError(f"no data set {missing[0]!r} in {root}; there are: {', '.join(there) or 'none'}")
    if not there:
        raise UserError(f"{root} holds no data sets; each is a folder with {INTERACTIONS} and {ITEMS}")
    found: list[dict[str, Any]] = []
    before = earlier(out / "datasets.json", ("data", "model", "kind", "seed", "trials", "settings", "mrr",
                                             f"recall@{config.eval.k}", f"ndcg@{config.eval.k}"))
    for name in names or there:
        prepare_source([root / name / INTERACTIONS, root / name / ITEMS], out / name / "data", config.data)
        own = [row for row in before if row["data"] == name]
        before = [row for row in before if row["data"] != name]
        found += _one(name, Dataset.load(out / name / "data"), out / name, config, seeds, trials, progress, device,
                      models, own)
        write_json(out / "datasets.json", [*found, *before])
    return [*found, *before]


def _one(name: str, dataset: Dataset, out: Path, config: Config, seeds: Sequence[int], trials: int, progress: bool,
         device: str, models: Sequence[str], before: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    place = choose(device)
    features = TextFeatures(config.backbone, config.prompt, place, out / "data" / "text_features", progress)
    rows, tuned = [_row(LASER, {})] if LASER in models else [], {LASER: Tuned({}, 0.0, 0, 0.0)}
    for rival in (rival for rival in RIVALS if rival.name in models):
        tuned[rival.name] = best = tune(rival.method, rival.start, rival.choices, trials, dataset, config, features,
                                        place, out / "trials.jsonl", progress)
        rows.append(_row(rival.name, best.settings))
    table = Table(rows, dataset, config, out, place, progress, features)
    for model, best in tuned.items():
        if best.folder is not None:
            table.take(model, seeds[0], best.key, best.folder)
    shutil.rmtree(out / "trials", ignore_errors=True)
    lines = [_line(name, row, tuned[row["model"]], config.eval.k) for row in table.results(seeds)]
    there = {(line["model"], line["seed"]) for line in lines}
    return lines + [line for line in before if (line["model"], line["seed"]) not in there and _stays(line, table)]


def _row(model: str, settings: dict[str, Any]) -> Row:
    if model == LASER:
        return Row(LASER, "laser", "laser")
    rival = next(rival for rival in RIVALS if rival.name == model)
    return Row(rival.name, rival.kind, rival.method, settings, rival.seeded, tuned=True)


def _stays(line: dict[str, Any], table: Table) -> bool:
    """Whether a line of an earlier call, of a model or seed that this one wasn't asked for, was measured with the same
    settings; those of a model that this call tunes must be what it found."""
    model, seed = line["model"], line["seed"]
    if model not in (LASER, *(rival.name for rival in RIVALS)):
        return True
    own = Table([_row(model, line["settings"])], table.dataset, table.config, table.out, table.device, table.progress,
                table.features)
    try:
        same = model not in table.rows or table.settings(model) == own.settings(model)
    except ValidationError:  # settings of another version
        return False
    return same and own.kept(model, seed) is not None


def _line(data: str, row: Measured, tuned: Tuned, k: int) -> dict[str, Any]:
    metrics = (f"recall@{k}", f"ndcg@{k}")
    return {"data": data, "model": row["model"], "kind": row["kind"], "seed": row["seed"],
            **{m: row[m] for m in (*metrics, "mrr")}, "exclude_seen": {m: row["exclude_seen"][m] for m in metrics},
            "train_seconds": row["train_seconds"], "trials": tuned.trials, "tuning_seconds": round(tuned.seconds, 1),
            "settings": tuned.settings}


def means(rows: Sequence[dict[str, Any]], k: int) -> list[dict[str, Any]]:
    """Per data set and model, over its seeds, best first: {data, model, kind, seeds, trials, recall@k, ndcg@k, mrr}."""
    frame = pl.DataFrame([{name: row[name] for name in ("data", "model", "kind", "trials", f"recall@{k}", f"ndcg@{k}",
                                                        "mrr")} for row in rows])
    grouped = frame.group_by("data", "model", maintain_order=True).agg(
        pl.first("kind", "trials"), pl.len().alias("seeds"), pl.mean(f"recall@{k}", f"ndcg@{k}", "mrr"))
    return grouped.sort("data", f"ndcg@{k}", descending=[False, True], maintain_order=True).to_dicts()
