"""How many layers of the frozen LLM: quality and speed for n = 6, 12, 18, 24, 30 on validation.

Each depth is one fit with the small preset, one random cut per user and one epoch, so that the whole takes a quarter of
an hour on two cores; a depth that is in the results file already is not run again. Test is not touched.

  python benchmarks/depth.py runs/data runs/id_model --out benchmarks/results/depth.json
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path

import torch

from laserrec.bench.machine import describe
from laserrec.config import load_config
from laserrec.data.dataset import Dataset
from laserrec.llm.backbone import load_backbone
from laserrec.methods.id_store import load_id_model
from laserrec.methods.laser.encoder import Catalogue, Encoder
from laserrec.methods.laser.model import Laser
from laserrec.training.train import Fit
from laserrec.util.io import write_json

DEPTHS = (6, 12, 18, 24, 30)


def one_depth(dataset: Dataset, id_model: torch.nn.Module, layers: int, users: int) -> dict:
    config = load_config("small", None, {
        "backbone": {"layers": layers},
        "train": {"cuts": "random", "stage_one_epochs": 1, "stage_two_epochs": 0, "validation_users": users}})
    torch.manual_seed(config.train.seed)
    laser = Laser(config, load_backbone(config.backbone), id_model.d_id)
    start = time.monotonic()
    encoder = Encoder(laser, id_model, Catalogue(laser, dataset.items, dataset.n_items, progress=True))
    reading = time.monotonic() - start
    with tempfile.TemporaryDirectory() as folder:
        untrained, trained = Fit(encoder, dataset, config, Path(folder), "depth").run()[:2]
    entries = {"untrained": untrained, "trained": trained}
    return {"layers": layers, "reading_seconds": reading, "epoch_seconds": trained["seconds"] - untrained["seconds"],
            **{f"{name}_{metric}": entry[f"validation_{metric}"] for name, entry in entries.items()
               for metric in ("recall@10", "ndcg@10")}, "validation_users": users}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("id_model", type=Path)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/depth.json"))
    parser.add_argument("--users", type=int, default=2000)
    given = parser.parse_args()
    dataset = Dataset.load(given.data)
    id_model = load_id_model(given.id_model, dataset).model
    rows = json.loads(given.out.read_text())["rows"] if given.out.is_file() else []
    for layers in DEPTHS:
        if layers not in [row["layers"] for row in rows]:
            rows.append(one_depth(dataset, id_model, layers, given.users))
            write_json(given.out, {"machine": describe(), "rows": rows})
            print(rows[-1], flush=True)


if __name__ == "__main__":
    main()
