"""`laserrec reproduce cold-start`: items that no training ever saw, and users of few items.

A share of the items is taken out of everything before training: catalogue, sequences, validation. Models are trained
on what is left; then the items come back as new ones, as in a shop's catalogue (`add_items`). All items are ranked.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from laserrec.config import Config, ItemTable, merge
from laserrec.data.dataset import Cases, Dataset
from laserrec.evaluation.evaluate import Scorer, rank_cases
from laserrec.evaluation.metrics import Metrics
from laserrec.experiments.quality import LASER, id_settings
from laserrec.experiments.table import Measured, Place, Row, Table
from laserrec.llm.text_features import TextFeatures
from laserrec.methods.closed_form import NearestText, Popularity
from laserrec.methods.sequence import SequenceModel
from laserrec.recommender.fitting import Fitted
from laserrec.recommender.recommender import LaserRecommender
from laserrec.util.device import choose
from laserrec.util.errors import UserError
from laserrec.util.io import write_json
from laserrec.util.progress import Progress

_HISTORIES = {"all": (1, None), "1": (1, 1), "2": (2, 2), "3": (3, 3), "5+": (5, None)}
"""name -> (items that a history must have, items that are left of it: the newest; None = all)."""


@dataclass(frozen=True)
class HeldOut:
    """A data set whose last items, from row `n_warm` on, are new."""

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
    drawn = np.random.default_rng(seed).permutation(dataset.n_items)
    order = np.concatenate([np.sort(drawn[count:]), np.sort(drawn[:count])])  # row j was row order[j]
    row = pl.Series("item", np.argsort(order), dtype=pl.Int32)  # old row -> new row
    items = dataset.items[order].with_columns(pl.Series("item", range(len(order)), dtype=pl.Int32))
    acts = dataset.interactions.with_columns(row[dataset.interactions["item"]])
    n_warm = dataset.n_items - count
    known = acts.filter((pl.col("item") < n_warm) & (pl.col("split") != "test"))
    known = known.with_columns((pl.col("position").rank("ordinal").over("user") - 1).cast(pl.Int32).alias("position"))
    mark = f"{dataset.fingerprint} without {share} of the items, seed {seed}"
    full = replace(dataset, items=items, interactions=acts, meta={**dataset.meta, "sha256": f"{mark}, full"})
    warm = replace(full, items=items.head(n_warm), interactions=known, meta={**dataset.meta, "sha256": mark})
    return HeldOut(warm, full)


class CatalogueFeatures(TextFeatures):
    """Text features of any part of one catalogue, in any order; its texts are read once."""

    def __init__(self, dataset: Dataset, config: Config, device: torch.device, progress: bool):
        kept = None if dataset.folder is None else dataset.folder / "text_features"
        super().__init__(config.backbone, config.prompt, device, kept, progress)
        self._items = dataset.items
        self._rows = {item_id: row for row, item_id in enumerate(dataset.items["item_id"])}

    def means(self, items: pl.DataFrame) -> Float[Tensor, "n_items d_means"]:
        """As `TextFeatures.means`; items are told by their item_id."""
        return super().means(self._items)[[self._rows[item_id] for item_id in items["item_id"]]]


def with_new_items(model: SequenceModel, text: Float[Tensor, "n_items d_text"]) -> SequenceModel:
    """A text model for a longer catalogue, whose first items are the ones it was trained on. A new item gets the mean
    of the learnt biases. `text`: all items' vectors. Raises ValueError for a model with vectors of its own per item."""
    if model.config.items != ItemTable.TEXT:
        raise ValueError("only an item table made from text knows anything about new items")
    weights, new = model.state_dict(), len(text) - model.n_items
    own, special = weights["item.weight"].split([model.n_items, 2])  # padding and mask stay behind the items
    weights |= {"bias": torch.cat([weights["bias"], weights["bias"].mean().expand(new)]), "text": text,
                "item.weight": torch.cat([own, own.new_zeros(new, own.shape[1]), special]),
                "known": weights["known"].new_ones(len(text))}  # by their text
    longer = type(model)(model.config, len(text), text).to(model.device)
    if model.whitening is not None:
        longer.whitened_by(*model.whitening)
    longer.load_state_dict(weights)
    return longer.eval().requires_grad_(False)


