"""What each choice of Laser's recipe is worth, one at a time: `python benchmarks/choices.py OUT`.

Every variant is the preset `bi-tuning` with one thing changed, trained for one epoch of random cuts, one seed, and
scored by the text part's cosines alone on validation. All is kept in OUT, and what is there is not run again.
Differences below .001 in NDCG@10 are within the noise of a seed. The test split is not touched.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch

from laserrec.config import load_config, merge
from laserrec.data.dataset import Dataset
from laserrec.data.prepare import prepare_source
from laserrec.evaluation.evaluate import Scorer
from laserrec.experiments.table import Measured, Row, Table
from laserrec.util.device import choose
from laserrec.util.io import write_json

_BASE: dict[str, Any] = {"neighbours": {"count": 0}, "head": {"id_share": 0.0},
                         "train": {"cuts": "random", "stage_one_epochs": 1, "stage_two_epochs": 0}}
_VARIANTS: dict[str, dict[str, Any]] = {
    "bi-tuning": {},
    "no prefix": {"mformer": {"prefix": "none"}},
    "learned prefix": {"mformer": {"prefix": "learned"}},
    "one expert": {"mformer": {"prefix": "one_expert"}},
    "prefix from random vectors": {"mformer": {"zero_init": False}},
    "suffix from a random vector": {"head": {"suffix_from_eos": False}},
    "hard routing": {"mformer": {"routing": "hard"}},
    "16 queries, 4 blocks": {"mformer": {"queries": 16, "blocks": 4}},
    "no warm-up": {"train": {"warmup_fraction": 0.0}},
    "lr 3e-3": {"train": {"lr": 3e-3}},
    "lr 3e-4": {"train": {"lr": 3e-4}},
    "temperature .05": {"train": {"temperature": 0.05}},
    "temperature .1": {"train": {"temperature": 0.1}},
    "learnt temperature": {"train": {"learn_temperature": True}},
    "12 tokens an item": {"prompt": {"max_item_tokens": 12}},
    "48 tokens an item": {"prompt": {"max_item_tokens": 48}},
    "items fixed per epoch": {"train": {"item_gradient": False}},
    "12 layers": {"backbone": {"layers": 12}},
}


def _logged(table: Table, name: str, scorer: Scorer, file: Path) -> Measured:
    """What the training's own validations said, before the first epoch and behind the last."""
    log = (table.folder(name) / "log.jsonl").read_text(encoding="utf-8").splitlines()
    lines = [line for line in map(json.loads, log) if "validation_ndcg@10" in line]
    ends = ("untrained", lines[0]), ("trained", lines[-1])
    return {"model": name, **{f"{end}_{metric}": line[f"validation_{metric}"] for end, line in ends
                              for metric in ("recall@10", "ndcg@10")}}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--variants", nargs="*", default=list(_VARIANTS), choices=list(_VARIANTS))
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--device", default="auto")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    config = load_config("bi-tuning")
    prepare_source("amazon-scientific", given.out / "data", config.data)
    rows = [Row("ID model", "id", "sasrec"),
            *(Row(name, "laser", "laser", merge(_BASE, _VARIANTS[name])) for name in given.variants)]
    table = Table(rows, Dataset.load(given.out / "data"), config, given.out, choose(given.device), measure=_logged,
                  measured_by="validation while training")
    found = []
    for name in given.variants:
        found.append(table.result(name))
        print({key: value for key, value in found[-1].items() if key != "fingerprint"}, flush=True)
        write_json(given.out / "choices.json", found)


if __name__ == "__main__":
    main()
