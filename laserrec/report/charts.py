"""Charts as inline SVG by matplotlib: letters stay text, colours are the page's CSS variables (light and dark)."""

from __future__ import annotations

import io
import math
import re
import warnings
import xml.etree.ElementTree as ET
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_WIDTH, _HEIGHT = 420, 230
"""CSS pixels of a line chart: small, so that its letters stay readable where a phone shrinks it."""
_MAP = 640
_LEGEND_COLUMNS = 4
_DOTTED = 60
"""A line of at most so many points shows them as dots, each with its number on hover."""
_SVG = "http://www.w3.org/2000/svg"
_SHORT = {"{http://www.w3.org/1999/xlink}href": "href"}
"""Attributes that HTML knows without their namespace."""
_VARIABLES = {f"#0000{place:02x}": f"var(--c{place})" for place in range(1, 10)} | {
    "#00000a": "var(--text)", "#00000b": "var(--soft)", "#00000c": "var(--grid)", "#00000d": "var(--card)"}
"""Stand-ins that matplotlib draws with -> the style sheet's colours."""
_INK, _SOFT, _GRID, _CARD = list(_VARIABLES)[9:]
_COLOURS = list(_VARIABLES)[:9]
_DASHES = ("-", (0, (5, 2)), (0, (1.5, 1.5)), (0, (6, 2, 1.5, 2)))
_STYLE: dict[Any, Any] = {
    "svg.fonttype": "none", "text.parse_math": False, "font.size": 12, "text.color": _INK, "axes.labelcolor": _SOFT,
    "axes.edgecolor": _SOFT, "axes.facecolor": "none", "figure.facecolor": "none", "axes.spines.top": False,
    "axes.spines.right": False, "axes.spines.left": False, "axes.grid": True, "axes.grid.axis": "y",
    "grid.color": _GRID, "xtick.color": _SOFT, "ytick.color": _SOFT, "ytick.left": False, "axes.axisbelow": True,
    "axes.titlesize": 12, "axes.titlecolor": _SOFT, "axes.titlelocation": "left", "legend.frameon": False,
    "lines.linewidth": 1.8, "lines.markersize": 4, "lines.markeredgewidth": 0, "axes.xmargin": 0.01,
}


class Series(NamedTuple):
    """One line; a y of NaN is a gap."""

    name: str
    x: Sequence[float]
    y: Sequence[float]


class Mark(NamedTuple):
    """A named place on the x axis."""

    x: float
    label: str


class Chart(NamedTuple):
    """A figure of the page: its caption, and the drawing as an <svg> element."""

    title: str
    svg: str


def number(value: float, _: Any = None) -> str:
    """At most four significant digits, thousands set off. The second argument is matplotlib's tick place."""
    if value == 0 or not math.isfinite(value):
        return "0" if value == 0 else "–"
    if abs(value) >= 1000:
        return f"{value:,.0f}"
    return f"{value:.4g}" if abs(value) >= 1e-4 else f"{value:.1e}"


def line_chart(title: str, series: Sequence[Series], x_label: str, y_label: str, marks: Sequence[Mark] = (),
               x_ticks: Sequence[Mark] | None = None, from_zero: bool = False, salt: str = "") -> Chart:
    """Lines with a legend where there are several. x_ticks: labels at given places instead of round numbers. salt:
    tells charts of one page apart that have the same title, so that no two elements share an id."""
    import matplotlib
    from matplotlib.figure import Figure

    names = [s.name for s in series if s.name]
    height = _HEIGHT + 18 * math.ceil(len(names) / _LEGEND_COLUMNS)
    with matplotlib.rc_context(_STYLE | {"svg.hashsalt": f"{salt} {title}"}):
        figure = Figure(figsize=(_WIDTH / 72, height / 72), layout="constrained")
        axes = figure.add_subplot(title=y_label, xlabel=x_label)
        for place, line in enumerate(series):
            axes.plot(line.x, line.y, gid=f"s{place}", label=line.name, color=_COLOURS[place % 8],
                      linestyle=_DASHES[place % 4], marker="o" if len(line.x) <= _DOTTED else "")
        _finish_axes(axes, marks, x_ticks, from_zero)
        if names:
            figure.legend(loc="outside upper left", ncols=_LEGEND_COLUMNS, handlelength=2, borderaxespad=0)
        spoken = f"{title}: {x_label} against {y_label}. " + " ".join(_in_words(s) for s in series)
        at = {t.x: t.label for t in x_ticks or ()}
        spoken += "".join(f" {m.label} at {at.get(m.x, number(m.x))}." for m in marks)
        points = {f"s{place}": [f"{s.name} {number(y)}".strip() for y in s.y if math.isfinite(y)]
                  for place, s in enumerate(series) if len(s.x) <= _DOTTED}
        return Chart(title, _inline(figure, spoken, points))


