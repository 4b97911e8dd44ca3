"""`laserrec quickstart`: from raw data to recommendations and a table of models, on amazon-scientific.

Recommendations come first, from a model in closed form; the trained ones follow. What is there already is used again.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Column
from rich.table import Table as Grid
from rich.text import Text

from laserrec.config import Config, load_config
from laserrec.data.dataset import Dataset
from laserrec.data.prepare import prepare_source
from laserrec.experiments.quality import LASER, closed_forms
from laserrec.experiments.table import Measured, Row, Table, compare
from laserrec.presets import PRESETS
from laserrec.recommender.folder import read_note, tell_card
from laserrec.recommender.recommender import LaserRecommender
from laserrec.util.device import choose
from laserrec.util.io import write_json

_DATA, _INSTANT, _SASREC = "amazon-scientific", "closed form", "SASRec"


def rows() -> list[Row]:
    """A model in closed form for the start, then those of the table."""
    instant, whole = PRESETS["instant"], load_config("instant")
    settings = {name: own for name, own in instant.items() if name != "backbone"}
    settings |= {name: getattr(whole, name).model_dump() for name in ("head", "neighbours", "blend")}
    return [Row(_INSTANT, "text", "laser", settings, folder="instant"),
            Row(LASER, "laser", "laser", folder="model"),
            Row(_SASREC, "id", "sasrec", {"id_model": {"kind": "sasrec", "items": "ids"}}),
            *closed_forms()]


def run(out: Path, config: Config, progress: bool = True, device: str = "auto") -> list[Measured]:
    """Everything, with headings, numbers and times on the console; config: of the preset `quickstart`.

    Returns the table's rows, also written to OUT/results.json: {model, kind, split, recall@k, ndcg@k, mrr, users,
    seconds, exclude_seen ...}; seconds = training and evaluation, without the reading of item texts, which all share.
    """
    console, k = Console(), config.eval.k
    with _step(console, 1, f"Prepare the data set {_DATA} in {out / 'data'}"):
        prepare_source(_DATA, out / "data", config.data)
        dataset = Dataset.load(out / "data")
        console.print(f"  {dataset.n_users:,} users, {dataset.n_items:,} items, {dataset.interactions.height:,} "
                      "interactions")
    table = Table(rows(), dataset, config, out, choose(device), progress)
    with _step(console, 2, f"Read each item's text once with the frozen language model {config.backbone.name}"):
        table.features.means(dataset.items)
    with _step(console, 3, "Recommend with a first model in closed form, without any training by gradient"):
        model = LaserRecommender(table.fitted(_INSTANT))
        history = _example(console, model, dataset)
    with _step(console, 4, "Train SASRec, which knows items by their ids alone"):
        table.result(_SASREC)
        _training(console, table, _SASREC)
    with _step(console, 5, "Train Laser on top of it: item texts read by the LLM, a transformer over the history"):
        table.result(LASER)
        tell_card(out / "model", data_name=_DATA)
        _training(console, table, LASER)
    with _step(console, 6, "Compare on the test split"):
        found = [table.result(name) for name in table.rows if name != _INSTANT]
    found = [{**row, "seconds": round(row["train_seconds"] + row["seconds"], 1)} for row in found]
    write_json(out / "results.json", found)
    _print(console, found, dataset, k)
    console.print(verdict(compare(LASER, found, out, k)[0], k), highlight=False)
    console.print(_next(out, history), highlight=False, soft_wrap=True, markup=False)
    return found


@contextmanager
def _step(console: Console, number: int, what: str) -> Iterator[None]:
    start = time.monotonic()
    console.print(f"\n[bold]{number}  {what}[/]", highlight=False)
    yield
    console.print(f"  {time.monotonic() - start:.0f} s", highlight=False)


def _example(console: Console, model: LaserRecommender, dataset: Dataset) -> list[str]:
    """Five recommendations for a real history of three to six items, if there is one; returns its item ids."""
    cases = dataset.cases("test")
    lengths = cases.histories.lengths.tolist()
    at = next((i for i, length in enumerate(lengths) if 3 <= length <= 6), 0)
    ids, titles = dataset.items["item_id"].to_list(), dataset.items["title"].to_list()
    bought, target = cases.histories[at].tolist(), int(cases.targets[at])
    grid = Grid(Column("", no_wrap=True), Column("item", no_wrap=True), "title", box=None, padding=(0, 2))

    def add(what: str, item: str, title: str | None, style: str = "") -> None:
        grid.add_row(what, Text(item), Text(title or "", no_wrap=True, overflow="ellipsis"), style=style)

    for row in bought:
        add("bought", ids[row], titles[row])
    frame = model.recommend([[ids[row] for row in bought]], k=5, exclude_seen=True)
    names = dict(zip(ids, titles, strict=True))
    for rank, item in zip(frame["rank"], frame["item_id"], strict=True):
        add(f"recommended {rank}", item, names[item], "bold green" if item == ids[target] else "green")
    add("bought next", ids[target], titles[target], "dim")
    console.print(grid)
    return [ids[row] for row in bought]


def _training(console: Console, table: Table, name: str) -> None:
    told = read_note(table.folder(name))["training"]
    metric = f"ndcg@{table.config.eval.k}"
    kept = told["kept"].get(f"validation_{metric}")
    console.print(f"  {told['trained_parameters']:,} trained parameters, {told['epochs']} epochs"
                  + ("" if kept is None else f", {metric.upper()} on validation {kept:.4f}")
                  + f"; the model is in {table.folder(name)}", highlight=False, soft_wrap=True)


def _print(console: Console, found: list[Measured], dataset: Dataset, k: int) -> None:
    metrics = {f"recall@{k}": f"Recall@{k}", f"ndcg@{k}": f"NDCG@{k}", "mrr": "MRR"}
    grid = Grid("model", *metrics.values(), "seconds", title=f"{_DATA}, test split: {found[0]['users']:,} users, all "
                f"{dataset.n_items:,} items ranked, nothing filtered")
    for row in sorted(found, key=lambda row: -row[f"ndcg@{k}"]):
        grid.add_row(row["model"], *(f"{row[metric]:.4f}" for metric in metrics), f"{row['seconds']:.0f}",
                     style="bold" if row["model"] == LASER else "")
    console.print(grid)


def verdict(line: dict[str, Any], k: int = 10) -> str:
    """Where Laser stands to the best model that knows ids alone, from an entry of `compare`."""
    word = "above" if line["low"] > 0 else "below" if line["high"] < 0 else "level with"
    recall, ndcg = (f"{metric}@{k} x {line[f'{metric.lower()}@{k}_ratio']:.2f}" for metric in ("Recall", "NDCG"))
    return (f"Laser is {word} the best model of ids alone, {line['best']}: {recall}, {ndcg}; difference of NDCG@{k} "
            f"{line[f'ndcg@{k}_difference']:+.4f}, 95% interval {line['low']:+.4f} to {line['high']:+.4f} (users "
            "resampled, one seed).")


def _next(out: Path, history: list[str]) -> str:
    commands = {f"laserrec recommend {out / 'model'} --history {','.join(history)}": "the same question to Laser",
                f"laserrec report {out}": "one page: curves, results, a map of the items",
                f"laserrec serve {out / 'model'}": "HTTP API and a page to try it",
                "laserrec prepare orders.csv runs/data --items goods.csv": "your own data: see README.md",
                "laserrec reproduce quality": "all rivals, several seeds, at full size: hours"}
    return "\nWhat to try next\n" + "".join(f"  {command}\n      {what}\n" for command, what in commands.items())
