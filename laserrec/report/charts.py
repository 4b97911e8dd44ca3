"""Charts as inline SVG: coloured by the page's style sheet (light and dark), named for screen readers, drawn small so
that their letters stay readable on a phone."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from laserrec.report.markup import Markup, join, tag

_WIDTH, _HEIGHT = 420, 240
_LEFT, _RIGHT, _TOP, _BOTTOM = 52, 14, 22, 40
_ROOM = 0.05
"""Share of the height left free over and under a line."""
_DOTTED = 60
"""A line of at most so many points shows them as dots, each with its numbers on hover."""
MOST_POINTS = 300
"""Longer curves are averaged to about so many points."""


@dataclass(frozen=True)
class Series:
    """One line; a y of NaN is a gap."""

    name: str
    x: Sequence[float]
    y: Sequence[float]


@dataclass(frozen=True)
class Mark:
    """A named place on the x axis."""

    x: float
    label: str


def number(value: float) -> str:
    """At most four significant digits, thousands set off."""
    if value == 0 or not math.isfinite(value):
        return "0" if value == 0 else "–"
    if abs(value) >= 1000:
        return f"{value:,.0f}"
    return f"{value:.4g}" if abs(value) >= 1e-4 else f"{value:.1e}"


def ticks(low: float, high: float, about: int = 5) -> list[float]:
    """Round numbers from low to high, steps of 1, 2 or 5 times a power of ten."""
    if not high > low:
        return [low]
    power = 10.0 ** math.floor(math.log10((high - low) / about))
    step = min((m * power for m in (1, 2, 5, 10)), key=lambda s: abs((high - low) / s - about))
    first = math.ceil(low / step - 1e-9)
    return [round(i * step, 12) for i in range(first, math.floor(high / step + 1e-9) + 1)]


def line_chart(title: str, series: Sequence[Series], x_label: str, y_label: str, marks: Sequence[Mark] = (),
               x_ticks: Sequence[Mark] | None = None, from_zero: bool = False) -> Markup:
    """A figure with its legend. x_ticks: names of places instead of round numbers."""
    xs, (low, high) = _bounds([v for s in series for v in s.x]), _bounds([v for s in series for v in s.y], from_zero)
    room = _ROOM * (high - low)
    frame = _Frame(xs, (low if from_zero and low == 0 else low - room, high + room))
    x_marks = x_ticks if x_ticks is not None else [Mark(t, number(t)) for t in ticks(*xs)]
    parts = [frame.grid(x_marks, x_label, y_label)]
    parts += [frame.mark(mark, at) for at, mark in enumerate(marks)]
    parts += [_line(frame, s, i) for i, s in enumerate(series, 1)]
    said = f"{title}: {x_label} against {y_label}. " + " ".join(_in_words(s) for s in series)
    said += "".join(f" {m.label} at {number(m.x) if x_ticks is None else _named(x_ticks, m.x)}." for m in marks)
    return _figure(title, said, _HEIGHT, parts, [s.name for s in series] if len(series) > 1 else [])


def bar_chart(title: str, names: Sequence[str], values: Sequence[float], labels: Sequence[str], unit: str,
              even: float | None = None) -> Markup:
    """Horizontal bars from zero; `even` draws a line at that value."""
    row, top, full = 30, 8, _WIDTH - 8
    height = top + row * len(names) + 4
    most = max([*values, even or 0.0]) or 1.0
    bars, words = [], []
    for i, (name, value, label) in enumerate(zip(names, values, labels, strict=True)):
        y = top + i * row
        short = name if len(name) <= 46 else name[:45] + "…"
        bars.append(tag("rect", x=4, y=y + 15, width=f"{full * value / most:.1f}", height=10, rx=2, class_="f1"))
        words += [tag("text", short, x=4, y=y + 9, class_="tick halo"),
                  tag("text", label, x=4 + full, y=y + 9, class_="tick strong end halo")]
    if even is not None:
        x = 4 + full * even / most
        bars.append(tag("line", x1=f"{x:.1f}", x2=f"{x:.1f}", y1=2, y2=height - 2, class_="mark"))
    said = f"{title}, {unit}: " + ", ".join(f"{n} {v}" for n, v in zip(names, labels, strict=True))
    return _figure(title, said, height, bars + words, [])


def scatter(title: str, said: str, x: np.ndarray, y: np.ndarray, group: np.ndarray, titles: Sequence[str]) -> Markup:
    """Points in the plane without axes; group 0, 1, ... is colour and form; titles show on hover. No legend."""
    size, edge = 640, 10
    px, py = (_spread(v, size, edge) for v in (x, y))
    shapes = [tag("circle", id="m0", r=3.1), tag("rect", id="m1", x=-2.7, y=-2.7, width=5.4, height=5.4),
              tag("path", id="m2", d="M0-3.8 3.5 2.6-3.5 2.6z"), tag("path", id="m3", d="M0-3.9 3.9 0 0 3.9-3.9 0z")]
    order = np.argsort(-group, kind="stable")  # the most frequent groups on top
    points = [tag("use", tag("title", titles[i]), href=f"#m{group[i] % 4}", x=f"{px[i]:.1f}", y=f"{py[i]:.1f}",
                  class_=f"g{group[i]}") for i in order.tolist()]
    drawing = tag("svg", tag("defs", shapes), points, viewBox=f"0 0 {size} {size}", role="img", aria_label=said,
                  class_="map")
    return tag("figure", tag("figcaption", title), drawing)


def key(place: int) -> Markup:
    """A sample of the `place`-th group's point, for a legend."""
    return tag("svg", tag("use", href=f"#m{place % 4}", x=6, y=6, class_=f"g{place}"), viewBox="0 0 12 12",
               class_="key", aria_hidden="true")


