"""RecTools 0.19's SASRec and UniSRec on prepared data folders, under laserrec's evaluator: rows of datasets.json.

    python -m venv rectools-venv
    rectools-venv/bin/pip install 'rectools[torch]==0.19.0' torch==2.13.0 polars pydantic safetensors jaxtyping rich
    PYTHONPATH=. rectools-venv/bin/python benchmarks/rectools_rivals.py steam=runs/datasets/steam/data --out rows.json

UniSRec reads the vectors that laserrec's own text rivals read: the frozen LLM's means, whitened. They are kept in the
data folder by `laserrec fit DATA OUT --method ease-text`; without them the script stops and says so. Both models train
on the training split, are validated every few epochs on the validation split, keep the best epoch, and rank all items
of the test split with nothing filtered. The budget is the settings below, tried in turn, and --max-seconds for each.
"""

from __future__ import annotations

import argparse
import json
import warnings
from pathlib import Path
from typing import Any

import torch
from crosscheck_rectools import THEIRS, _interactions, _lean_module, keep_best

from laserrec.config import load_config
from laserrec.data.dataset import Dataset
from laserrec.data.histories import Histories
from laserrec.evaluation.evaluate import evaluate
from laserrec.llm.text_features import TextFeatures, whitened
from laserrec.util.device import choose
from laserrec.util.io import write_json

TRIALS: dict[str, list[dict[str, Any]]] = {
    "SASRec": [{"dropout_rate": 0.5}, {"dropout_rate": 0.3}, {"n_factors": 64, "dropout_rate": 0.5}],
    "UniSRec": [{"lr": 3e-4, "dropout": 0.3}, {"lr": 1e-3, "dropout": 0.3}, {"lr": 3e-4, "dropout": 0.5}],
}
WINDOW = 50


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", nargs="+", help="NAME=FOLDER, folders written by `laserrec prepare`")
    parser.add_argument("--out", type=Path, required=True, help="JSON list of rows; what stands there is not run again")
    parser.add_argument("--models", nargs="+", default=list(TRIALS), choices=list(TRIALS))
    parser.add_argument("--trials", type=int, default=3)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--max-seconds", type=float, default=1200, help="bound on one training")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--threads", type=int, default=1)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    warnings.filterwarnings("ignore")
    rows = json.loads(given.out.read_text(encoding="utf-8")) if given.out.is_file() else []
    for name, _, folder in (each.partition("=") for each in given.data):
        dataset = Dataset.load(folder)
        for model in given.models:
            best: dict[str, Any] = {}
            for seed in range(given.seeds):
                if any((r["data"], r["model"], r["seed"]) == (name, f"RecTools {model}", seed) for r in rows):
                    continue
                tries = TRIALS[model][: given.trials] if not best else [best["settings"]]
                found = [_train(model, dataset, settings, seed, given) for settings in tries]
                best = max(found, key=lambda one: one["validation_ndcg@10"])
                kind = "id" if model == "SASRec" else "text"
                rows.append({"data": name, "model": f"RecTools {model}", "kind": kind, "seed": seed,
                             **best["test"], "train_seconds": best["seconds"], "trials": len(tries),
                             "tuning_seconds": round(sum(one["seconds"] for one in found), 1),
                             "settings": best["settings"], "epoch": best["best_epoch"]})
                write_json(given.out, rows)
                print(json.dumps(rows[-1]), flush=True)


def _train(model: str, dataset: Dataset, settings: dict[str, Any], seed: int, given: argparse.Namespace
           ) -> dict[str, Any]:
    from pytorch_lightning import seed_everything

    seed_everything(seed)
    run = _sasrec if model == "SASRec" else _unisrec
    step, score, weights = run(dataset, settings, choose(given.device))
    facts, _ = keep_best(f"RecTools {model} {settings}", step, weights, score, dataset.cases("validation").sample(4000),
                         dataset.n_items, given.max_seconds)
    row = evaluate(f"RecTools {model}", score, dataset, "test", batch_size=256).row()
    test = {m: row[m] for m in ("recall@10", "ndcg@10", "mrr")}
    test["exclude_seen"] = {m: row["exclude_seen"][m] for m in ("recall@10", "ndcg@10")}
    return {**facts, "test": test, "settings": settings}


def _sasrec(dataset: Dataset, settings: dict[str, Any], device: torch.device) -> tuple[Any, Any, Any]:
    from rectools.models import SASRecModel

    model = SASRecModel(**{**THEIRS["sasrec"], "session_max_len": WINDOW, **settings}, deterministic=True,
                        lightning_module_type=_lean_module())
    train = _interactions(dataset.train_sequences)
    return (lambda n: model.fit_partial(train, min_epochs=n, max_epochs=n),
            _ModelScorer(model, dataset.n_items, device), lambda: model.torch_model)


