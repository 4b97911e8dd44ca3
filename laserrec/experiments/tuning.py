"""Tune a rival on a data set's validation split: coordinate ascent with a stated number of trials."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from laserrec.config import Config, merge
from laserrec.data.dataset import Dataset
from laserrec.llm.text_features import TextFeatures
from laserrec.methods.all import METHODS
from laserrec.recommender.fitting import fit, fit_fingerprint

Choices = Mapping[str | tuple[str, ...], Sequence[Any]]
"""Setting ("neighbours.l2"), or several that change together -> values, or tuples of them, in the order in which they
are tried."""


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
    key: str = ""
    """The fingerprint of the best trial's fit."""
    folder: Path | None = None
    """Its model, where it is kept."""


def tune(method: str, base: dict[str, Any], choices: Choices, trials: int, dataset: Dataset, config: Config,
         features: TextFeatures, device: torch.device, file: Path, progress: bool = False) -> Tuned:
    """The best of at most `trials` settings: from `base`, one setting after another takes the value with the highest
    validation NDCG, round after round until nothing changes. The test split is not touched.

    file: JSON lines, one per trial; a trial of the same data, method and settings that stands there is not run again.
    Beside it, in trials/, is the model of the trial that runs, to be resumed, and of the best one.
    """
    log = _Log(file, method, dataset, config, features, device, progress)
    best, improved = log.run(base, f"{method}, trial 1 of at most {trials}"), True
    while improved and log.trials < trials:
        improved = False
        for name, values in choices.items():
            for value in values:
                changed = _changed(best.settings, name, value)
                if changed == best.settings or log.trials >= trials:
                    continue
                what = ", ".join(name) if isinstance(name, tuple) else name
                other = log.run(changed, f"{method}, trial {log.trials + 1} of at most {trials}: {what} {value}")
                best, worse, improved = (other, best, True) if other.ndcg > best.ndcg else (best, other, improved)
                if worse.key != best.key:  # a value that is the config's own makes the same model
                    shutil.rmtree(worse.folder, ignore_errors=True)
    return Tuned(best.settings, best.ndcg, log.trials, log.seconds, best.key,
                 best.folder if best.folder.is_dir() else None)


def _changed(settings: dict[str, Any], name: str | tuple[str, ...], value: Any) -> dict[str, Any]:
    for one, own in zip(name, value, strict=True) if isinstance(name, tuple) else [(name, value)]:
        section, _, setting = one.partition(".")
        settings = merge(settings, {section: {setting: own}})
    return settings


@dataclass(frozen=True)
class _Trial:
    settings: dict[str, Any]
    ndcg: float
    """On validation."""
    key: str
    """The fingerprint of its fit."""
    folder: Path
    """Of its model, if that is still there."""


class _Log:
    """Trials on disk. `trials` and `seconds` count those that this search asked for, run now or before."""

    def __init__(self, file: Path, method: str, dataset: Dataset, config: Config, features: TextFeatures,
                 device: torch.device, progress: bool):
        self.file, self.method, self.dataset, self.config = file, method, dataset, config
        self.features, self.device, self.progress = features, device, progress
        self.trials, self.seconds = 0, 0.0
        lines = file.read_text(encoding="utf-8").splitlines() if file.is_file() else []
        self.done: dict[str, dict[str, Any]] = {line["key"]: line for line in map(_whole, lines) if line}
        self.asked: set[str] = set()

    def run(self, settings: dict[str, Any], told: str) -> _Trial:
        """A fit with these settings, now or before. told: what is said of it where progress is shown."""
        own = Config.model_validate(merge(self.config.model_dump(), settings))
        key = fit_fingerprint(self.method, METHODS[self.method], own, self.dataset, self.features, None)
        folder = self.file.parent / "trials" / key[:16]
        if key not in self.done:
            if self.progress:
                print(told, file=sys.stderr, flush=True)
            facts = fit(self.method, self.dataset, own, folder, self.device, features=self.features,
                        progress=self.progress).facts["training"]
            line = {"key": key, "method": self.method, "settings": settings, "seconds": facts["seconds"],
                    "ndcg": facts["kept"][f"validation_ndcg@{self.config.eval.k}"]}
            with self.file.open("a", encoding="utf-8") as lines:
                lines.write(json.dumps(line) + "\n")
            self.done[key] = line
        if key not in self.asked:
            self.asked.add(key)
            self.trials, self.seconds = self.trials + 1, self.seconds + self.done[key]["seconds"]
        return _Trial(settings, self.done[key]["ndcg"], key, folder)


def _whole(line: str) -> dict[str, Any] | None:
    """None for a line that a killed run left unfinished."""
    try:
        return json.loads(line)
    except json.JSONDecodeError:
        return None
