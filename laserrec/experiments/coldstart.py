"""`laserrec reproduce cold-start`: items that no training ever saw, and users of few items.

A share of the items is taken out of everything before training: catalogue, sequences, validation. A model is trained on
what is left; then the items come back as new ones, as in an engineer's catalogue (`add_items`). Ranked are all items.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from laserrec.config import Config, IdModelConfig, ItemTable, merge
from laserrec.data.dataset import Cases, Dataset
from laserrec.evaluation.evaluate import Scorer, rank_cases
from laserrec.evaluation.metrics import Metrics
from laserrec.llm.backbone import load_backbone
from laserrec.llm.text_features import text_vectors
from laserrec.methods.id_store import load_id_model
from laserrec.methods.linear import NEAREST, NearestText
from laserrec.methods.popularity import Popularity
from laserrec.methods.sequence import IdModel, make_id_model
from laserrec.presets import ID_MODELS
from laserrec.recommender.recommender import LaserRecommender
from laserrec.training.pretrain import pretrain_id_model
from laserrec.util.errors import UserError
from laserrec.util.io import read_json, write_json
from laserrec.util.memory import rows_at_once
from laserrec.util.progress import Progress

_BATCH = 64
_HISTORIES = {"all": (1, None), "1": (1, 1), "2": (2, 2), "3": (3, 3), "5+": (5, None)}
"""name -> (items that a history must have, items that are left of it: the newest; None = all)."""


@dataclass(frozen=True)
class HeldOut:
    """A data set whose last items, from `n_warm` + 1 on, are new."""

    warm: Dataset
    """Without the held-out items and without the test split: all that training may see."""
    full: Dataset
    """Everything, items renumbered so that the held-out ones come last."""

    @property
    def n_warm(self) -> int:
        return self.warm.n_items


def hold_out(dataset: Dataset, share: float, seed: int) -> HeldOut:
    """Take `share` of the items, drawn at random, out of training. Raises UserError if none or all would be."""
    count = round(dataset.n_items * share)
    if not 0 < count < dataset.n_items:
        raise UserError(f"a share of {share} of {dataset.n_items} items is {count}; give one that holds out some items "
                        "and leaves some")
    order = np.random.default_rng(seed).permutation(dataset.n_items)
    old = np.concatenate([np.sort(order[count:]), np.sort(order[:count])]) + 1  # new item j + 1 was old[j]
    numbers = pl.DataFrame({"item": pl.Series(old, dtype=pl.Int32),
                            "new": pl.Series(range(1, len(old) + 1), dtype=pl.Int32)})
    items = numbers.join(dataset.items, on="item", how="left", maintain_order="left")
    items = items.with_columns(pl.col("new").alias("item")).drop("new").select(dataset.items.columns)
    rows = dataset.interactions.join(numbers, on="item", how="left", maintain_order="left")
    rows = rows.with_columns(pl.col("new").alias("item")).drop("new").select(dataset.interactions.columns)
    n_warm = dataset.n_items - count
    known = rows.filter((pl.col("item") <= n_warm) & (pl.col("split") != "test"))
    known = known.with_columns((pl.col("position").rank("ordinal").over("user") - 1).cast(pl.Int32).alias("position"))
    mark = f"{dataset.fingerprint} without {share} of the items, seed {seed}"
    full = replace(dataset, items=items, interactions=rows, meta={**dataset.meta, "sha256": f"{mark}, full"})
    warm = replace(full, items=items.head(n_warm), interactions=known, meta={**dataset.meta, "sha256": mark})
    return HeldOut(warm, full)


def with_new_items(model: IdModel, text: Float[Tensor, "n_items d_text"]) -> IdModel:
    """A text model for a longer catalogue, whose first items are the ones it was trained on. A new item gets the mean
    of the learnt biases. `text`: all items' vectors. Raises ValueError for a model with vectors of its own per item."""
    if model.config.items != ItemTable.TEXT:
        raise ValueError("only an item table made from text knows anything about new items")
    new = len(text) - model.n_items
    weights = model.state_dict()
    weights["bias"] = torch.cat([weights["bias"], weights["bias"].mean().expand(new)])
    rows = weights["item.weight"]
    weights["item.weight"] = torch.cat([rows[:-1], rows.new_zeros(new, rows.shape[1]), rows[-1:]])
    longer = make_id_model(model.config, len(text), text)
    longer.load_state_dict({**weights, "text": text})
    return longer.eval().requires_grad_(False)


