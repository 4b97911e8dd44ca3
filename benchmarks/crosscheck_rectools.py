"""laserrec's SASRec and BERT4Rec beside those of RecTools 0.19: same data folder, split, evaluator and tie rule.

    python -m venv rectools-venv
    rectools-venv/bin/pip install 'rectools[torch]==0.19.0' torch==2.13.0 polars pydantic safetensors jaxtyping rich
    PYTHONPATH=. rectools-venv/bin/python benchmarks/crosscheck_rectools.py DATA_FOLDER --work runs/crosscheck

Each model is trained once per seed and kept under --work, so that a second call only adds what is missing. Both sides
learn from the training split, keep the epoch with the best validation NDCG@10 and rank all items with nothing filtered.
RecTools runs through its public calls (fit_partial, recommend, lightning_module_type), with its own defaults where not
set here. Two things make it affordable on a CPU: it pads every session to the window, so its window is 20, not 50
(98.9% of the histories fit); and logits are computed at the asked positions only, which is the same loss (checked
against RecTools' own on the first batch). Its validation looks at the ten best items, which is all NDCG@10 needs.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import platform
import statistics
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from laserrec.config import load_config
from laserrec.data.dataset import Cases, Dataset
from laserrec.data.histories import Histories
from laserrec.evaluation.evaluate import Scorer, evaluate, rank_cases
from laserrec.evaluation.metrics import Metrics
from laserrec.recommender.fitting import fit
from laserrec.util.device import CPU
from laserrec.util.io import write_json

OUT = Path(__file__).parent / "results" / "crosscheck_rectools.json"
KINDS = ("sasrec", "bert4rec")
TOLERANCE = 0.03
THEIRS = {
    "sasrec": {"n_factors": 128, "n_blocks": 2, "n_heads": 2, "dropout_rate": 0.5, "session_max_len": 20,
               "loss": "softmax", "lr": 1e-3, "batch_size": 128},
    "bert4rec": {"n_factors": 128, "n_blocks": 2, "n_heads": 2, "dropout_rate": 0.2, "session_max_len": 20,
                 "loss": "softmax", "lr": 1e-3, "batch_size": 128, "mask_prob": 0.4},
}
STOPPING = {"max_epochs": 300, "eval_every": 2, "patience": 8}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, help="data folder written by `laserrec prepare`")
    parser.add_argument("--work", type=Path, default=Path("runs/crosscheck"))
    parser.add_argument("--kinds", nargs="+", default=KINDS, choices=KINDS)
    parser.add_argument("--sides", nargs="+", default=("ours", "theirs"), choices=("ours", "theirs"))
    parser.add_argument("--seeds", nargs="+", type=int, default=(0,))
    parser.add_argument("--ours", type=json.loads, default={}, help='settings by kind, {"sasrec": {"lr": 1e-3}}')
    parser.add_argument("--max-seconds", type=float, default=3600, help="bound on one RecTools training")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    warnings.filterwarnings("ignore")
    dataset = Dataset.load(args.data)
    for seed in args.seeds:
        for kind in args.kinds:
            if "ours" in args.sides:
                _keep(args.work / f"ours-{kind}-{seed}.json", lambda s=seed, k=kind: _ours(dataset, k, s, args))
            if "theirs" in args.sides:
                _keep(args.work / f"theirs-{kind}-{seed}.json", lambda s=seed, k=kind: _theirs(dataset, k, s, args))
    _write(args.work, dataset)


def _keep(file: Path, make: Any) -> None:
    if not file.exists():
        write_json(file, make())


def _ours(dataset: Dataset, kind: str, seed: int, args: argparse.Namespace) -> dict[str, Any]:
    config = load_config("small", None, {"id_model": {"kind": kind, "items": "ids", "seed": seed, "softmax": "full",
                                                      **args.ours.get(kind, {})}})
    fitted = fit(kind, dataset, config, args.work / f"ours-{kind}-{seed}", CPU)
    return {"test": evaluate(f"laserrec {kind}", fitted.model, dataset, "test").row(),
            "training": fitted.facts["training"], "settings": config.id_model.model_dump(mode="json"), "seed": seed,
            "threads": args.threads}


def _theirs(dataset: Dataset, kind: str, seed: int, args: argparse.Namespace) -> dict[str, Any]:
    from pytorch_lightning import seed_everything
    from rectools.models import BERT4RecModel, SASRecModel

    seed_everything(seed)
    model = {"sasrec": SASRecModel, "bert4rec": BERT4RecModel}[kind](
        **THEIRS[kind], deterministic=True, lightning_module_type=_lean_module())
    train = _interactions(dataset.train_sequences)
    score = _Scorer(model, dataset.n_items)
    facts, log = keep_best(f"RecTools {kind} seed {seed}",
                           lambda epochs: model.fit_partial(train, min_epochs=epochs, max_epochs=epochs),
                           lambda: model.torch_model, score, dataset.cases("validation"), dataset.n_items,
                           args.max_seconds)
    score.k = dataset.n_items
    row = evaluate(f"RecTools {kind}", score, dataset, "test", batch_size=512).row()
    return {"test": row, "training": facts, "settings": {**THEIRS[kind], **STOPPING}, "seed": seed,
            "threads": args.threads, "log": log}


def keep_best(name: str, step: Callable[[int], object], module: Callable[[], torch.nn.Module], score: Scorer,
              cases: Cases, n_items: int, max_seconds: float) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Train with step(epochs) and rank the cases, in turn, until STOPPING or the time is over; the module then has the
    weights of the best NDCG@10. Facts about it, and what was seen at each evaluation."""
    start, epoch, worse, best, log = time.monotonic(), 0, 0, -1.0, []
    best_epoch, weights = 0, {}
    while epoch < STOPPING["max_epochs"] and worse < STOPPING["patience"]:
        step(STOPPING["eval_every"])
        epoch += STOPPING["eval_every"]
        seen = Metrics.from_ranks(rank_cases(score, cases, 512, n_items).plain).ndcg
        log.append({"epoch": epoch, "ndcg@10": seen, "seconds": round(time.monotonic() - start, 1)})
        print(f"{name}: {log[-1]}", flush=True)
        worse += 1
        if seen > best:
            best, best_epoch, worse = seen, epoch, 0
            weights = copy.deepcopy(module().state_dict())
        if time.monotonic() - start > max_seconds:
            break
    module().load_state_dict(weights)
    stopped = "patience" if worse >= STOPPING["patience"] else "bound on time or epochs"
    return {"validation_ndcg@10": best, "best_epoch": best_epoch, "epochs": epoch,
            "seconds": round(time.monotonic() - start, 1), "stopped_by": stopped}, log


