"""The results table from what `laserrec evaluate --json`, `quickstart` or `reproduce quality` wrote."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from laserrec.util.errors import UserError
from laserrec.util.io import read_json


@dataclass(frozen=True)
class Results:
    """Rows as the file has them: model, the metrics, and where they are known METRIC_sd (standard deviation over
    seeds), exclude_seen (the metrics with the history's items not ranked), users, seeds, seconds."""

    file: str
    split: str
    metrics: tuple[str, ...]
    rows: tuple[dict[str, Any], ...]

    def columns(self, *names: str) -> list[str]:
        """Those of the names that all rows have."""
        return [name for name in names if all(row.get(name) is not None for row in self.rows)]

    @property
    def best(self) -> dict[str, float]:
        """Metric -> the highest value."""
        return {m: max(row[m] for row in self.rows) for m in self.metrics}


def read_results(file: Path) -> Results:
    """Raises UserError for a file of another kind."""
    content = read_json(file, "evaluate again")
    rows = content.get("summary") if isinstance(content, dict) else content
    advice = f"{file} is no table of results; laserrec evaluate --json makes one"
    if not isinstance(rows, list) or not rows or not all(isinstance(row, dict) and "model" in row for row in rows):
        raise UserError(advice)
    metrics = [k for k in rows[0] if k.startswith(("recall@", "ndcg@")) and k.partition("@")[2].isdigit()] + ["mrr"]
    tables = [*rows, *(row["exclude_seen"] for row in rows if row.get("exclude_seen"))]
    if len(metrics) < 3 or not all(isinstance(table.get(m), int | float) for table in tables for m in metrics):
        raise UserError(advice)
    return Results(file.name, str(rows[0].get("split", "test")), tuple(metrics), tuple(rows))