def reproduce(dataset: Dataset, config: Config, out: Path, seeds: Sequence[int], share: float = 0.1,
              progress: bool = True) -> dict[str, Any]:
    """Train and evaluate for each seed (of the items held out and of the training), kept under `out` and found again
    by the next call. Returns {"rows": [{model, seed, target: "new" | "known", history, recall@k, ndcg@k, mrr, users}],
    "config": ...}, written to OUT/cold_start.json after every seed."""
    rows: list[dict] = []
    for seed in seeds:
        rows += _seed(dataset, config, out / f"seed-{seed}", seed, share, progress)
        result = {"rows": rows, "share": share, "config": config.model_dump(mode="json")}
        write_json(out / "cold_start.json", result)
    return result


def _seed(dataset: Dataset, config: Config, folder: Path, seed: int, share: float, show: bool) -> list[dict]:
    file = folder / "cold_start.json"
    if file.is_file():
        return read_json(file, "delete it to evaluate again")["rows"]
    held = hold_out(dataset, share, seed)
    rows = []
    for name, score in _scorers(held, config, folder, seed, show).items():
        rows += [{"model": name, "seed": seed, **row} for row in _measure(name, score, held, config.eval.k, show)]
    write_json(file, {"rows": rows})
    return rows


def _scorers(held: HeldOut, config: Config, folder: Path, seed: int, show: bool) -> dict[str, Scorer]:
    config = Config.model_validate(merge(config.model_dump(), {"train": {"seed": seed}, "id_model": {"seed": seed}}))
    backbone = load_backbone(config.backbone)
    text = text_vectors(held.full, config, show, backbone, whiten_by=held.n_warm)

    def id_model(name: str, settings: IdModelConfig) -> IdModel:
        pretrain_id_model(held.warm, settings, folder / name, show, lambda: text[: held.n_warm])
        return load_id_model(folder / name, held.warm).model

    rival = IdModelConfig(**{**ID_MODELS["sasrec"], "items": "text", "seen_offset": True, "seed": seed})
    laser = LaserRecommender.fit_dataset(held.warm, id_model("id_model", config.id_model), config, folder / "laser",
                                         show, backbone)
    laser.add_items(held.full.items.tail(held.full.n_items - held.n_warm).drop("item"))
    popular = F.pad(Popularity(held.warm).counts, (0, held.full.n_items - held.n_warm))
    return {
        "Laser": laser.score,
        "text SASRec": with_new_items(id_model("text-sasrec", rival), text).score,
        NEAREST: NearestText(text, config.neighbours.recency).score,
        "popularity": lambda histories: popular.expand(len(histories), -1),
    }


def _measure(name: str, score: Scorer, held: HeldOut, k: int, show: bool) -> list[dict]:
    cases, n_items = held.full.cases("test"), held.full.n_items
    rows = []
    for history, (least, kept) in _HISTORIES.items():
        cut = _cut(cases, least, kept)
        with Progress(f"{name}, histories of {history}", len(cut), show) as bar:
            ranks = rank_cases(score, cut, rows_at_once(n_items, _BATCH), n_items, bar.advance).plain
        new = cut.targets > held.n_warm
        rows += [{"target": target, "history": history, **Metrics.from_ranks(ranks[which], k).as_dict()}
                 for target, which in (("new", new), ("known", ~new)) if which.any()]
    return rows


def _cut(cases: Cases, least: int, kept: int | None) -> Cases:
    """The cases with at least `least` items of history, of which the newest `kept` are left."""
    long = cases.take(np.flatnonzero([len(h) >= least for h in cases.histories]))
    return long if kept is None else replace(long, histories=[h[-kept:] for h in long.histories])
