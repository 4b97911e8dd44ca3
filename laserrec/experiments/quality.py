"""`laserrec reproduce quality`: Laser beside its rivals, several seeds, one evaluator, test touched once each.

Everything is kept under one folder, a model per sub-folder, and found again by the next call: the run can be stopped
and resumed anywhere. Settings were chosen on validation before; this only trains and evaluates.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
from jaxtyping import Float
from rich.console import Console
from torch import Tensor

from laserrec import presets
from laserrec.config import Config, IdModelConfig, StudentConfig, merge
from laserrec.data.dataset import Dataset
from laserrec.evaluation.evaluate import Scorer, evaluate, save_ranks
from laserrec.llm.backbone import Backbone, load_backbone
from laserrec.llm.text_features import text_vectors
from laserrec.methods.id_store import load_id_model
from laserrec.methods.linear import EASE, NEAREST, TEXT_EASE, ItemRegression, NearestText
from laserrec.methods.popularity import Popularity
from laserrec.presets import ID_MODELS
from laserrec.recommender.distil import distil
from laserrec.recommender.recommender import LaserRecommender
from laserrec.training.pretrain import pretrain_id_model
from laserrec.util.errors import UserError
from laserrec.util.io import read_json, write_json
from laserrec.util.progress import Progress

LASER, COSINES, FUSION = "Laser", "Laser without its neighbours (cosines)", "SASRec + Laser, ranks fused"
DISTILLED = "Laser, distilled (no LLM for users)"

RIVALS: dict[str, tuple[str, dict[str, Any]]] = {
    # name -> (kind, what differs from the kind's tuned settings)
    "SASRec": ("id", {"kind": "sasrec", "seen_offset": True}),
    "BERT4Rec": ("id", {"kind": "bert4rec", "seen_offset": True}),
    "SASRec from LLM embeddings": ("text", {"kind": "sasrec", "items": "llm_start", "seen_offset": True}),
    "text SASRec": ("text", {"kind": "sasrec", "items": "text", "seen_offset": True}),
}
TRIALS = {"SASRec": 43, "BERT4Rec": 41, "SASRec from LLM embeddings": 41, "text SASRec": 40, EASE: 378, TEXT_EASE: 120,
          NEAREST: 50, LASER: 264, COSINES: 40, DISTILLED: 2, FUSION: 1}
"""Settings tried on validation, counted from dev/LOG.md. Laser's are 40 trainings, the 120 of its neighbours and 104
ways to join the two."""
_RRF = 60
"""Constant of reciprocal rank fusion (Cormack, Clarke & Buettcher 2009)."""


def fuse_ranks(first: Scorer, second: Scorer) -> Scorer:
    """Reciprocal rank fusion: an item's score is the sum of 1 / (60 + rank) over both models."""

    def score(histories: Sequence[np.ndarray]) -> Float[Tensor, "batch n_items"]:
        return sum(1 / (_RRF + _ranks(model(histories))) for model in (first, second))

    return score


def cosines_alone(model: LaserRecommender) -> Scorer:
    """What the model's embeddings say without the regression beside them."""

    def score(histories: Sequence[np.ndarray]) -> Float[Tensor, "batch n_items"]:
        laser = model.encoder.laser
        neighbours, laser.neighbours = laser.neighbours, None
        try:
            return model.score(histories)
        finally:
            laser.neighbours = neighbours

    return score


def _ranks(scores: Tensor) -> Tensor:
    return scores.argsort(dim=1, descending=True, stable=True).argsort(dim=1).double() + 1


