"""Bars of Recall@k and NDCG@k with their standard deviations over seeds: the picture in docs/results.md.

    python benchmarks/plot_quality.py benchmarks/results/quality.json docs/_static/quality.svg
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from laserrec.util.io import read_json

COLOURS = {"id": "#8a8f98", "text": "#5b8db8", "laser": "#d1495b"}


def plot(result: dict[str, Any], file: Path) -> None:
    """SVG or PNG by the file's name."""
    k = result["config"]["eval"]["k"]
    rows = sorted(result["summary"], key=lambda row: row[f"ndcg@{k}"])
    figure = Figure(figsize=(10, 0.45 * len(rows) + 1.2), layout="constrained")
    metrics = f"recall@{k}", f"ndcg@{k}"
    for axis, metric in zip(figure.subplots(1, 2, sharey=True), metrics, strict=True):
        bars = axis.barh([row["model"] for row in rows], [row[metric] for row in rows],
                         xerr=[row[f"{metric}_sd"] for row in rows], error_kw={"ecolor": "#333", "capsize": 2},
                         color=[COLOURS[row["kind"]] for row in rows])
        axis.bar_label(bars, [f"{row[metric]:.4f}" for row in rows], padding=6, fontsize=8)
        axis.set_title(metric, fontsize=10)
        axis.margins(x=0.2)
        axis.spines[["top", "right"]].set_visible(False)
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=150)


if __name__ == "__main__":
    plot(read_json(Path(sys.argv[1]), "make it with laserrec reproduce quality"), Path(sys.argv[2]))
