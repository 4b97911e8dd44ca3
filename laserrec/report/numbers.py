"""The report's numbers for other programs."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from laserrec.report.collect import Report


def as_numbers(report: Report) -> dict[str, Any]:
    """{name, training, data, kept, results, experts, map, examples}, fit for JSON; without the single steps."""
    return {
        "name": report.name, "training": report.model["training"], "backbone": report.model["backbone"],
        "data": report.data["table1"], "epochs": report.fit.epochs,
        "results": None if report.results is None else asdict(report.results),
        "experts": None if report.experts is None else asdict(report.experts),
        "map": {"method": report.items.method, "items": len(report.items.titles), "groups": report.items.counts()},
        "examples": [asdict(example) for example in report.examples],
    }