@dataclass
class _Run:
    dataset: Dataset
    config: Config
    out: Path
    backbone: Backbone
    show: bool
    _text: Tensor | None = None

    def row(self, folder: Path, name: str, kind: str, seed: int | None, score: Scorer, train_seconds: float) -> dict:
        """Evaluate once; the row is found in `folder` afterwards."""
        file = folder / "test.json"
        if file.is_file():  # how much was tried since is known here alone
            return {**read_json(file, "delete it to evaluate again"), "trials": TRIALS.get(name, 0)}
        with Progress(f"{name}, seed {seed}: test", self.dataset.n_users, self.show) as bar:
            result = evaluate(name, score, self.dataset, "test", self.config.eval.k, progress=bar.advance)
        folder.mkdir(parents=True, exist_ok=True)
        save_ranks(folder / "ranks.parquet", self.dataset, "test", result.ranks)
        row = {"model": name, "kind": kind, "seed": seed, **result.plain.as_dict(),
               "exclude_seen": result.exclude_seen.as_dict(), "train_seconds": round(train_seconds, 1),
               "trials": TRIALS.get(name, 0), "folder": str(folder.relative_to(self.out))}
        write_json(file, row)
        return row

    def text(self) -> Float[Tensor, "n_items d_text"]:
        """Read once."""
        if self._text is None:
            self._text = text_vectors(self.dataset, self.config, self.show, self.backbone)
        return self._text

    def seed(self, seed: int) -> list[dict]:
        folder = self.out / f"seed-{seed}"
        rows, scorers, folders = [], {}, {}
        for name, (kind, settings) in RIVALS.items():
            own = folder / _slug(name)
            config = IdModelConfig(**{**ID_MODELS[settings["kind"]], **settings, "seed": seed})
            metrics = pretrain_id_model(self.dataset, config, own, self.show, self.text)
            scorers[name] = load_id_model(own, self.dataset).model.score
            rows.append(self.row(own, name, kind, seed, scorers[name], metrics["seconds"]))
            folders[config.model_dump_json()] = own
        return rows + self._lasers(folder, seed, scorers, folders)

    def _lasers(self, folder: Path, seed: int, scorers: dict[str, Scorer], folders: dict[str, Path]) -> list[dict]:
        config = Config.model_validate(merge(self.config.model_dump(), {
            "train": {"seed": seed}, "id_model": {"seed": seed}}))
        # Often one of the rivals is the ID model under Laser; its training counts for both.
        id_folder = folders.get(config.id_model.model_dump_json(), folder / "laser-id-model")
        seconds = pretrain_id_model(self.dataset, config.id_model, id_folder, self.show, self.text)["seconds"]
        model = LaserRecommender.fit_dataset(self.dataset, load_id_model(id_folder, self.dataset).model, config,
                                             folder / "laser", self.show, self.backbone)
        seconds += model.facts["training"]["seconds"]
        student = distil(model, self.dataset, folder / "distilled", StudentConfig(seed=seed), self.show)
        fused = fuse_ranks(scorers["SASRec"], model.score)
        return [self.row(folder / "laser-test", LASER, "laser", seed, model.score, seconds),
                self.row(folder / "cosines", COSINES, "laser", seed, cosines_alone(model), seconds),
                self.row(folder / "distilled-test", DISTILLED, "laser", seed, student.score,
                         seconds + student.facts["student"]["seconds"]),
                self.row(folder / "fusion", FUSION, "fusion", seed, fused, seconds)]

    def seedless(self) -> list[dict]:
        """Rivals in which nothing is random."""
        regression = self.config.neighbours
        alone = regression.model_copy(update=presets.EASE)
        makers = {
            "popularity": ("id", lambda: Popularity(self.dataset)),
            EASE: ("id", lambda: ItemRegression(self.dataset, alone)),
            TEXT_EASE: ("text", lambda: ItemRegression(self.dataset, regression, self.text())),
            NEAREST: ("text", lambda: NearestText(self.text(), regression.recency)),
        }
        rows = []
        for name, (kind, make) in makers.items():
            start = time.monotonic()
            score = make().score
            rows.append(self.row(self.out / _slug(name), name, kind, None, score, time.monotonic() - start))
        return rows


def _slug(name: str) -> str:
    return "-".join(name.lower().replace(",", "").split())


def reproduce(
    dataset: Dataset, config: Config, out: Path, seeds: Sequence[int], progress: bool = True
) -> dict[str, Any]:
    """Train and evaluate all models for all seeds. Returns {"rows": [...], "summary": [...], "laser_over": [...],
    "config": ...}, written to OUT/quality.json after every seed."""
    run = _Run(dataset, config, out, load_backbone(config.backbone), progress)
    rows: list[dict] = run.seedless()
    for seed in seeds:
        rows += run.seed(seed)
        result = {"rows": rows, "summary": summarise(rows, out, config.eval.k),
                  "laser_over": laser_over(rows, out, config.eval.k), "config": config.model_dump(mode="json")}
        write_json(out / "quality.json", result)
        Console(stderr=True).print(f"seed {seed} done; {out / 'quality.json'}")
    return result


