"""One panel per data set, NDCG@10 of each model: the picture in docs/results.md.

    python benchmarks/plot_datasets.py benchmarks/results/datasets.json docs/_static/datasets.svg
"""

from __future__ import annotations

import sys
from pathlib import Path

import polars as pl
from matplotlib.figure import Figure

from laserrec.experiments.datasets import means
from laserrec.util.io import read_json

COLOURS = {"id": "#8a8f98", "text": "#5b8db8", "laser": "#d1495b"}
COLUMNS = 4


def plot(table: pl.DataFrame, file: Path) -> None:
    """SVG or PNG by the file's name."""
    names = table["data"].unique(maintain_order=True).to_list()
    lines = -(-len(names) // COLUMNS)
    figure = Figure(figsize=(4.2 * COLUMNS, 2.6 * lines), layout="constrained")
    axes = figure.subplots(lines, COLUMNS).flatten()
    for axis, name in zip(axes, names, strict=False):
        own = table.filter(pl.col("data") == name).reverse()
        bars = axis.barh(own["model"].to_list(), own["ndcg@10"].to_list(),
                         color=[COLOURS[kind] for kind in own["kind"]])
        axis.bar_label(bars, [f"{value:.4f}" for value in own["ndcg@10"]], padding=4, fontsize=8)
        axis.set_title(name, fontsize=10)
        axis.margins(x=0.25)
        axis.tick_params(labelsize=8)
        axis.spines[["top", "right"]].set_visible(False)
    for axis in axes[len(names):]:
        axis.set_axis_off()
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=150)


if __name__ == "__main__":
    rows = read_json(Path(sys.argv[1]), "make it with laserrec reproduce datasets")
    plot(pl.DataFrame(means(rows, 10)), Path(sys.argv[2]))
