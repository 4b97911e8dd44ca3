"""What was measured of a model, kept in its model.json and shown in its card."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from laserrec.data.dataset import Dataset
from laserrec.evaluation.evaluate import Result
from laserrec.recommender.folder import read_note, update_note


def with_result(results: list[dict[str, Any]], result: Result, dataset: Dataset) -> list[dict[str, Any]]:
    """`results` with this one, in place of an earlier one of the same split, data and cut-off."""
    row = {k: v for k, v in result.row().items() if k not in ("model", "seconds")}
    row |= {"data_sha256": dataset.fingerprint, "n_items": dataset.n_items}
    kept = [old for old in results if (old["split"], old["data_sha256"], old.keys()) !=
            (row["split"], row["data_sha256"], row.keys())]
    return [*kept, row]


def record_result(folder: Path, result: Result, dataset: Dataset) -> None:
    """Add it to a model folder and its card. Raises UserError for a folder that is none."""
    update_note(folder, results=with_result(read_note(folder).get("results", []), result, dataset))