def summarise(rows: list[dict], out: Path, k: int = 10) -> list[dict[str, Any]]:
    """Per model: mean and standard deviation over seeds, and the paired difference of per-user NDCG to the best model
    of kind id with its 95% bootstrap interval (users resampled, seeds averaged first)."""
    gains = _gains_by_model(rows, out, k)
    best = _best(rows, gains, "id")
    table = []
    for name in gains:
        own = [row for row in rows if row["model"] == name]
        low, high = _interval(gains[name] - gains[best])
        entry = {"model": name, "kind": own[0]["kind"], "seeds": len(own), "against": best,
                 f"ndcg@{k}_difference": float((gains[name] - gains[best]).mean()), "low": low, "high": high}
        for metric in (f"recall@{k}", f"ndcg@{k}", "mrr"):
            values = [row[metric] for row in own]
            entry |= {metric: float(np.mean(values)),
                      f"{metric}_sd": float(np.std(values, ddof=1)) if len(values) > 1 else 0.0}
        table.append(entry)
    return table


def laser_over(rows: list[dict], out: Path, k: int = 10) -> list[dict[str, Any]]:
    """Laser beside the best model of kind id and the best of kind text, by NDCG: how many times as high its means over
    seeds are, and the paired difference of per-user NDCG with its 95% bootstrap interval."""
    gains = _gains_by_model(rows, out, k)

    def mean(name: str, metric: str) -> float:
        return float(np.mean([row[metric] for row in rows if row["model"] == name]))

    table = []
    for kind in ("id", "text"):
        best = _best(rows, gains, kind)
        difference = gains[LASER] - gains[best]
        low, high = _interval(difference)
        ratios = {f"{m}_ratio": mean(LASER, m) / mean(best, m) for m in (f"recall@{k}", f"ndcg@{k}")}
        table.append({"kind": kind, "best": best, **ratios, f"ndcg@{k}_difference": float(difference.mean()),
                      "low": low, "high": high})
    return table


def _gains_by_model(rows: list[dict], out: Path, k: int) -> dict[str, Float[np.ndarray, "users"]]:
    """NDCG@k of each user, averaged over seeds."""
    names = dict.fromkeys(row["model"] for row in rows)
    return {name: np.mean([_gains(out / r["folder"] / "ranks.parquet", k) for r in rows if r["model"] == name], axis=0)
            for name in names}


def _best(rows: list[dict], gains: dict[str, np.ndarray], kind: str) -> str:
    return max((r["model"] for r in rows if r["kind"] == kind), key=lambda name: gains[name].mean())


def _gains(file: Path, k: int) -> Float[np.ndarray, "users"]:
    ranks = pl.read_parquet(file)["rank"].to_numpy()
    return np.where(ranks <= k, 1 / np.log2(1 + ranks), 0.0)


def _interval(difference: np.ndarray, draws: int = 2000) -> tuple[float, float]:
    rng = np.random.default_rng(0)
    means = [difference[rng.integers(0, len(difference), len(difference))].mean() for _ in range(draws)]
    return float(np.quantile(means, 0.025)), float(np.quantile(means, 0.975))


def plot(summary: list[dict[str, Any]], file: Path, k: int = 10) -> None:
    """Bars of Recall@k and NDCG@k with their standard deviations over seeds, as SVG or PNG by the file's name.
    Raises UserError without matplotlib."""
    try:
        import matplotlib

        matplotlib.use("Agg")
        import matplotlib.pyplot as plt
    except ImportError:
        raise UserError("the plot needs matplotlib: pip install 'laserrec[plot]'") from None
    rows = sorted(summary, key=lambda r: r[f"ndcg@{k}"])
    colours = {"id": "#8a8f98", "text": "#5b8db8", "laser": "#d1495b", "fusion": "#edae49"}
    figure, axes = plt.subplots(1, 2, figsize=(10, 0.45 * len(rows) + 1.2), sharey=True, layout="constrained")
    for axis, metric in zip(axes, (f"recall@{k}", f"ndcg@{k}"), strict=True):
        bars = axis.barh([r["model"] for r in rows], [r[metric] for r in rows], xerr=[r[f"{metric}_sd"] for r in rows],
                         color=[colours[r["kind"]] for r in rows], error_kw={"ecolor": "#333", "capsize": 2})
        axis.bar_label(bars, [f"{r[metric]:.4f}" for r in rows], padding=6, fontsize=8)
        axis.set_title(metric, fontsize=10)
        axis.margins(x=0.2)
        axis.spines[["top", "right"]].set_visible(False)
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=150)
    plt.close(figure)
