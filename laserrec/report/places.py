"""Where the parts of a run lie: the model, its data, its ID model's training, a results file."""

from __future__ import annotations

import filecmp
from dataclasses import dataclass
from pathlib import Path

from laserrec.util.errors import UserError
from laserrec.util.io import read_json


@dataclass(frozen=True)
class Places:
    """Folders and files that are there."""

    model: Path
    data: Path
    id_model: Path | None
    """The folder with the log of the ID model's training; None for a model without one, or where it is not found."""
    results: Path | None


def find(run: Path, data: Path | None = None, results: Path | None = None) -> Places:
    """run: a model folder, or a folder with model/ in it (`laserrec quickstart`, `LaserRecommender.fit`).

    What is not given is looked for beside the model, as quickstart and `reproduce quality` lay it out; a data folder
    counts only if the model was trained on it. Raises UserError for a folder that is no run or is unfinished, and
    where no data folder is found or the one given is another's.
    """
    model = _model_folder(run)
    trained_on = read_json(model / "model.json", "fit again").get("data", {}).get("sha256")
    around = (run, model.parent, model.parent.parent)
    if data is None:
        data = next((f / "data" for f in around if _sha256(f / "data") == trained_on is not None), None)
    elif trained_on is not None and _sha256(data) != trained_on:
        raise UserError(f"{data} is not the data folder that {model} was trained on"
                        f" (sha256 {trained_on[:12]}); name that one: laserrec report RUN --data DATA")
    if data is None:
        raise UserError(f"the data that {model} was trained on do not lie beside it; name its data folder: "
                        "laserrec report RUN --data DATA")
    if results is None:
        results = next((f for f in (model.parent / "results.json", model.parent.parent / "quality.json")
                        if f.is_file()), None)
    elif not results.is_file():
        raise UserError(f"no such file: {results}; laserrec evaluate --json makes one")
    return Places(model, data, _id_model(model), results)


def _model_folder(run: Path) -> Path:
    for folder in (run, run / "model"):
        if (folder / "model.json").is_file():
            return folder
        if (folder / "checkpoint.safetensors").is_file():
            raise UserError(f"{folder} is an unfinished training; run the same command again to finish it. Until then: "
                            f"tensorboard --logdir {folder}")
    if not run.is_dir():
        raise UserError(f"no such folder: {run}")
    raise UserError(f"{run} is no run: there is neither model.json nor model/model.json in it; make one with laserrec "
                    "quickstart or laserrec fit")


def _sha256(data: Path) -> str | None:
    """A data folder's fingerprint; None if it is none."""
    if not (data / "meta.json").is_file():
        return None
    return read_json(data / "meta.json", "prepare again").get("sha256")


def _id_model(model: Path) -> Path | None:
    """The ID model within the model folder if its log is there, else the sibling with the same weights."""
    nested = model / "id_model"
    if (nested / "log.jsonl").is_file():
        return nested
    own = nested / "weights.safetensors"
    siblings = [folder for folder in sorted(model.parent.iterdir()) if (folder / "model.json").is_file()]
    return next((f for f in siblings if own.is_file() and (f / own.name).is_file()
                 and filecmp.cmp(f / own.name, own, shallow=False)), None)
