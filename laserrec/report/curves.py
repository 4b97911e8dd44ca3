"""The charts of one training."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from laserrec.report.charts import MOST_POINTS, Mark, Series, line_chart
from laserrec.report.collect import Curves
from laserrec.report.markup import Markup

_MEANS = ("contrast", "balance", "loss", "grad_norm")
_STEP_CHARTS = (
    ("contrast", "Contrast loss", "cross-entropy, nats"),
    ("loss", "Training loss", "cross-entropy, nats"),
    ("balance", "Load-balancing loss", "K Σ f P; 1 is even"),
    ("lr", "Learning rate", "rate"),
    ("grad_norm", "Gradient norm", "before clipping"),
    ("seen_offset", "Offset of items seen before", "added to their score"),
    ("temperature", "Learnt temperature", "tau of the softmax"),
    ("rate", "Speed", "examples per second"),
)


def thinned(steps: Sequence[dict[str, Any]], most: int = MOST_POINTS) -> list[dict[str, Any]]:
    """At most `most` lines of training.jsonl: neighbours of one stage in one, means weighed by their steps."""
    size = -(-len(steps) // most) if steps else 1
    out: list[dict[str, Any]] = []
    at = 0
    while at < len(steps):
        group = [e for e in steps[at : at + size] if e.get("stage") == steps[at].get("stage")]
        out.append(_merged(group))
        at += len(group)
    return out


def _merged(group: Sequence[dict[str, Any]]) -> dict[str, Any]:
    entry, count = dict(group[-1]), sum(e["steps"] for e in group)
    for name in _MEANS:
        values = [e.get(name) for e in group]
        if name in entry and all(v is not None for v in values):
            entry[name] = sum(v * e["steps"] for v, e in zip(values, group, strict=True)) / count
    if "experts" in entry:
        entry["experts"] = [sum(users) for users in zip(*(e["experts"] for e in group if "experts" in e), strict=True)]
    seconds = sum(e["seconds"] for e in group)
    return {**entry, "steps": count, "rate": sum(e["examples"] for e in group) / seconds if seconds else None}


def step_charts(curves: Curves) -> list[Markup]:
    """Over steps: what is in the lines, each its own chart; none without training.jsonl."""
    steps = thinned(curves.steps)
    marks = _stage_marks(steps)
    charts = []
    for name, title, unit in _STEP_CHARTS:
        line = _series("", steps, name)
        if line is not None:
            charts.append(line_chart(title, [line], "step", unit, marks, from_zero=name in ("lr", "rate")))
    if any("experts" in e for e in steps):
        charts.append(_expert_chart(steps, marks))
    return charts


def _expert_chart(steps: Sequence[dict[str, Any]], marks: Sequence[Mark]) -> Markup:
    some = [e for e in steps if sum(e.get("experts", []))]
    at, shares = [e["step"] for e in some], [[100 * n / sum(e["experts"]) for n in e["experts"]] for e in some]
    lines = [Series(f"expert {j}", at, own) for j, own in enumerate(zip(*shares, strict=True), 1)]
    return line_chart("Experts while training", lines, "step", "% of the examples", marks, from_zero=True)


def _series(label: str, steps: Sequence[dict[str, Any]], name: str) -> Series | None:
    own = [e for e in steps if name in e]
    if not own or all(e[name] is None for e in own):
        return None
    return Series(label, [e["step"] for e in own], [float("nan") if e[name] is None else e[name] for e in own])


def _stage_marks(steps: Sequence[dict[str, Any]]) -> list[Mark]:
    first = next((e["step"] for e in steps if e.get("stage") == 2), None)
    return [] if first is None or first == steps[0]["step"] else [Mark(first, "stage 2")]


def metric_names(entry: dict[str, Any]) -> list[str]:
    """The validation metrics of a line of log.jsonl."""
    return [k for k in entry if k.startswith("validation_") and k != "validation_users"]


def validation_chart(curves: Curves) -> Markup | None:
    """Recall, NDCG and MRR after each epoch, the kept one marked."""
    entries = [e for e in curves.epochs if metric_names(e)]
    if not entries:
        return None
    staged = "stage" in entries[0]
    places = list(range(len(entries))) if staged else [e["epoch"] for e in entries]
    lines = [Series(_metric(name), places, [e[name] for e in entries]) for name in metric_names(entries[0])]
    kept = [Mark(x, "kept") for x, e in zip(places, entries, strict=True)
            if all(e.get(k) == v for k, v in curves.kept.items())]
    named = [Mark(i, _place(e)) for i, e in enumerate(entries)] if staged else None
    if named and len(named) > 8:
        named = named[:: -(-len(named) // 8)]
    axis = "stage.epoch" if staged else "epoch"
    return line_chart("Validation", lines, axis, "higher is better", kept, named)


def epoch_loss_chart(curves: Curves) -> Markup | None:
    """For a folder without training.jsonl."""
    own = [(i, e) for i, e in enumerate(curves.epochs) if e.get("loss") is not None]
    if curves.steps or not own:
        return None
    return line_chart("Training loss", [Series("", [i for i, _ in own], [e["loss"] for _, e in own])], "epoch",
                      "mean over the epoch")


def _metric(name: str) -> str:
    return name.removeprefix("validation_").replace("ndcg", "NDCG").replace("recall", "Recall").replace("mrr", "MRR")


def _place(entry: dict[str, Any]) -> str:
    return "start" if entry["epoch"] == 0 else f"{entry['stage']}.{entry['epoch']}"