def _lean_module() -> type:
    """RecTools' softmax training without the logits of positions that have no target."""
    from rectools.models.nn.transformers.lightning import TransformerLightningModule

    class Lean(TransformerLightningModule):
        checked = False

        def training_step(self, batch: dict[str, torch.Tensor], batch_idx: int) -> torch.Tensor:
            if not self.checked:
                self.eval()
                with torch.no_grad():
                    torch.testing.assert_close(self._lean_loss(batch), super().training_step(batch, batch_idx))
                self.train()
                self.checked = True
            return self._lean_loss(batch)

        def _lean_loss(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
            net, real = self.torch_model, batch["y"] > 0
            items = net.item_model.get_all_embeddings()
            sessions = net.encode_sessions(batch, items)[real]
            logits = net.similarity_module(sessions[:, None], items)[:, 0]
            return torch.nn.functional.cross_entropy(logits, batch["y"][real])

    return Lean


def _interactions(histories: Histories) -> Any:
    """A RecTools dataset: user = row of the history, item = item row, time = position in days."""
    import pandas as pd
    from rectools.dataset import Dataset as RecToolsDataset

    days = (histories.lengths[histories.users] - 1 - histories.ages).numpy()
    return RecToolsDataset.construct(pd.DataFrame({
        "user_id": histories.users.numpy(), "item_id": histories.items.numpy(), "weight": 1.0,
        "datetime": pd.Timestamp("2020-01-01") + pd.to_timedelta(days, unit="D")}))


class _Scorer:
    """RecTools' scores of all items as the evaluator wants them. Items without a training interaction, which RecTools
    doesn't know, are ranked last."""

    def __init__(self, model: Any, n_items: int):
        self.model, self.n_items = model, n_items
        self.k = 10
        """Only so many best items get their score, the rest is ranked last."""

    def score(self, histories: Histories) -> torch.Tensor:
        frame = self.model.recommend(users=np.arange(len(histories)), dataset=_interactions(histories),
                                     k=self.k, filter_viewed=False, on_unsupported_targets="ignore")
        scores = torch.full((len(histories), self.n_items), -torch.inf)
        rows, items = (torch.as_tensor(frame[c].to_numpy(dtype=np.int64)) for c in ("user_id", "item_id"))
        scores[rows, items] = torch.as_tensor(frame["score"].to_numpy(dtype=np.float32))
        return scores


def _write(work: Path, dataset: Dataset) -> None:
    rows = {p.stem: json.loads(p.read_text(encoding="utf-8")) for p in sorted(work.glob("*.json"))}
    kinds = {}
    for kind in KINDS:
        sides = {s: [r for n, r in rows.items() if n.startswith(f"{s}-{kind}-")] for s in ("ours", "theirs")}
        if all(sides.values()):
            means = {s: {m: statistics.mean(r["test"][m] for r in found) for m in ("recall@10", "ndcg@10", "mrr")}
                     for s, found in sides.items()}
            ratio = means["ours"]["ndcg@10"] / means["theirs"]["ndcg@10"]
            kinds[kind] = {"mean_over_seeds": means, "ndcg@10_ours_over_theirs": round(ratio, 4),
                           "holds": ratio >= 1 - TOLERANCE, **sides}
    machine = {"cpu_cores": os.cpu_count(), "architecture": platform.machine(), "python": platform.python_version(),
               "torch": torch.__version__, "rectools": "0.19.0"}
    write_json(OUT, {"data": {"sha256": dataset.fingerprint, **dataset.meta.get("table1", {})}, "machine": machine,
                     "rule": f"ours not below theirs by more than {TOLERANCE:.0%} in test NDCG@10; nothing filtered",
                     "kinds": kinds})
    for kind, found in kinds.items():
        print(kind, json.dumps(found["mean_over_seeds"], indent=1), "ours/theirs", found["ndcg@10_ours_over_theirs"])


if __name__ == "__main__":
    main()
