"""Distil a fitted Laser into a model that answers without the LLM (Hinton, Vinyals & Dean 2015, "Distilling the
Knowledge in a Neural Network").

The teacher's LLM reads histories of the training sequences once: whole ones, beginnings, parts. A small network
(laserrec.methods.laser.student) learns the teacher's softmax over the items from what an ID model costs: the sum of the
history's item embeddings and the ID model's state. No label is read, and nothing of validation or test. All else of the
model stays: items, ID part, neighbours, new items.
"""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from laserrec.config import StudentConfig
from laserrec.data.dataset import Dataset
from laserrec.evaluation.evaluate import evaluate
from laserrec.methods.laser.student import Student
from laserrec.recommender.model_folder import read_note
from laserrec.recommender.recommender import LaserRecommender
from laserrec.util import checkpoint
from laserrec.util.errors import UserError
from laserrec.util.interrupt import DeferredInterrupt
from laserrec.util.progress import Progress

_READ_AT_ONCE = 2048
"""Histories between two places where the teacher's reading can stop."""
_SAVE_SECONDS = 300.0
_WARMUP_STEPS = 50
_MOST_ITEMS = 16_384
"""Of a larger catalogue so many are drawn for each step's softmax."""
_HIDDEN_STATES = 0.05
"""Share of the examples without an ID state, as in histories of new items alone."""


def draw_histories(sequences: Iterable[np.ndarray], config: StudentConfig) -> list[np.ndarray]:
    """Every sequence whole, and of those of at least two items `config.views` proper parts: beginnings and, in turn,
    any of its items in their order. At most config.histories of them, the same for the same seed."""
    rng = np.random.default_rng(config.seed)
    whole = [s for s in sequences if len(s)]
    drawn = list(whole)
    for view in range(config.views):
        for sequence in whole:
            if len(sequence) > 1:
                count = int(rng.integers(1, len(sequence)))
                some = np.arange(count) if view % 2 == 0 else np.sort(rng.choice(len(sequence), count, replace=False))
                drawn.append(sequence[some])
    if len(drawn) <= config.histories:
        return drawn
    return [drawn[i] for i in np.sort(rng.choice(len(drawn), config.histories, replace=False))]


def distil(
    teacher: LaserRecommender, dataset: Dataset, folder: Path | str, config: StudentConfig | None = None,
    progress: bool = True,
) -> LaserRecommender:
    """Train a student on a data folder's training sequences, into a model folder of its own. A finished
    folder of the same teacher and settings is loaded; an unfinished one is resumed, the training at epochs' ends.

    `facts["student"]` says what it took and, under "validation", what both score there. Raises UserError for data of
    another catalogue, a teacher that is distilled itself, or a folder of other settings or another teacher.
    """
    config, folder = config or StudentConfig(), Path(folder)
    known = teacher.items["item_id"].head(teacher.encoder.catalogue.n_known)
    if teacher.student is not None:
        raise UserError("the model is distilled already; distil the one that it was made of")
    if known.to_list() != dataset.items["item_id"].to_list():
        raise UserError("the model was fitted on another catalogue than the data folder's; distil it on its own data")
    work = _Distillation(teacher, dataset, config, folder, progress)
    if not (folder / "model.json").is_file():
        work.run()
        work.save()
    return work.finished()


