"""The logs of one training, and their charts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

from laserrec.recommender.folder import read_log
from laserrec.report.charts import Chart, Mark, Series, line_chart
from laserrec.training.watch import read_training

_MOST_POINTS = 300
"""Longer curves are averaged to about so many points."""
_TITLES = {
    "loss": ("Training loss", "what is minimised, per example"),
    "contrast": ("Contrast loss", "cross-entropy, nats"),
    "balance": ("Load-balancing loss", "K Σ f P; 1 is even"),
    "lr": ("Learning rate", "rate"),
    "grad_norm": ("Gradient norm", "before clipping"),
    "seen_offset": ("Offset of items seen before", "added to their score"),
    "temperature": ("Learnt temperature", "tau of the softmax"),
    "rate": ("Speed", "examples per second"),
}
"""Title and unit of the numbers that are known; others are shown under their own name, after these."""
_PLACE = ("step", "steps", "phase", "epoch", "examples", "seconds")
_RANKED = ("recall@", "ndcg@", "mrr", "hit@", "precision@")


@dataclass(frozen=True)
class Training:
    """Lines as they were logged, each with its "phase" (empty where there is only one)."""

    name: str
    epochs: list[dict[str, Any]]
    """log.jsonl: a line an epoch."""
    steps: list[dict[str, Any]]
    """training.jsonl: a line every few steps."""
    kept: dict[str, Any]
    """The epoch that was kept: {phase, epoch}, {epoch}, or empty if unknown."""

    def is_kept(self, entry: dict[str, Any]) -> bool:
        """Whether this line of `epochs` is the kept one."""
        return bool(self.kept) and all(entry.get(k) == v for k, v in self.kept.items())


def read(name: str, folder: Path, kept: dict[str, Any]) -> Training:
    """kept: the kept epoch's log line, empty if unknown. A missing log is empty; raises UserError for a damaged one."""
    epochs = [_with_phase(entry) for entry in read_log(folder)]
    place = {k: v for k, v in _with_phase(kept).items() if k in ("phase", "epoch") and v != ""}
    return Training(name, epochs, [_with_phase(e) for e in read_training(folder)], place)


def _with_phase(entry: dict[str, Any]) -> dict[str, Any]:
    return {**entry, "phase": str(entry.get("phase", ""))}


def thinned(steps: Sequence[dict[str, Any]], most: int = _MOST_POINTS) -> list[dict[str, Any]]:
    """At most about `most` lines: neighbours of one phase become one, means weighted by their steps."""
    size = -(-len(steps) // most) if steps else 1
    phases = [list(own) for _, own in groupby(steps, key=lambda e: e["phase"])]
    return [_merged(own[at : at + size]) for own in phases for at in range(0, len(own), size)]


def _merged(group: Sequence[dict[str, Any]]) -> dict[str, Any]:
    entry, count = dict(group[-1]), sum(e.get("steps", 1) for e in group)
    for name in _numbers(entry):
        values = [e.get(name) for e in group]
        entry[name] = None if None in values else sum(
            v * e.get("steps", 1) for v, e in zip(values, group, strict=True)) / count
    if "experts" in entry:
        entry["experts"] = [sum(users) for users in zip(*(e["experts"] for e in group if "experts" in e), strict=True)]
    seconds = sum(e.get("seconds", 0) for e in group)
    return {**entry, "steps": count, "rate": sum(e.get("examples", 0) for e in group) / seconds if seconds else None}


def _numbers(entry: dict[str, Any]) -> list[str]:
    return [k for k, v in entry.items() if k not in _PLACE and (v is None or isinstance(v, int | float))]


def charts(training: Training) -> list[Chart]:
    """Validation first, then the loss by epoch (only where no steps were logged), then each number over the steps."""
    found, steps = validation_charts(training), thinned(training.steps)
    by_epoch = [(i, e["loss"]) for i, e in enumerate(training.epochs) if e.get("loss") is not None]
    if by_epoch and not steps:
        line = Series("", *zip(*by_epoch, strict=True))
        found.append(line_chart("Training loss", [line], "epoch", "mean over the epoch", salt=training.name))
    marks = _phase_marks([(e["step"], e["phase"]) for e in steps])
    logged = list(dict.fromkeys(name for e in steps for name in _numbers(e)))
    for name in sorted(logged, key=lambda n: list(_TITLES).index(n) if n in _TITLES else len(_TITLES)):
        title, unit = _TITLES.get(name, (name.replace("_", " ").capitalize(), "mean over steps"))
        line = Series("", [e["step"] for e in steps], [_value(e, name) for e in steps])
        if any(y == y for y in line.y):
            found.append(line_chart(title, [line], "step", unit, marks, from_zero=name in ("lr", "rate"),
                                    salt=training.name))
    some = [e for e in steps if sum(e.get("experts", []))]
    if some:
        shares = zip(*([100 * n / sum(e["experts"]) for n in e["experts"]] for e in some), strict=True)
        lines = [Series(f"expert {j}", [e["step"] for e in some], own) for j, own in enumerate(shares, 1)]
        found.append(line_chart("Experts while training", lines, "step", "% of the examples", marks, from_zero=True,
                                salt=training.name))
    return found


def metric_names(training: Training) -> list[str]:
    """The validation metrics of all lines of log.jsonl, without their prefix."""
    names = dict.fromkeys(k for e in training.epochs for k in e if k.startswith("validation_"))
    return [name.removeprefix("validation_") for name in names if name != "validation_users"]


def validation_charts(training: Training) -> list[Chart]:
    """Ranking metrics after each epoch in one chart, the kept epoch marked; any other number in a chart of its own."""
    epochs, names = training.epochs, metric_names(training)
    if len(epochs) < 2:
        return []
    places = list(range(len(epochs)))
    every = -(-len(epochs) // 8)
    ticks = [Mark(i, str(epochs[i].get("epoch", i))) for i in places[::every or 1]]
    marks = _phase_marks([(i, e["phase"]) for i, e in enumerate(epochs)])
    marks += [Mark(i, "kept") for i, e in enumerate(epochs) if training.is_kept(e)]
    ranked = [n for n in names if n.startswith(_RANKED)]
    drawn = [("Validation", "higher is better", ranked)] if ranked else []
    drawn += [(f"Validation: {n.replace('_', ' ')}", "all validation users", [n]) for n in names if n not in ranked]
    return [line_chart(title, [Series(metric(n) if len(own) > 1 else "", places,
                                      [_value(e, f"validation_{n}") for e in epochs]) for n in own],
                       "epoch", unit, marks, ticks, salt=training.name) for title, unit, own in drawn]


def metric(name: str) -> str:
    """As papers write it: Recall@10, NDCG@10, MRR."""
    return name.replace("ndcg", "NDCG").replace("recall", "Recall").replace("mrr", "MRR")


def _value(entry: dict[str, Any], name: str) -> float:
    value = entry.get(name)
    return float("nan") if value is None else float(value)


def _phase_marks(places: Sequence[tuple[float, str]]) -> list[Mark]:
    """Where each phase but the first begins."""
    return [Mark(x, phase) for (x, phase), (_, before) in zip(places[1:], places, strict=False) if phase != before]
