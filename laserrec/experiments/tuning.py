"""Tune a rival on a data set's validation split: coordinate ascent with a stated number of trials."""

from __future__ import annotations

import json
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from laserrec.config import Config, merge
from laserrec.data.dataset import Dataset
from laserrec.llm.text_features import TextFeatures
from laserrec.methods.all import METHODS
from laserrec.recommender.fitting import fit, fit_fingerprint

Choices = dict[str, list[Any]]
"""Setting ("neighbours.l2") -> values, in the order in which they are tried."""


@dataclass(frozen=True)
class Tuned:
    """What a search found."""

    settings: dict[str, Any]
    """To be laid over the config."""
    ndcg: float
    """On validation."""
    trials: int
    seconds: float
    """Of all trials."""


def tune(method: str, base: dict[str, Any], choices: Choices, trials: int, dataset: Dataset, config: Config,
         features: TextFeatures, device: torch.device, file: Path) -> Tuned:
    """The best of at most `trials` settings: from `base`, one setting after another takes the value with the highest
    validation NDCG, round after round until nothing changes. The test split is not touched.

    file: JSON lines, one per trial; a trial of the same data, method and settings that stands there is not run again.
    """
    log = _Log(file)
    best, found = base, log.measured(method, base, dataset, config, features, device)
    improved = True
    while improved and log.trials < trials:
        improved = False
        for name, values in choices.items():
            for value in values:
                other = merge(best, _nested(name, value))
                if other == best or log.trials >= trials:
                    continue
                ndcg = log.measured(method, other, dataset, config, features, device)
                if ndcg > found:
                    best, found, improved = other, ndcg, True
    return Tuned(best, found, log.trials, log.seconds)


def _nested(name: str, value: Any) -> dict[str, Any]:
    section, _, setting = name.partition(".")
    return {section: {setting: value}}


class _Log:
    """Trials on disk. `trials` and `seconds` count those that this search asked for, run now or before."""

    def __init__(self, file: Path):
        self.file, self.trials, self.seconds = file, 0, 0.0
        lines = file.read_text(encoding="utf-8").splitlines() if file.is_file() else []
        self.done: dict[str, dict[str, Any]] = {line["key"]: line for line in map(_whole, lines) if line}
        self.asked: set[str] = set()

    def measured(self, method: str, settings: dict[str, Any], dataset: Dataset, config: Config, features: TextFeatures,
                 device: torch.device) -> float:
        """Validation NDCG of a fit with these settings."""
        own = Config.model_validate(merge(config.model_dump(), settings))
        key = fit_fingerprint(method, METHODS[method], own, dataset, features, None)
        if key not in self.done:
            with tempfile.TemporaryDirectory() as folder:
                facts = fit(method, dataset, own, Path(folder) / "m", device, features=features,
                            progress=False).facts["training"]
            line = {"key": key, "method": method, "settings": settings, "seconds": facts["seconds"],
                    "ndcg": facts["kept"][f"validation_ndcg@{config.eval.k}"]}
            self.file.parent.mkdir(parents=True, exist_ok=True)
            with self.file.open("a", encoding="utf-8") as lines:
                lines.write(json.dumps(line) + "\n")
            self.done[key] = line
        if key not in self.asked:
            self.asked.add(key)
            self.trials, self.seconds = self.trials + 1, self.seconds + self.done[key]["seconds"]
        return self.done[key]["ndcg"]


def _whole(line: str) -> dict[str, Any] | None:
    """None for a line that a killed run left unfinished."""
    try:
        return json.loads(line)
    except json.JSONDecodeError:
        return None
