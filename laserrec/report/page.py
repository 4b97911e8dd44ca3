"""The report's page from its templates: one file, no script, nothing fetched; light and dark, readable on a phone."""

from __future__ import annotations

from typing import Any

from laserrec import __version__
from laserrec.report.charts import Chart, number, scatter
from laserrec.report.collect import Report
from laserrec.report.curves import charts, metric, metric_names
from laserrec.report.item_map import ItemMap

MAP_METHODS = {"tsne": "t-SNE", "pca": "PCA"}


def render(report: Report) -> str:
    """The whole page; the same report gives the same text. Sections without content are left out."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    # autoescape: a title can never become a tag. StrictUndefined: a misspelt name fails instead of showing nothing.
    pages = Environment(loader=PackageLoader("laserrec.report"), autoescape=True, undefined=StrictUndefined,
                        trim_blocks=True, lstrip_blocks=True)
    pages.filters |= {"number": number, "metric": metric, "plain": plain, "duration": duration}
    sections = [("summary", "Summary", True), ("results", "Results", True),
                ("parts", "What each part gives on this data", report.model.get("parts")),
                ("training", "Training", report.trainings), ("experts", "Experts", report.experts),
                ("map", "Map of the items", report.items), ("examples", "Recommendations", report.examples),
                ("losses", "Dropped data", report.data.get("steps") or report.counts),
                ("settings", "Settings and data", True)]
    return pages.get_template("page.html").render(
        r=report, version=__version__, sections={name: title for name, title, content in sections if content},
        trainings=[(t, charts(t), metric_names(t)) for t in report.trainings],
        map_chart=None if report.items is None else _map_chart(report.items), map_methods=MAP_METHODS)


def _map_chart(items: ItemMap) -> Chart:
    method = MAP_METHODS[items.method]
    groups = ", ".join(f"{name} {count}" for name, count in items.counts().items())
    spoken = f"Map of {len(items.titles)} items by {method}; groups: {groups}"
    return scatter(f"{method} of the item embeddings", spoken, items.x, items.y, items.group, items.titles)


def plain(value: Any) -> str:
    """A setting or fact as people write it."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int | float):
        return f"{value:,}" if isinstance(value, int) else f"{value:.6g}"
    return ", ".join(map(plain, value)) if isinstance(value, list | tuple) else str(value)


def duration(seconds: float) -> str:
    """In the unit that gives a number of two to four digits."""
    if seconds < 600:
        return f"{seconds:,.0f} s"
    return f"{seconds / 60:,.0f} min" if seconds < 2e4 else f"{seconds / 3600:,.1f} h"
