"""The results table from what `laserrec evaluate --json`, `quickstart` or `reproduce quality` wrote."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from laserrec.util.errors import UserError
from laserrec.util.io import read_json

_FACTS = ("users", "seeds", "seconds")


@dataclass(frozen=True)
class Row:
    """One model. `deviation`: metric -> standard deviation over seeds; empty for one seed."""

    model: str
    metrics: dict[str, float]
    deviation: dict[str, float]
    hidden: dict[str, float]
    """The same metrics with the history's items not ranked; empty where the file has none."""
    facts: dict[str, float]
    """users, seconds or seeds, where the file has them."""


@dataclass(frozen=True)
class Results:
    """Rows in the file's order; `metrics` are their columns."""

    file: str
    split: str
    metrics: tuple[str, ...]
    rows: tuple[Row, ...]

    @property
    def facts(self) -> list[str]:
        """Those that all rows have."""
        return [name for name in _FACTS if all(name in row.facts for row in self.rows)]

    @property
    def best(self) -> dict[str, float]:
        """Metric -> the highest value."""
        return {m: max(row.metrics[m] for row in self.rows) for m in self.metrics}


def read_results(file: Path) -> Results:
    """Raises UserError for a file of another kind."""
    content = read_json(file, "evaluate again")
    entries = content.get("summary") if isinstance(content, dict) else content
    advice = f"{file} is no table of results; laserrec evaluate --json makes one"
    if not isinstance(entries, list) or not entries or not all(isinstance(e, dict) for e in entries):
        raise UserError(advice)
    metrics = tuple(k for k in entries[0] if k.startswith(("recall@", "ndcg@")) and k.partition("@")[2].isdigit())
    metrics += ("mrr",)
    if len(metrics) < 3 or not all("model" in e and all(isinstance(e.get(m), int | float) for m in metrics)
                                   for e in entries):
        raise UserError(advice)
    return Results(file.name, str(entries[0].get("split", "test")), metrics, tuple(_row(e, metrics) for e in entries))


def _row(entry: dict[str, Any], metrics: tuple[str, ...]) -> Row:
    hidden = entry.get("exclude_seen") or {}
    facts = {name: entry[name] for name in _FACTS if isinstance(entry.get(name), int | float)}
    deviation = {m: entry[f"{m}_sd"] for m in metrics if entry.get("seeds", 1) > 1 and f"{m}_sd" in entry}
    return Row(str(entry["model"]), {m: float(entry[m]) for m in metrics}, deviation,
               {m: float(hidden[m]) for m in metrics if m in hidden}, facts)