class _ModelScorer:
    """Their net's scores of all items, as `recommend` ranks them, without a table of users x items in pandas. Items
    without a training interaction, which RecTools doesn't know, are ranked last."""

    def __init__(self, model: Any, n_items: int, device: torch.device):
        self.model, self.n_items, self.device = model, n_items, device

    @torch.no_grad()
    def score(self, histories: Histories) -> torch.Tensor:
        net, known = self.model.torch_model.to(self.device).eval(), self.model.data_preparator.get_known_item_ids()
        rows = torch.as_tensor(known.astype("int64"))
        inner = torch.full((self.n_items,), -1)
        inner[rows] = torch.arange(1, len(rows) + 1)
        numbered = Histories(inner[histories.items.cpu()], histories.ends.cpu())
        sessions = _newest_last(numbered.where(numbered.items > 0), WINDOW)
        table = net.item_model.get_all_embeddings()
        last = net.encode_sessions({"x": sessions.to(self.device)}, table)[:, -1]
        scores = torch.full((len(histories), self.n_items), -torch.inf)
        scores[:, rows] = net.similarity_module(last[:, None], table)[:, 0, 1:].cpu()
        return scores


def _unisrec(dataset: Dataset, settings: dict[str, Any], device: torch.device) -> tuple[Any, Any, Any]:
    """Their net, loss and parameter groups in a loop of our own: their fit has no validation on held-out items."""
    from rectools.fast_transformers.unisrec import UniSRecModel

    text = _text(dataset, device)
    table = torch.cat([torch.zeros(1, text.shape[1]), text.cpu()])  # index 0 is padding
    model = UniSRecModel(table, session_max_len=WINDOW, batch_size=128, device=str(device), **settings)
    net = _net(model, dataset, table).to(device)
    optimizer = torch.optim.AdamW(model._param_groups(net))
    train = dataset.train_sequences
    padded = _newest_last(_from_one(train.take((train.lengths > 1).nonzero()[:, 0])), WINDOW + 1)

    def step(epochs: int) -> None:
        net.train()
        for _ in range(epochs):
            for rows in torch.randperm(len(padded)).split(128):
                batch = padded[rows].to(device)
                hidden, targets = net(batch[:, :-1]), batch[:, 1:]
                real = (targets > 0) & (batch[:, :-1] > 0)
                logits = hidden[real] @ net.project_all().T
                logits[:, 0] = -torch.inf
                loss = torch.nn.functional.cross_entropy(logits, targets[real])
                optimizer.zero_grad()
                loss.backward()
                torch.nn.utils.clip_grad_norm_(net.parameters(), model.grad_clip)
                optimizer.step()

    return step, _NetScorer(net, device), lambda: net


def _net(model: Any, dataset: Dataset, table: torch.Tensor) -> Any:
    """As UniSRecModel.fit makes it, over all items."""
    from rectools.fast_transformers.unisrec import UniSRecNet

    names = ("n_factors", "projection_hidden", "n_blocks", "n_heads", "session_max_len", "dropout", "adaptor_dropout",
             "adaptor_type", "use_adaptor_ffn", "ffn_type", "ffn_expansion")
    return UniSRecNet(n_items=dataset.n_items, pretrained_embeddings=table,
                      **{name: getattr(model, name) for name in names})


def _from_one(histories: Histories) -> Histories:
    """Items numbered from 1."""
    return Histories(histories.items.cpu() + 1, histories.ends.cpu())


def _newest_last(histories: Histories, length: int) -> torch.Tensor:
    """Rows of the newest `length` items, zeros in front of shorter ones, as RecTools pads."""
    last = histories.last(length)
    out = torch.zeros(len(last), length, dtype=torch.long)
    out[last.users, length - 1 - last.ages] = last.items
    return out


class _NetScorer:
    """Scores of UniSRec's net as the evaluator wants them."""

    def __init__(self, net: Any, device: torch.device):
        self.net, self.device = net, device

    @torch.no_grad()
    def score(self, histories: Histories) -> torch.Tensor:
        self.net.eval()
        rows = _newest_last(_from_one(histories), WINDOW)
        hidden = self.net(rows.to(self.device))[:, -1]
        return (hidden @ self.net.project_all().T)[:, 1:].cpu()


def _text(dataset: Dataset, device: torch.device) -> torch.Tensor:
    config = load_config("small")
    folder = None if dataset.folder is None else dataset.folder / "text_features"
    if folder is None or not folder.is_dir():
        raise SystemExit(f"{dataset.folder} has no text vectors; make them: laserrec fit DATA OUT --method ease-text")
    features = TextFeatures(config.backbone, config.prompt, device, folder)
    return whitened(features.means(dataset.items), features.parts(dataset.items)).float()


if __name__ == "__main__":
    main()
