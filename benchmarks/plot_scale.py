"""Seconds and peak memory of each part by its size: the picture in docs/scaling.md.

    python benchmarks/plot_scale.py benchmarks/results/scale.json docs/_static/scale.svg
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter

from laserrec.util.io import read_json

PANELS = (("prepare", "interactions", {}), ("neighbours", "items", {"interactions": 1_000_000}),
          ("sasrec", "items", {"interactions": 100_000}))
"""Title, what grows, and what stays as it is."""
COLOURS = {"": "#5b8db8", "local": "#d1495b", "exact": "#8a8f98", "sampled": "#d1495b", "full": "#8a8f98"}
MEASURES = {"seconds": "seconds", "peak_gib": "peak memory, GiB"}


def plot(rows: list[dict[str, Any]], file: Path) -> None:
    """SVG or PNG by the file's name."""
    figure = Figure(figsize=(10, 5), layout="constrained")
    axes = figure.subplots(len(MEASURES), len(PANELS), sharex="col")
    for column, (part, size, fixed) in enumerate(PANELS):
        own = [row for row in rows if row["part"].split(",")[0] == part and fixed.items() <= row.items()]
        own.sort(key=lambda row: row["items"])  # of one size the larger catalogue is drawn
        others = ", ".join(f"{count:,} {name}" for name, count in fixed.items())
        for line, (measure, label) in enumerate(MEASURES.items()):
            axis = axes[line][column]
            for kind in sorted({_kind(row) for row in own}):
                points = {row[size]: row[measure] for row in own if _kind(row) == kind}
                axis.plot(*zip(*sorted(points.items()), strict=True), "o-", color=COLOURS[kind], label=kind or None)
            axis.set(xscale="log", yscale="log", ylabel=label if not column else "")
            axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axis.yaxis.set_major_formatter(lambda value, at: f"{value:g}")
            axis.yaxis.set_minor_formatter(NullFormatter())
            axis.grid(alpha=0.3)
            axis.spines[["top", "right"]].set_visible(False)
        axes[0][column].set_title(f"{part} ({others})" if others else part, fontsize=10)
        axes[-1][column].set_xlabel(size)
        if any(map(_kind, own)):
            axes[0][column].legend(fontsize=8)
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=150)


def _kind(row: dict[str, Any]) -> str:
    return row.get("form") or row.get("softmax") or ""


if __name__ == "__main__":
    plot(read_json(Path(sys.argv[1]), "make it with benchmarks/scale.py"), Path(sys.argv[2]))