# -- inside ---------------------------------------------------------------------------------------------------------


class _Frame:
    """Axes and the way from numbers to places."""

    def __init__(self, xs: tuple[float, float], ys: tuple[float, float]):
        self.xs, self.ys = xs, ys

    def at(self, x: float, y: float) -> tuple[float, float]:
        share_x = (x - self.xs[0]) / (self.xs[1] - self.xs[0])
        share_y = (y - self.ys[0]) / (self.ys[1] - self.ys[0])
        return (_LEFT + share_x * (_WIDTH - _LEFT - _RIGHT), _HEIGHT - _BOTTOM - share_y * (_HEIGHT - _TOP - _BOTTOM))

    def grid(self, x_marks: Sequence[Mark], x_label: str, y_label: str) -> Markup:
        bottom, parts = _HEIGHT - _BOTTOM, []
        for value in ticks(*self.ys):
            y = self.at(self.xs[0], value)[1]
            parts += [tag("line", x1=_LEFT, x2=_WIDTH - _RIGHT, y1=f"{y:.1f}", y2=f"{y:.1f}", class_="grid"),
                      tag("text", number(value), x=_LEFT - 6, y=f"{y + 4:.1f}", class_="tick end")]
        for mark in x_marks:
            x = self.at(mark.x, self.ys[0])[0]
            parts += [tag("line", x1=f"{x:.1f}", x2=f"{x:.1f}", y1=bottom, y2=bottom + 4, class_="axis"),
                      tag("text", mark.label, x=f"{x:.1f}", y=bottom + 17, class_="tick middle")]
        parts += [tag("line", x1=_LEFT, x2=_WIDTH - _RIGHT, y1=bottom, y2=bottom, class_="axis"),
                  tag("text", x_label, x=(_LEFT + _WIDTH - _RIGHT) / 2, y=_HEIGHT - 5, class_="tick middle"),
                  tag("text", y_label, x=2, y=11, class_="tick")]
        return join(parts)

    def mark(self, mark: Mark, place: int) -> Markup:
        """Its name stands over the lines, or among them where the y axis' own name is; a second mark's stands lower, so
        that near ones don't cover each other."""
        x = self.at(mark.x, self.ys[0])[0]
        over, right = x > _WIDTH * 0.5 and place == 0, x > _WIDTH * 0.6
        left, top = x + (-5 if right else 5), 15 if over else _TOP + 12 + 14 * place
        return join(tag("line", x1=f"{x:.1f}", x2=f"{x:.1f}", y1=6 if over else _TOP, y2=_HEIGHT - _BOTTOM,
                        class_="mark"),
                    tag("text", mark.label, x=f"{left:.1f}", y=top,
                        class_="tick strong halo" + (" end" if right else "")))


def _bounds(values: Sequence[float], from_zero: bool = False) -> tuple[float, float]:
    real = [v for v in values if math.isfinite(v)]
    low, high = (min(real), max(real)) if real else (0.0, 1.0)
    if from_zero:
        low, high = min(0.0, low), max(0.0, high)
    if high == low:
        low, high = low - (abs(low) * 0.05 or 0.5), high + (abs(high) * 0.05 or 0.5)
    return low, high


def _line(frame: _Frame, series: Series, place: int) -> Markup:
    points, pieces, drawing = [], [], False
    for x, y in zip(series.x, series.y, strict=True):
        if math.isfinite(y):
            left, top = frame.at(x, y)
            pieces.append(f"{'L' if drawing else 'M'}{left:.1f} {top:.1f}")
            points.append((f"{left:.1f}", f"{top:.1f}", f"{series.name} {number(y)}".strip()))
        drawing = math.isfinite(y)
    dots = [tag("circle", tag("title", said), cx=left, cy=top, r=2.6, class_=f"f{place}") for left, top, said in points]
    return join(tag("path", d="".join(pieces) or "M0 0", class_=f"line s{place}"),
                dots if len(dots) <= _DOTTED else None)


def _in_words(series: Series) -> str:
    real = [(x, y) for x, y in zip(series.x, series.y, strict=True) if math.isfinite(y)]
    if not real:
        return f"{series.name}: no numbers."
    values = [y for _, y in real]
    return (f"{series.name or 'The line'} goes from {number(values[0])} to {number(values[-1])}, lowest "
            f"{number(min(values))}, highest {number(max(values))}.")


def _named(x_ticks: Sequence[Mark], x: float) -> str:
    return next((t.label for t in x_ticks if t.x == x), number(x))


def _figure(title: str, said: str, height: int, parts: Sequence[Markup], names: Sequence[str]) -> Markup:
    legend = tag("ul", [tag("li", tag("svg", tag("path", d="M0 6h24", class_=f"line s{i}"), viewBox="0 0 24 12",
                                      class_="swatch", aria_hidden="true"), name)
                        for i, name in enumerate(names, 1)], class_="legend") if names else None
    drawing = tag("svg", parts, viewBox=f"0 0 {_WIDTH} {height}", role="img", aria_label=said)
    return tag("figure", tag("figcaption", title), legend, drawing)


def _spread(values: np.ndarray, size: int, edge: int) -> np.ndarray:
    """Into the drawing, cut at what the outermost half percent of the points would take."""
    low, high = np.quantile(values, [0.0025, 0.9975])
    return edge + (size - 2 * edge) * np.clip((values - low) / max(float(high - low), 1e-12), 0, 1)
