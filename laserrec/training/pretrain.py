"""Train the ID-based recommender to convergence: early stopping on validation NDCG, test never touched."""

from __future__ import annotations

import copy
import hashlib
import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from laserrec.config import IdModelConfig, ItemTable
from laserrec.data.dataset import Dataset
from laserrec.evaluation.evaluate import rank_cases
from laserrec.evaluation.metrics import Metrics
from laserrec.methods.id_store import load_id_model, save_id_model
from laserrec.methods.sequence import IdModel, make_id_model, pad_histories
from laserrec.training.batching import batches
from laserrec.training.watch import Watch
from laserrec.util import checkpoint
from laserrec.util.distributed import alone
from laserrec.util.errors import UserError
from laserrec.util.io import write_text
from laserrec.util.progress import Progress

_CHECKPOINT_SECONDS = 60.0


@dataclass
class _Place:
    epoch: int = 0
    best: float = -1.0
    best_epoch: int = 0
    worse: int = 0
    """Evaluations since the best one."""
    seconds: float = 0.0


class _Pretraining:
    def __init__(self, dataset: Dataset, config: IdModelConfig, folder: Path, show: bool, text: Tensor | None):
        self.dataset, self.config, self.folder, self.show = dataset, config, folder, show
        self.sequences = [s for s in dataset.train_sequences.values() if len(s) > 1]
        if not self.sequences:
            raise UserError("no user has two training interactions; there is nothing to learn a sequence from")
        torch.manual_seed(config.seed)
        self.model = make_id_model(config, dataset.n_items, text)
        offset = [p for p in self.model.parameters() if p is self.model.seen_offset]
        rest = [p for p in self.model.parameters() if p is not self.model.seen_offset]
        self.optimizer = torch.optim.AdamW([{"params": rest}, {"params": offset, "weight_decay": 0.0}], lr=config.lr,
                                           weight_decay=config.weight_decay)
        self.place, self.log, self.best = _Place(), [], copy.deepcopy(self.model.state_dict())
        self.watch = Watch(folder)
        self._boundary: tuple[dict, dict] = ({}, {})
        tree = [dataset.fingerprint, config.model_dump(mode="json"), None if text is None else _sha256(text)]
        self.fingerprint = hashlib.sha256(json.dumps(tree, sort_keys=True).encode()).hexdigest()
        self._started = self._saved = time.monotonic()

    def run(self) -> IdModel:
        restored = self._restore()
        steps_per_epoch = -(-len(self.sequences) // self.config.batch_size)
        self.watch.start(self.place.epoch * steps_per_epoch if restored else None)
        try:
            while self.place.epoch < self.config.max_epochs and self.place.worse < self.config.patience:
                self._epoch()
        except KeyboardInterrupt:
            if self._boundary[0]:
                self._save(self._boundary)  # an epoch takes seconds: the broken one is run again
            raise
        finally:
            self.watch.close()
        self.model.load_state_dict(self.best)
        return self.model

    def _epoch(self) -> None:
        self._boundary = self._state()
        config, place = self.config, self.place
        self.model.train()
        plan = batches(np.array([len(s) for s in self.sequences]), config.batch_size, (config.seed, place.epoch + 1))
        sequences, total = self._sequences(), 0.0
        with Progress(f"{config.kind} epoch {place.epoch + 1} (best {place.best:.4f})", len(plan), self.show) as bar:
            for done, index in enumerate(plan, 1):
                loss = self.model.loss(pad_histories([sequences[i] for i in index], config.max_history))
                self.optimizer.zero_grad(set_to_none=True)
                loss.backward()
                norm = torch.nn.utils.get_total_norm([p.grad for p in self.model.parameters() if p.grad is not None])
                self.optimizer.step()
                total += float(loss.detach())
                self._watch_step(place.epoch * len(plan) + done, len(index), loss.detach(), norm)
                bar.advance(loss=total / done)
        place.epoch += 1
        entry: dict[str, Any] = {"epoch": place.epoch, "loss": total / len(plan)}
        if place.epoch % config.eval_every == 0 or place.epoch == config.max_epochs:
            entry |= self._validate()
        self.log.append(entry)
        self._write_log()
        self.watch.epoch(place.epoch * len(plan), entry)
        if time.monotonic() - self._saved > _CHECKPOINT_SECONDS:
            self._save(self._state())

    def _watch_step(self, step: int, examples: int, loss: Tensor, norm: Tensor) -> None:
        offset = self.model.seen_offset
        self.watch.add(loss=loss, grad_norm=norm)
        self.watch.step(step, examples, epoch=self.place.epoch + 1, lr=self.config.lr,
                        seen_offset=None if offset is None else offset.item())

    def _sequences(self) -> list[np.ndarray]:
        """This epoch's: as they are, but for the share that is read in a random order."""
        if not self.config.shuffle:
            return self.sequences
        rng = np.random.default_rng((self.config.seed, self.place.epoch, 1))
        mixed = rng.random(len(self.sequences)) < self.config.shuffle
        return [rng.permutation(s) if m else s for s, m in zip(self.sequences, mixed, strict=True)]

    def _validate(self) -> dict[str, Any]:
        self.model.eval()
        cases = self.dataset.cases("validation")
        metrics = Metrics.from_ranks(rank_cases(self.model.score, cases, 256, self.dataset.n_items).plain)
        if metrics.ndcg > self.place.best:
            self.place.best, self.place.best_epoch, self.place.worse = metrics.ndcg, self.place.epoch, 0
            self.best = copy.deepcopy(self.model.state_dict())
        else:
            self.place.worse += 1
        return {f"validation_{name}": value for name, value in metrics.as_dict().items()}

    def _write_log(self) -> None:
        write_text(self.folder / "log.jsonl", "".join(json.dumps(e) + "\n" for e in self.log))

    # -- resume: at epoch boundaries ----------------------------------------------------------------------------

    @property
    def _file(self) -> Path:
        return self.folder / "checkpoint.safetensors"

    def _state(self) -> tuple[dict, dict]:
        tensors = {f"model.{k}": v.clone() for k, v in self.model.state_dict().items()}
        tensors |= {f"best.{k}": v for k, v in self.best.items()}
        tensors |= {f"optimizer.{k}": v.clone() for k, v in checkpoint.optimizer_tensors(self.optimizer).items()}
        tensors["rng"] = torch.get_rng_state()
        seconds = self.place.seconds + time.monotonic() - self._started
        return tensors, {"place": {**vars(self.place), "seconds": seconds}, "log": list(self.log),
                         "fingerprint": self.fingerprint}

    def _save(self, state: tuple[dict, dict]) -> None:
        self.watch.flush()
        checkpoint.save(self._file, *state)
        self._saved = time.monotonic()

    def _restore(self) -> bool:
        if not self._file.exists():
            return False
        tensors, facts = checkpoint.load(self._file)
        if facts["fingerprint"] != self.fingerprint:
            raise UserError(f"{self._file} belongs to a training with other settings or data; name another folder, or "
                            "delete this file to start over")
        self.model.load_state_dict(checkpoint.part(tensors, "model"))
        self.best = checkpoint.part(tensors, "best")
        checkpoint.restore_optimizer(self.optimizer, checkpoint.part(tensors, "optimizer"))
        torch.set_rng_state(tensors["rng"])
        self.place, self.log = _Place(**facts["place"]), facts["log"]
        return True

    def metrics(self) -> dict[str, Any]:
        best = next((e for e in self.log if e["epoch"] == self.place.best_epoch), {})
        seconds = self.place.seconds + time.monotonic() - self._started
        return {**{k: v for k, v in best.items() if k.startswith("validation_")}, "best_epoch": self.place.best_epoch,
                "epochs": self.place.epoch, "seconds": round(seconds, 1)}


def _sha256(text: Tensor) -> str:
    return hashlib.sha256(text.numpy().tobytes()).hexdigest()


def pretrain_id_model(
    dataset: Dataset, config: IdModelConfig, out: Path | str, progress: bool = True,
    text: Callable[[], Float[Tensor, "n_items d_text"]] | None = None,
) -> dict[str, Any]:
    """Train into folder `out` and return its metrics. A finished folder with the same settings and data is reused;
    an unfinished one is resumed, with the result of an uninterrupted run.

    text: called for the items' text vectors where the item table is made from them (see laserrec.llm.text_features).

    Raises UserError for a folder of other settings or data. Ctrl-C leaves a checkpoint.
    """
    out = Path(out)
    if (out / "config.json").is_file():
        found = load_id_model(out, dataset)
        if found.model.config != config:
            raise UserError(f"{out} holds an ID model with other settings; name another folder or delete it")
        return {**found.metrics, "reused": True}
    alone("pretraining")
    out.mkdir(parents=True, exist_ok=True)
    if config.items != ItemTable.IDS and text is None:
        raise UserError(f"id_model.items {config.items} needs the items' text vectors (laserrec.llm.text_features)")
    training = _Pretraining(dataset, config, out, progress, text() if config.items != ItemTable.IDS else None)
    model, metrics = training.run(), training.metrics()
    training._write_log()
    save_id_model(out, model, dataset, metrics)
    (out / "checkpoint.safetensors").unlink(missing_ok=True)
    return {**metrics, "reused": False}