class _Distillation:
    def __init__(self, teacher: LaserRecommender, dataset: Dataset, config: StudentConfig, folder: Path, show: bool):
        self.teacher, self.dataset, self.config, self.folder, self.show = teacher, dataset, config, folder, show
        self.fingerprint = _fingerprint(teacher, dataset, config)
        self.histories = draw_histories(dataset.train_sequences.values(), config)
        torch.manual_seed(config.seed)
        self.student = Student(config, teacher.d_text, teacher.encoder.id_model.d_id)
        self.optimizer = torch.optim.AdamW(self.student.parameters(), lr=config.lr, weight_decay=config.weight_decay)
        self.users = torch.empty(len(self.histories), teacher.d_text, dtype=torch.float16)
        """The teacher's embeddings of the histories, of unit length; the text part."""
        self.read, self.epoch, self.seconds = 0, 0, 0.0
        self.started = self.saved = time.monotonic()

    # -- the way ------------------------------------------------------------------------------------------------

    def run(self) -> None:
        """Ctrl-C and SIGTERM save a checkpoint and are raised as KeyboardInterrupt."""
        self._restore()
        with DeferredInterrupt() as self._interrupt:
            with Progress("reading histories with the LLM", len(self.histories), self.show, self.read) as bar:
                while self.read < len(self.histories):
                    bar.advance(self._read_some())
                    if self._interrupt.requested or time.monotonic() - self.saved > _SAVE_SECONDS:
                        self._save_checkpoint()
                    self._interrupt.check()
            while self.epoch < self.config.epochs:
                self._save_checkpoint()  # an epoch that is interrupted is begun again
                self._train_epoch()
        self.student.eval()

    def _read_some(self) -> int:
        some = self.histories[self.read : self.read + _READ_AT_ONCE]
        users = self.teacher.encoder.encode(some, self.teacher.encoder.laser.config.eval.batch_size)
        unit = F.normalize(users[:, : self.teacher.d_text], dim=-1)
        self.users[self.read : self.read + len(some)] = unit.half()
        self.read += len(some)
        return len(some)

    def _train_epoch(self) -> None:
        size, count = self.config.batch_size, len(self.histories)
        # So that an epoch depends on nothing but its number, and a resumed run is the uninterrupted one.
        torch.manual_seed(int(np.random.SeedSequence((self.config.seed, self.epoch)).generate_state(1)[0]))
        order, steps, total = torch.randperm(count), math.ceil(count / size), 0.0
        self.student.train()
        with Progress(f"distilling, epoch {self.epoch + 1}/{self.config.epochs}", steps, self.show) as bar:
            for step, rows in enumerate(order.split(size)):
                self._set_rate(self.epoch * steps + step, self.config.epochs * steps)
                total += self._step(rows)
                bar.advance(loss=total / (step + 1))
                self._interrupt.check()
        self.epoch += 1

    def _step(self, rows: Tensor) -> float:
        some = [self.histories[i] for i in rows.tolist()]
        state = self.teacher.encoder.id_part(some)
        state[torch.rand(len(some)) < _HIDDEN_STATES] = 0.0
        items, tau = self._items(), float(self.teacher.encoder.laser.temperature)
        said = F.normalize(self.student(self.teacher.history_sums(some), state), dim=-1)
        wanted = (self.users[rows].float() @ items.T / tau).softmax(dim=-1)
        loss = F.cross_entropy(said @ items.T / tau, wanted)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        self.optimizer.step()
        return float(loss.detach())

    def _items(self) -> Float[Tensor, "some d_text"]:
        """Text parts of known items, of unit length: all, or as many as a step can take."""
        known = self.teacher.embeddings[: self.dataset.n_items, : self.teacher.d_text]
        if len(known) > _MOST_ITEMS:
            known = known[torch.randperm(len(known))[:_MOST_ITEMS]]
        return F.normalize(known, dim=-1)

    def _set_rate(self, done: int, total: int) -> None:
        scale = min(1.0, (done + 1) / _WARMUP_STEPS) * 0.5 * (1 + math.cos(math.pi * done / total))
        for group in self.optimizer.param_groups:
            group["lr"] = self.config.lr * scale

    # -- the folder ---------------------------------------------------------------------------------------------

    def save(self) -> None:
        facts = {k: v for k, v in self.teacher.facts.items() if k != "results"}  # those were the teacher's
        note = {"config": self.config.model_dump(mode="json"), "fingerprint": self.fingerprint,
                "histories": len(self.histories), "seconds": round(self._elapsed(), 1), "validation": {}}
        model = LaserRecommender(self.teacher.encoder, self.teacher.items, self.teacher.embeddings,
                                 {**facts, "removed": sorted(self.teacher.removed)}, self.student)
        for name, side in (("teacher", self.teacher), ("student", model)):
            with Progress(f"validating the {name}", self.dataset.n_users, self.show) as bar:
                result = evaluate(name, side.score, self.dataset, "validation", progress=bar.advance)
            note["validation"][name] = {**result.plain.as_dict(), "seconds": round(result.seconds, 2)}
        model.facts["student"] = note
        model.record(result, self.dataset)
        model.save_pretrained(self.folder)
        self._file.unlink(missing_ok=True)

    def finished(self) -> LaserRecommender:
        """A model with a catalogue of its own, which may change without the teacher's."""
        if read_note(self.folder).get("student", {}).get("fingerprint") != self.fingerprint:
            raise UserError(f"{self.folder} holds another model, or one distilled with other settings; name another "
                            "folder or delete it")
        return LaserRecommender.from_pretrained(self.folder, self.teacher.encoder.laser.backbone)

    @property
    def _file(self) -> Path:
        return self.folder / "checkpoint.safetensors"

    def _elapsed(self) -> float:
        return self.seconds + time.monotonic() - self.started

    def _save_checkpoint(self) -> None:
        facts: dict[str, Any] = {"fingerprint": self.fingerprint, "read": self.read, "epoch": self.epoch,
                                 "seconds": self._elapsed()}
        tensors = {"users": self.users[: self.read]}
        tensors |= {f"student.{k}": v for k, v in self.student.state_dict().items()}
        tensors |= {f"optimizer.{k}": v for k, v in checkpoint.optimizer_tensors(self.optimizer).items()}
        checkpoint.save(self._file, tensors, facts)
        self.saved = time.monotonic()

    def _restore(self) -> None:
        if not self._file.is_file():
            return
        tensors, facts = checkpoint.load(self._file)
        if facts.get("fingerprint") != self.fingerprint:
            raise UserError(f"{self._file} belongs to a training with other settings, data or another teacher; name "
                            "another folder, or delete this file to start over")
        self.read, self.epoch, self.seconds = facts["read"], facts["epoch"], facts["seconds"]
        self.users[: self.read] = tensors["users"]
        self.student.load_state_dict(checkpoint.part(tensors, "student"))
        checkpoint.restore_optimizer(self.optimizer, checkpoint.part(tensors, "optimizer"))


def _fingerprint(teacher: LaserRecommender, dataset: Dataset, config: StudentConfig) -> str:
    """Of all that a student is made of."""
    digest = hashlib.sha256(f"{dataset.fingerprint} {config.model_dump_json()}".encode())
    digest.update(teacher.encoder.laser.config.model_dump_json().encode())
    kept = {"embeddings": teacher.embeddings, **teacher.encoder.laser.state_dict(),
            **{f"id.{k}": v for k, v in teacher.encoder.id_model.state_dict().items()}}
    for name, tensor in sorted(kept.items()):
        digest.update(name.encode() + tensor.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()
