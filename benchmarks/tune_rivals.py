"""Random search around the rivals' settings on validation: `python benchmarks/tune_rivals.py OUT --seconds N`.

Every trial trains `_SHORT` epochs; then the best `_LONG` of each rival are trained to convergence from the start. Test
is not touched. A line per trial is added to OUT/trials.jsonl; what stands there already is not run again.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from laserrec.config import Config, IdModelConfig, load_config, merge
from laserrec.data.dataset import Dataset
from laserrec.data.prepare import prepare_source
from laserrec.experiments.quality import rows
from laserrec.llm.text_features import TextFeatures
from laserrec.recommender.fitting import fit
from laserrec.util.device import CPU

RIVALS = {row.name: row.settings["id_model"] for row in rows() if row.method in ("sasrec", "bert4rec")}
_SPACES: dict[str, dict[str, list[Any]]] = {
    "sasrec": {
        "d_id": [64, 128, 256], "blocks": [1, 2, 3], "heads": [1, 2, 4], "dropout": [0.3, 0.4, 0.5, 0.6, 0.7],
        "lr": [5e-4, 1e-3, 2e-3], "weight_decay": [0.3, 1.0, 2.0, 3.0], "shuffle": [0.0, 0.3, 0.5, 0.8, 1.0],
        "batch_size": [64, 128, 256],
    },
    "bert4rec": {
        "d_id": [64, 128, 256], "blocks": [1, 2, 3], "heads": [1, 2, 4], "dropout": [0.1, 0.2, 0.3, 0.5],
        "lr": [1e-3, 2e-3, 3e-3], "weight_decay": [0.03, 0.1, 0.3, 1.0], "shuffle": [0.0, 0.3, 0.5, 1.0],
        "mask_probability": [0.2, 0.4, 0.6], "batch_size": [64, 128],
    },
}
_REDRAWN = 1 / 3
"""Of the settings in a trial, in the mean: around what is best so far a search finds more than far from it, where
nearly all is worse (six trials each of settings drawn all anew were: dev/LOG.md)."""
_SHORT = {"sasrec": 8, "bert4rec": 16}
_LONG = 2


def settings_of(name: str, count: int) -> list[dict[str, Any]]:
    """The tuned settings of before, then some of them drawn anew: `count` different ones, the same in each call."""
    base = {**RIVALS[name], "seed": 0}
    rng = np.random.default_rng(8)
    found = {IdModelConfig(**base): base}
    while len(found) < count:
        drawn = {k: v[int(rng.integers(len(v)))] for k, v in _SPACES[base["kind"]].items() if rng.random() < _REDRAWN}
        settings = {**base, **drawn}
        found.setdefault(IdModelConfig(**settings), settings)
    return list(found.values())


def search(out: Path, config: Config, seconds: float, count: int, rivals: list[str]) -> None:
    prepare_source("amazon-scientific", out / "data", config.data)
    dataset, file = Dataset.load(out / "data"), out / "trials.jsonl"
    features = TextFeatures(config.backbone, config.prompt, CPU, out / "data" / "text_features")
    lines = [json.loads(x) for x in file.read_text().splitlines()] if file.is_file() else []
    done: dict[str, dict[str, Any]] = {line["key"]: line for line in lines}

    def train(name: str, settings: dict[str, Any]) -> float:
        """Validation NDCG@10, of this or an earlier call."""
        key = name + json.dumps(settings, sort_keys=True)
        if key not in done:
            own = Config.model_validate(merge(config.model_dump(), {"id_model": settings}))
            with tempfile.TemporaryDirectory() as folder:
                told = fit(settings["kind"], dataset, own, Path(folder) / "m", CPU, features=features, progress=False)
            training = told.facts["training"]
            done[key] = {"key": key, "rival": name, "settings": settings, "epoch": training["kept"]["epoch"],
                         "seconds": training["seconds"], "ndcg": training["kept"]["validation_ndcg@10"],
                         "recall": training["kept"]["validation_recall@10"]}
            with file.open("a") as lines:
                lines.write(json.dumps(done[key]) + "\n")
            print(name, {k: done[key][k] for k in ("epoch", "seconds", "ndcg", "recall")}, flush=True)
        return done[key]["ndcg"]

    until = time.monotonic() + seconds
    for name in rivals:
        tried, all_settings = [], settings_of(name, count)
        for settings in all_settings:
            if time.monotonic() > until:
                break
            short = _SHORT[settings["kind"]]
            tried.append((train(name, {**settings, "max_epochs": short, "eval_every": short // 2}), len(tried)))
        for _, index in sorted(tried)[-_LONG:]:
            train(name, all_settings[index])


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--seconds", type=float, default=1800, help="for the short trials of all rivals together")
    parser.add_argument("--count", type=int, default=40, help="short trials a rival at most")
    parser.add_argument("--rivals", nargs="*", default=list(RIVALS))
    options = parser.parse_args()
    torch.set_num_threads(1)
    search(options.out, load_config("small"), options.seconds, options.count, options.rivals)