def rows(held: HeldOut, features: TextFeatures) -> list[Row]:
    """Models fitted on the known items, which then meet the new ones."""

    def text() -> Float[Tensor, "n_items d_text"]:
        return features.vectors(held.full.items, fit_rows=held.n_warm)

    def grown(place: Place, fitted: Fitted) -> tuple[Scorer, float]:
        model = LaserRecommender(fitted)
        model.add_cleaned(held.full.items.tail(held.full.n_items - held.n_warm).drop("item"))
        return model, 0.0

    def longer(place: Place, fitted: Fitted) -> tuple[Scorer, float]:
        return with_new_items(fitted.model, text()), 0.0

    def nearest(place: Place) -> tuple[Scorer, float]:
        return NearestText(held.full.n_items, place.config.neighbours.decay).fit(text()), 0.0

    def popular(place: Place, fitted: Fitted) -> tuple[Scorer, float]:
        model = Popularity(held.full.n_items)
        model.counts = F.pad(fitted.model.counts, (0, held.full.n_items - held.n_warm))
        return model, 0.0

    return [Row(LASER, "laser", "laser", make=grown),
            Row("text SASRec", "text", "sasrec", id_settings("sasrec", items="text"), make=longer),
            Row("untrained LLM, nearest items", "text", make=nearest),
            Row("popularity", "id", "popularity", make=popular)]


def reproduce(dataset: Dataset, config: Config, out: Path, seeds: Sequence[int], share: float = 0.1,
              progress: bool = True, device: str = "auto") -> dict[str, Any]:
    """Train and measure for each seed (of the items held out and of the training). Returns {"rows": [{model, seed,
    target: "new" | "known", history, recall@k, ndcg@k, mrr, users}], "share", "config"}, which is also written to
    OUT/cold_start.json; see `laserrec.experiments.table` for what is found again."""
    features, found = CatalogueFeatures(dataset, config, choose(device), progress), []
    for seed in seeds:
        own = Config.model_validate(merge(config.model_dump(), {"train": {"seed": seed}, "id_model": {"seed": seed}}))
        held = hold_out(dataset, share, seed)
        table = Table(rows(held, features), held.warm, own, out / f"seed-{seed}", features.device, progress, features,
                      partial(_measure, held), {"histories": _HISTORIES})
        found += [{"model": name, "seed": seed, **row} for name in table.rows for row in table.result(name)["rows"]]
    result = {"rows": found, "share": share, "config": config.model_dump(mode="json")}
    write_json(out / "cold_start.json", result)
    return result


def _measure(held: HeldOut, table: Table, name: str, scorer: Scorer, file: Path) -> Measured:
    cases, n_items, settings = held.full.cases("test"), held.full.n_items, table.config.eval
    found = []
    for history, (least, kept) in _HISTORIES.items():
        cut = _cut(cases, least, kept)
        with Progress(f"{name}, histories of {history}", len(cut), table.progress) as bar:
            ranks = rank_cases(scorer, cut, settings.batch_size, n_items, bar.advance).plain
        new = cut.targets.numpy() >= held.n_warm
        found += [{"target": target, "history": history, **Metrics.from_ranks(ranks[which], settings.k).as_dict()}
                  for target, which in (("new", new), ("known", ~new)) if which.any()]
    return {"model": name, "rows": found}


def _cut(cases: Cases, least: int, kept: int | None) -> Cases:
    """The cases with at least `least` items of history, of which the newest `kept` are left."""
    long = cases.take(np.flatnonzero(cases.histories.lengths.numpy() >= least))
    return long if kept is None else replace(long, histories=long.histories.last(kept))