def scatter(title: str, spoken: str, x: np.ndarray, y: np.ndarray, group: np.ndarray, titles: Sequence[str]) -> Chart:
    """Points in the plane without axes. Group 0, 1, ... is colour, shape and CSS class (g0, g1, ...); titles show on
    hover. Has no legend. spoken: for screen readers."""
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context(_STYLE | {"svg.hashsalt": title}):
        figure = Figure(figsize=(_MAP / 72, _MAP / 72))
        axes = figure.add_axes((0.01, 0.01, 0.98, 0.98))
        axes.set_axis_off()
        for place in sorted(set(group.tolist()), reverse=True):  # the most frequent groups on top
            own = group == place
            axes.plot(_clipped(x)[own], _clipped(y)[own], "os^D"[place % 4], gid=f"g{place}", markersize=6,
                      color=_COLOURS[min(place, 8)])
        points = {f"g{place}": [titles[i] for i in np.flatnonzero(group == place)] for place in set(group.tolist())}
        return Chart(title, _inline(figure, spoken, points))


# -- inside ---------------------------------------------------------------------------------------------------------


def _finish_axes(axes: Axes, marks: Sequence[Mark], x_ticks: Sequence[Mark] | None, from_zero: bool) -> None:
    axes.yaxis.set_major_formatter(number)
    axes.xaxis.set_major_formatter(number)
    axes.locator_params(axis="y", nbins=5)
    axes.locator_params(axis="x", nbins=6)
    if x_ticks is not None:
        axes.set_xticks([t.x for t in x_ticks], [t.label for t in x_ticks])
    if from_zero:
        axes.set_ylim(bottom=min(0, axes.get_ylim()[0]))
    low, high = axes.get_xlim()
    for place, mark in enumerate(sorted(marks, key=lambda m: m.x)):  # each name a line lower, so that none overlap
        axes.axvline(mark.x, color=_INK, linewidth=1, linestyle=(0, (3, 3)), alpha=0.7)
        right = mark.x > low + 0.8 * (high - low)
        axes.annotate(mark.label, (mark.x, 1), (-4 if right else 4, -3 - 14 * (place % 4)), va="top",
                      xycoords=("data", "axes fraction"), textcoords="offset pixels", ha="right" if right else "left",
                      bbox={"facecolor": _CARD, "edgecolor": "none", "alpha": 0.75, "pad": 1})


def _in_words(series: Series) -> str:
    values = [y for y in series.y if math.isfinite(y)]
    if not values:
        return f"{series.name}: no numbers."
    return (f"{series.name or 'The line'} goes from {number(values[0])} to {number(values[-1])}, lowest "
            f"{number(min(values))}, highest {number(max(values))}.")


def _clipped(values: np.ndarray) -> np.ndarray:
    """Without the outermost half percent of the range, so that a stray point does not shrink the map."""
    return np.clip(values, *np.quantile(values, [0.0025, 0.9975]))


def _inline(figure: Figure, spoken: str, points: dict[str, list[str]]) -> str:
    """The figure as an <svg> for an HTML page. points: group -> a hover text for each of its markers."""
    buffer = io.StringIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # letters that matplotlib's own font lacks: the reader's browser has them
        figure.savefig(buffer, format="svg", metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")))
    ET.register_namespace("", _SVG)
    root = ET.fromstring(buffer.getvalue())
    root.attrib = {"viewBox": root.attrib["viewBox"], "role": "img", "aria-label": spoken}
    root.remove(root[0])  # <defs> with a style for every element of the page
    for element in root.iter():
        element.attrib = {_SHORT.get(name, name): value for name, value in element.attrib.items()}
        if "style" in element.attrib:
            element.attrib["style"] = _styled(element.attrib["style"])
    used = {name for e in root.iter() for value in e.attrib.values() for name in re.findall(r"#([mp]\w+)", value)}
    for element in list(root.iter()):
        element.tail = None
        if element.tag != f"{{{_SVG}}}text":
            element.text = None
        if "rotate(-0" in element.get("transform", ""):
            del element.attrib["transform"]
        name = element.get("id")
        if name in points:
            element.set("class", name)
            _add_titles(element, points[name])
        if name not in used:
            element.attrib.pop("id", None)
    return ET.tostring(root, encoding="unicode")


def _styled(style: str) -> str:
    """With the page's own letters and colours. Of styles alone: a text may look like a colour."""
    style = re.sub(r" font-family: [^;]*;", "", style)
    return re.sub("#0000[0-9a-f]{2}", lambda found: _VARIABLES[found[0]], style)


def _add_titles(group: ET.Element, titles: Sequence[str]) -> None:
    """Hover texts of a group's markers; what all of them look like is written once."""
    for marker, title in zip(group.iter(f"{{{_SVG}}}use"), titles, strict=True):
        group.set("style", marker.attrib.pop("style"))
        ET.SubElement(marker, f"{{{_SVG}}}title").text = title
