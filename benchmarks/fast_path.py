"""The fast path keeps results: the same fit on our engine, compiled, and on transformers' model, seed by seed.

Layout prefix_first, two layers, short texts, one random cut per user, one epoch: small enough for transformers' model
on two cores. The spread between seeds is the noise that a difference of engines must be seen against. Test is not
touched.

  python benchmarks/fast_path.py runs/data runs/id_model --out benchmarks/results/fast_path.json
"""

from __future__ import annotations

import argparse
import json
import tempfile
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

RUNS = (("native", 0), ("transformers", 0), ("native", 1), ("native", 2))


def one_fit(dataset: Dataset, id_model: torch.nn.Module, engine: str, seed: int, users: int) -> dict:
    config = load_config("small", None, {
        "backbone": {"layers": 2, "engine": engine, "compiled": engine == "native"},
        "prompt": {"layout": "prefix_first", "template": "no_instruction", "max_items": 3, "max_item_tokens": 16},
        "head": {"id_share": 0.0},
        "train": {"cuts": "random", "stage_one_epochs": 1, "stage_two_epochs": 0, "validation_users": users,
                  "seed": seed}})
    torch.manual_seed(seed)
    laser = Laser(config, load_backbone(config.backbone), id_model.d_id)
    encoder = Encoder(laser, id_model, Catalogue(laser, dataset.items, dataset.n_items))
    with tempfile.TemporaryDirectory() as folder:
        untrained, trained = Fit(encoder, dataset, config, Path(folder), "fast path").run()[:2]
    return {"engine": engine, "seed": seed, "loss": trained["loss"],
            "epoch_seconds": trained["seconds"] - untrained["seconds"],
            "untrained_ndcg@10": untrained["validation_ndcg@10"], "ndcg@10": trained["validation_ndcg@10"],
            "recall@10": trained["validation_recall@10"], "validation_users": users}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("id_model", type=Path)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/fast_path.json"))
    parser.add_argument("--users", type=int, default=1000)
    given = parser.parse_args()
    dataset = Dataset.load(given.data)
    id_model = load_id_model(given.id_model, dataset).model
    rows = json.loads(given.out.read_text())["rows"] if given.out.is_file() else []
    for engine, seed in RUNS:
        if (engine, seed) not in [(row["engine"], row["seed"]) for row in rows]:
            rows.append(one_fit(dataset, id_model, engine, seed, given.users))
            write_json(given.out, {"machine": describe(), "rows": rows})
            print(rows[-1], flush=True)


if __name__ == "__main__":
    main()
