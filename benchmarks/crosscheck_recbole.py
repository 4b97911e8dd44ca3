"""laserrec's FDSA beside RecBole 1.2.1's: same data folder, split, evaluator and tie rule.

    python -m venv recbole-venv
    recbole-venv/bin/pip install recbole==1.2.1 numpy==1.26.4 pandas==2.1.4 scipy==1.11.4 torch==2.14.1 \
        polars pydantic safetensors jaxtyping rich transformers
    PYTHONPATH=. recbole-venv/bin/python benchmarks/crosscheck_recbole.py DATA_FOLDER --ours RUN/table2.json

Ours are the rows of `laserrec reproduce table2`. RecBole's network, loss, batches and optimiser are its own, and each
prefix of a training sequence is one example. Its features are the item's brand and the words of its category, looked
up in tables, for which it was made; ours are the LLM's vectors of title, brand and category. It pads every history to
the window, so its window is 20, not 50 (98.9% of amazon-scientific's histories fit), which makes it affordable on a
CPU. Each setting of RecBole's is trained once, its epoch with the best NDCG@10 on validation is kept, and the best
setting is trained with further seeds. All items are ranked, nothing is filtered. What --work holds is not run again.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
import warnings
from pathlib import Path
from typing import Any

import torch
from crosscheck_rectools import TOLERANCE, _keep, keep_best

from laserrec.data.dataset import Dataset
from laserrec.data.histories import Histories
from laserrec.evaluation.evaluate import evaluate
from laserrec.util.io import write_json

OUT = Path(__file__).parent / "results" / "crosscheck_recbole.json"
WINDOW = 20
METRICS = ("recall@10", "ndcg@10", "mrr")
TRIALS: tuple[dict[str, Any], ...] = (
    {},  # RecBole's defaults: width 64, 256 inside, dropout .5, learning rate 1e-3, batches of 2,048
    {"hidden_size": 128, "inner_size": 128},
    {"hidden_size": 128, "inner_size": 128, "train_batch_size": 256},
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, help="data folder written by `laserrec prepare`")
    parser.add_argument("--ours", type=Path, required=True, help="table2.json with rows of FDSA on these data")
    parser.add_argument("--work", type=Path, default=Path("runs/crosscheck-recbole"))
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--trials", type=int, default=len(TRIALS))
    parser.add_argument("--max-seconds", type=float, default=1800, help="bound on one training")
    parser.add_argument("--threads", type=int, default=1)
    given = parser.parse_args()
    sys.argv = sys.argv[:1]  # RecBole reads it too
    torch.set_num_threads(given.threads)
    warnings.filterwarnings("ignore")
    dataset = Dataset.load(given.data)
    found = [_kept(dataset, settings, 0, given) for settings in TRIALS[:given.trials]]
    best = max(found, key=lambda one: one["training"]["validation_ndcg@10"])
    theirs = [best, *(_kept(dataset, best["settings"], seed, given) for seed in range(1, given.seeds))]
    ours = [row for row in json.loads(given.ours.read_text(encoding="utf-8"))["rows"]
            if (row["data"], row["model"]) == (given.data.resolve().name, "FDSA")]
    if not ours:
        raise SystemExit(f"{given.ours} has no row of FDSA on {given.data.resolve().name}")
    means = {"ours": {m: statistics.mean(row[m] for row in ours) for m in METRICS},
             "theirs": {m: statistics.mean(row["test"][m] for row in theirs) for m in METRICS}}
    ratio = means["ours"]["ndcg@10"] / means["theirs"]["ndcg@10"]
    machine = {"cpu_cores": os.cpu_count(), "architecture": platform.machine(), "threads": given.threads,
               "torch": torch.__version__, "recbole": "1.2.1"}
    result = {"data": {"name": given.data.resolve().name, "sha256": dataset.fingerprint}, "machine": machine,
              "rule": f"ours not below theirs by more than {TOLERANCE:.0%} in test NDCG@10; nothing filtered",
              "mean_over_seeds": means, "ndcg@10_ours_over_theirs": round(ratio, 4), "holds": ratio >= 1 - TOLERANCE,
              "ours": [{m: row[m] for m in ("seed", *METRICS)} for row in ours],
              "theirs": theirs, "trials": [{name: one[name] for name in ("settings", "training")} for one in found]}
    write_json(OUT, result)
    print(json.dumps({name: result[name] for name in ("mean_over_seeds", "ndcg@10_ours_over_theirs")}, indent=1))


def _kept(dataset: Dataset, settings: dict[str, Any], seed: int, given: argparse.Namespace) -> dict[str, Any]:
    told = "-".join(f"{name}-{value}" for name, value in settings.items()) or "defaults"
    file = given.work / f"{told}-{seed}.json"
    _keep(file, lambda: _train(dataset, settings, seed, given))
    return json.loads(file.read_text(encoding="utf-8"))


def _train(dataset: Dataset, settings: dict[str, Any], seed: int, given: argparse.Namespace) -> dict[str, Any]:
    from recbole.config import Config
    from recbole.data import create_dataset, data_preparation
    from recbole.model.sequential_recommender.fdsa import FDSA
    from recbole.trainer import Trainer
    from recbole.utils import init_seed

    _write_files(dataset, given.work / "files" / "laserrec")
    config = Config(model="FDSA", dataset="laserrec", config_dict={
        "data_path": str(given.work / "files"), "checkpoint_dir": str(given.work / "checkpoints"),
        "benchmark_filename": ["train", "valid", "test"], "alias_of_item_id": ["item_id_list"],
        "load_col": {"inter": ["user_id", "item_id_list", "item_id"], "item": ["item_id", "brand", "category"]},
        "selected_features": ["brand", "category"], "train_neg_sample_args": None, "loss_type": "CE",
        "MAX_ITEM_LIST_LENGTH": WINDOW, "seed": seed, "use_gpu": False, "show_progress": False, "state": "ERROR",
        **settings})
    init_seed(seed, reproducibility=True)
    files = create_dataset(config)
    batches = data_preparation(config, files)[0]
    model = FDSA(config, batches.dataset)
    trainer, score = Trainer(config, model), _Scorer(model, files, dataset.n_items)

    def step(epochs: int) -> None:
        for epoch in range(epochs):
            trainer._train_epoch(batches, epoch)

    facts, log = keep_best(f"RecBole FDSA {settings} seed {seed}", step, lambda: model, score,
                           dataset.cases("validation"), dataset.n_items, given.max_seconds)
    row = evaluate("RecBole FDSA", score, dataset, "test", batch_size=512).row()
    return {"settings": settings, "seed": seed, "training": facts, "test": {m: row[m] for m in METRICS}, "log": log}


def _write_files(dataset: Dataset, folder: Path) -> None:
    """RecBole's: every prefix of a training sequence with the item behind it, and the items' features. It asks for the
    other two splits, whose first two lines stand for them: they are ranked by our evaluator."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = [f"{user}\t{' '.join(map(str, row[max(0, cut - WINDOW):cut]))}\t{row[cut]}"
             for user, row in enumerate(dataset.train_sequences.lists()) for cut in range(1, len(row))]
    head = "user_id:token\titem_id_list:token_seq\titem_id:token"
    for name, part in (("train", lines), ("valid", lines[:2]), ("test", lines[:2])):
        (folder / f"laserrec.{name}.inter").write_text("\n".join([head, *part]) + "\n", encoding="utf-8")
    told = dataset.items.select("item", "brand", "category").rows()
    rows = [f"{item}\t{_token(brand)}\t{' '.join((category or 'none').split())}" for item, brand, category in told]
    head = "item_id:token\tbrand:token\tcategory:token_seq"
    (folder / "laserrec.item").write_text("\n".join([head, *rows]) + "\n", encoding="utf-8")


def _token(text: str | None) -> str:
    return "_".join((text or "none").split())


class _Scorer:
    """RecBole's scores of all items as the evaluator wants them."""

    def __init__(self, model: Any, files: Any, n_items: int):
        self.model, known = model, files.field2token_id["item_id"]
        self.column = torch.tensor([known[str(row)] for row in range(n_items)])

    @torch.no_grad()
    def score(self, histories: Histories) -> torch.Tensor:
        from recbole.data.interaction import Interaction

        self.model.eval()
        last = histories.to(torch.device("cpu")).last(WINDOW)
        items = Histories(self.column[last.items], last.ends).padded(0)
        asked = Interaction({"item_id_list": items, "item_length": last.lengths.clamp(min=1)})
        return self.model.full_sort_predict(asked)[:, self.column]


if __name__ == "__main__":
    main()
