"""Figure 3 as Markdown and as a plot: NDCG over the share of the target's training users."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import Any

Rows = Sequence[Mapping[str, Any]]
Panel = dict[tuple[str, str], dict[float, tuple[float, float]]]
"""(model, start) -> percent -> mean and standard deviation over seeds; that of one seed is zero."""
_STARTS: dict[str, tuple[str, Any]] = {"transfer": ("from the source's model", "-"), "nothing": ("from nothing", "--")}
"""start -> in words, and as a line."""


def lines(rows: Rows, metric: str) -> dict[tuple[str, str, str], Panel]:
    """By source, target and base."""
    values: dict[Any, dict[Any, dict[float, list[float]]]] = {}
    for row in rows:
        panel = values.setdefault((row["source"], row["target"], row["base"]), {})
        panel.setdefault((row["model"], row["start"]), {}).setdefault(row["percent"], []).append(row[metric])
    return {panel: {line: {percent: (mean(found), stdev(found) if len(found) > 1 else 0.0)
                           for percent, found in sorted(points.items())} for line, points in own.items()}
            for panel, own in values.items()}


def table(panel: Panel) -> tuple[list[str], list[list[str]]]:
    """Heads and rows: a model and its start, then a column for each share."""
    percents = sorted({percent for points in panel.values() for percent in points})
    rows = [[model, _STARTS[start][0], *(_cell(points.get(percent)) for percent in percents)]
            for (model, start), points in panel.items()]
    return ["model", "start", *(f"{percent:g}%" for percent in percents)], rows


def _cell(found: tuple[float, float] | None) -> str:
    if found is None:
        return ""
    return f"{found[0]:.4f}" + (f" ± {found[1]:.4f}" if found[1] else "")


def markdown(result: Mapping[str, Any], k: int = 10) -> str:
    """A table of NDCG and one of Recall for each way between two data sets, and each base."""
    seeds = len({row["seed"] for row in result["rows"]})
    out = [f"# {result['title']}", "", f"Split: {result['split']} of the target; all items ranked, nothing filtered. "
           f"Columns: share of the target's training users. 0%: the source's model as it is. Seeds: {seeds}."]
    panels = {metric: lines(result["rows"], f"{metric.lower()}@{k}") for metric in ("NDCG", "Recall")}
    for panel in panels["NDCG"]:
        out += ["", f"## {panel[0]} to {panel[1]}, preset {panel[2]}"]
        for metric, own in panels.items():
            heads, rows = table(own[panel])
            out += ["", f"{metric}@{k}:", "", f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
            out += [f"| {' | '.join(row)} |" for row in rows]
    if result["missing"]:
        out += ["", "Not measured:", ""]
        out += [f"- {told(row)} ({row['why']})" for row in result["missing"]]
    return "\n".join(out) + "\n"


def told(row: Mapping[str, Any]) -> str:
    """Which point this is."""
    return (f"{row['source']} to {row['target']}, {row['base']}, {row['model']}, seed {row['seed']}, "
            f"{row['percent']:g}%, {_STARTS[row['start']][0]}")


def plot(result: Mapping[str, Any], file: Path, k: int = 10) -> None:
    """A panel for each way between two data sets and each base, a colour for each model. Shares stand at equal
    distances. SVG or PNG by the name. Raises ImportError without the extra `report`."""
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    panels = lines(result["rows"], f"ndcg@{k}")
    models = list(dict.fromkeys(row["model"] for row in result["rows"]))
    percents = sorted({row["percent"] for row in result["rows"]})
    figure = Figure(figsize=(5.2 * len(panels) + 1.6, 3.8), layout="constrained")
    axes = figure.subplots(1, len(panels), squeeze=False)[0]
    for axis, ((source, target, base), own) in zip(axes, panels.items(), strict=True):
        for (model, start), points in own.items():
            values, spreads = zip(*points.values(), strict=True)
            axis.errorbar([percents.index(percent) for percent in points], values,
                          yerr=spreads if any(spreads) else None, color=f"C{models.index(model)}",
                          linestyle=_STARTS[start][1], marker="o" if start == "transfer" else ".", markersize=5,
                          alpha=1.0 if start == "transfer" else 0.6, capsize=2)
        axis.set_xticks(range(len(percents)), [f"{percent:g}%" for percent in percents])
        axis.set_ylim(bottom=0)
        axis.set_title(f"{source} to {target}, {base}", fontsize=9)
        axis.set_xlabel("share of the target's training users", fontsize=8)
        axis.tick_params(labelsize=8)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].set_ylabel(f"NDCG@{k}, test, all items ranked", fontsize=8)
    keys = [Line2D([], [], color=f"C{number}", label=model) for number, model in enumerate(models)]
    keys += [Line2D([], [], color="0.3", linestyle=style, label=words) for words, style in _STARTS.values()]
    figure.legend(handles=keys, loc="outside right upper", fontsize=8, frameon=False)
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=150)
