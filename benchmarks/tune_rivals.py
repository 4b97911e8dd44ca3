"""Random search over the rivals' settings on validation, resumable: `python benchmarks/tune_rivals.py OUT --seconds N`.

Every trial trains `_SHORT` epochs; then the best `_LONG` of each rival are trained to convergence from the start. Test
is not touched. A line per trial is added to OUT/trials.jsonl; what stands there already is not run again.
"""

from __future__ import annotations

import argparse
import itertools
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from laserrec.config import Config, IdModelConfig, load_config
from laserrec.data.prepare import prepare_source
from laserrec.data.sequences import Dataset
from laserrec.presets import ID_MODELS
from laserrec.pretrain import pretrain_id_model
from laserrec.quality import RIVALS
from laserrec.text_vectors import text_vectors

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
_SHORT = {"sasrec": 16, "bert4rec": 40}
_LONG = 2


def settings_of(name: str, count: int) -> list[dict[str, Any]]:
    """The tuned settings of before, then `count - 1` random ones, the same for each call."""
    base = {**ID_MODELS[RIVALS[name][1]["kind"]], **RIVALS[name][1], "seed": 0}
    rng = np.random.default_rng(7)
    space = _SPACES[base["kind"]]
    drawn = [{k: v[int(rng.integers(len(v)))] for k, v in space.items()} for _ in range(count - 1)]
    return [base] + [{**base, **one} for one in drawn]


def _key(name: str, settings: dict[str, Any]) -> str:
    return name + json.dumps(settings, sort_keys=True)


def _train(name: str, settings: dict[str, Any], dataset: Dataset, text: torch.Tensor, out: Path) -> None:
    with tempfile.TemporaryDirectory() as folder:
        metrics = pretrain_id_model(dataset, IdModelConfig(**settings), Path(folder) / "model", False, lambda: text)
    line = {"rival": name, "settings": settings, "ndcg": metrics["validation_ndcg@10"], "recall":
            metrics["validation_recall@10"], "epoch": metrics["best_epoch"], "seconds": metrics["seconds"]}
    with (out / "trials.jsonl").open("a") as file:
        file.write(json.dumps(line) + "\n")
    print(name, f"N {line['ndcg']:.4f} epoch {line['epoch']} {line['seconds']:.0f} s", settings, flush=True)


def _done(out: Path) -> dict[str, dict]:
    file = out / "trials.jsonl"
    lines = [json.loads(x) for x in file.read_text().splitlines()] if file.is_file() else []
    return {_key(x["rival"], x["settings"]): x for x in lines}


def search(out: Path, config: Config, seconds: float, count: int, rivals: list[str]) -> None:
    out.mkdir(parents=True, exist_ok=True)
    prepare_source("amazon-scientific", out / "data", config.data)
    dataset = Dataset.load(out / "data")
    text = text_vectors(dataset, config)
    until = time.monotonic() + seconds
    short = {n: [{**s, "max_epochs": _SHORT[s["kind"]], "eval_every": _SHORT[s["kind"]] // 2}
                 for s in settings_of(n, count)] for n in rivals}
    for name, settings in itertools.chain(*(zip(short, row, strict=True) for row in zip(*short.values(), strict=True))):
        if time.monotonic() < until and _key(name, settings) not in _done(out):
            _train(name, settings, dataset, text, out)
    for name in rivals:
        done = _done(out)
        tried = sorted((done[_key(name, s)]["ndcg"], i) for i, s in enumerate(short[name]) if _key(name, s) in done)
        for _, index in tried[-_LONG:]:
            settings = settings_of(name, count)[index]
            if _key(name, settings) not in done:
                _train(name, settings, dataset, text, out)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--seconds", type=float, default=1800, help="for the short trials of all rivals together")
    parser.add_argument("--count", type=int, default=40, help="short trials a rival at most")
    parser.add_argument("--rivals", nargs="*", default=["SASRec", "text SASRec", "BERT4Rec"])
    options = parser.parse_args()
    torch.set_num_threads(1)
    search(options.out, load_config("small"), options.seconds, options.count, options.rivals)
