"""The one trainer: phases one after another, resumable at any step, in one process or several.

After each epoch the model is validated and the best epoch is kept. A checkpoint holds everything, so that an
interrupted or killed training, given the same call, ends as the uninterrupted one does. Several processes
(laserrec.util.distributed) take their share of every step's examples and of the validation cases; the first one alone
writes and prints.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from laserrec.data.dataset import Cases, Dataset
from laserrec.evaluation.evaluate import rank_cases
from laserrec.evaluation.metrics import Metrics
from laserrec.methods.protocol import Phase
from laserrec.training.batching import batches, split_by_tokens
from laserrec.training.optimizer import RowAdamW, clip_gradients
from laserrec.training.watch import Watch
from laserrec.util import checkpoint
from laserrec.util.distributed import World
from laserrec.util.errors import UserError
from laserrec.util.interrupt import DeferredInterrupt
from laserrec.util.progress import Progress

_SHOWN_EVERY = 10
"""Steps between two losses in the progress bar: reading one from a GPU waits for it."""


@dataclass(frozen=True)
class Pace:
    """What does not change the result, but for `seed`, `k` and the validation."""

    seed: int = 0
    k: int = 10
    """Cut-off of the NDCG that chooses the epoch."""
    eval_batch_size: int = 64
    validates: bool = True
    """False: every phase keeps its last epoch."""
    validation_users: int | None = None
    """Draw so many validation cases; None: all."""
    checkpoint_minutes: float = 1.0
    progress: bool = True


@dataclass(frozen=True)
class Goal:
    """What a training must have reached by some epoch to go on."""

    epoch: int
    ndcg: float
    """On validation."""


class GoalMissedError(Exception):
    """A training has not reached its goal. Its checkpoint stays, from which it can go on with another goal."""

    def __init__(self, log: list[dict[str, Any]]):
        super().__init__()
        self.log = log
        """An entry an epoch, later ones than the goal's too where the training had gone on before."""


@dataclass
class Place:
    """Where a training stands; with the tensors it is all that a resume needs."""

    phase: int = 0
    started: bool = False
    """The phase's work before its first epoch is done."""
    epoch: int = 1
    step: int = 0
    """Batches of this epoch that are done."""
    steps: int = 0
    """Batches done in all phases."""
    loss_sum: float = 0.0
    """Over this epoch's steps."""
    best: float = -1.0
    """Validation NDCG of the kept epoch."""
    worse: int = 0
    """Validations since."""
    kept: int | None = None
    """The kept epoch's entry in the log."""
    seconds: float = 0.0
    """Time spent in earlier runs."""


@dataclass
class Trainer:
    """One training in one folder. `run` leaves the kept epoch in the last phase's task."""

    phases: Sequence[Phase]
    dataset: Dataset
    folder: Path
    fingerprint: str
    """Of data, settings and weights: a checkpoint of another one is refused."""
    pace: Pace = field(default_factory=Pace)
    world: World = field(default_factory=World)
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    started: float = field(default_factory=time.monotonic)
    """When the work began, of which the log's seconds tell."""
    goal: Goal | None = None

    def __post_init__(self) -> None:
        self.place, self.log, self.best = Place(), [], {}
        self.show = self.pace.progress and self.world.is_main
        self.watch = Watch(self.folder if self.world.is_main else None)
        self.validation = self._validation_cases()
        self._saved = time.monotonic()
        self._loss: Tensor | float = 0.0

    def run(self) -> list[dict[str, Any]]:
        """All phases, from wherever the folder's checkpoint stands; returns the log. Ctrl-C and SIGTERM save a
        checkpoint and are raised as KeyboardInterrupt. Raises UserError for a checkpoint of another training, and
        GoalMissedError where the goal is missed."""
        restored = self._restore()
        self.watch.start(self.place.steps if restored else None)
        if not restored:
            torch.manual_seed(self.pace.seed)
            self._begin_phase()
        with DeferredInterrupt(say=self.world.is_main) as self._interrupt:
            try:
                while self.place.phase < len(self.phases):
                    self._run_phase()
            finally:
                self.watch.close()
        self.phase.task.load(self.best)
        return self.log

    @property
    def phase(self) -> Phase:
        """The present one, or the last."""
        return self.phases[min(self.place.phase, len(self.phases) - 1)]

    # -- phases and epochs --------------------------------------------------------------------------------------

    def _begin_phase(self) -> None:
        task, phase = self.phase.task, self.phase
        decayed = {id(p) for p in task.decayed()}
        groups = [[p for p in self._trained() if (id(p) in decayed) == wanted] for wanted in (True, False)]
        groups = [{"params": g, "weight_decay": phase.weight_decay * (i == 0)} for i, g in enumerate(groups) if g]
        self.optimizer = RowAdamW(groups, lr=phase.lr) if groups else None

    def _trained(self) -> list[torch.nn.Parameter]:
        return [p for p in self.phase.task.module.parameters() if p.requires_grad]

    def _run_phase(self) -> None:
        phase, place = self.phase, self.place
        if not place.started:
            if place.phase and self.best:
                phase.task.load(self.best)
            phase.task.start(self._pause)
            self._follow()
            place.started = True
            stays = phase.epochs == 0 or phase.keeps_start
            if phase.validates_start or stays:
                self._note(None, self._validate(phase), kept=stays and not self.best)
        while place.epoch <= phase.epochs and (phase.patience is None or place.worse < phase.patience):
            if self.goal is not None and place.epoch > self.goal.epoch and place.best < self.goal.ndcg:
                self._save()
                raise GoalMissedError(self.log)
            self._epoch()
        if not self.best or not self._chooses(phase):
            self.best = self._snapshot()
        self.place = Place(phase=place.phase + 1, steps=place.steps, best=place.best, kept=place.kept,
                           seconds=place.seconds)
        if self.place.phase < len(self.phases):
            self._begin_phase()
        self._save()  # behind the last phase too: what follows a training may take minutes

    def _epoch(self) -> None:
        self._follow()
        place, phase = self.place, self.phase
        examples = phase.task.begin_epoch(place.epoch)
        plan = batches(examples.lengths, phase.batch_size, (self.pace.seed, place.phase + 1, place.epoch))
        self._loss = place.loss_sum
        title = f"{phase.name} epoch {place.epoch}/{phase.epochs}"
        with Progress(title, len(plan), self.show, done=place.step) as bar:
            for index in plan[place.step :]:
                lr = self._set_rate(len(plan))
                self._step(examples.batch(index), examples.lengths[index])
                place.step, place.steps = place.step + 1, place.steps + 1
                self.watch.step(place.steps, len(index), phase=phase.name, epoch=place.epoch, lr=lr)
                bar.advance(1, **({} if place.step % _SHOWN_EVERY else {"loss": float(self._loss) / place.step}))
                self._pause()
        assert self.optimizer is not None  # as in _set_rate
        self.optimizer.catch_up()
        phase.task.end_epoch()
        looks = place.epoch % phase.eval_every == 0 or place.epoch == phase.epochs
        self._note(float(self._loss) / max(1, len(plan)), self._validate(phase) if looks else None,
                   length=int(examples.lengths.sum()))
        place.epoch, place.step, place.loss_sum = place.epoch + 1, 0, 0.0
        self._loss = 0.0
        self._pause()

    def _step(self, batch: Any, lengths: np.ndarray) -> None:
        place, trained = self.place, self._trained()
        assert self.optimizer is not None  # as in _set_rate
        self.optimizer.zero_grad(set_to_none=True)
        parts: dict[str, Tensor] = {}
        with self.world.own_randomness(self.pace.seed, place.phase, place.epoch, place.step):
            for rows, weight in self._passes(lengths):
                own = self.phase.task.loss(batch, rows)
                (own["loss"] * weight).backward()
                parts = {name: parts.get(name, 0.0) + weight * part.detach() for name, part in own.items()}
        parts = self._summed(trained, parts)
        norm = clip_gradients(trained, self.phase.max_grad_norm)
        self.optimizer.step()
        self._loss = self._loss + parts["loss"]
        self.watch.add(**parts, grad_norm=norm)

    def _passes(self, lengths: np.ndarray) -> list[tuple[np.ndarray, float]]:
        """This process's share of a batch, in passes of bounded size, and their weights. All processes make equally
        many, since a sharded LLM computes in all of them or in none; one with nothing to do has passes of weight 0."""
        mine, limit = self.world.share(len(lengths)), self.phase.tokens_per_pass
        passes = [mine] if limit is None else [mine[p] for p in split_by_tokens(lengths[mine].tolist(), limit)]
        passes = [(rows, 1.0) for rows in passes if len(rows)]
        return passes + [(np.zeros(1, int), 0.0)] * (self.world.most(len(passes)) - len(passes))

    def _summed(self, trained: list[torch.nn.Parameter], parts: dict[str, Tensor]) -> dict[str, Tensor]:
        """Gradients and numbers summed over the processes."""
        if self.world.size == 1:
            return parts
        names = sorted(parts)
        flat = torch.cat([parts[name].reshape(-1).float() for name in names])
        flat = self.world.sum_gradients(trained, flat)
        sizes = [parts[name].numel() for name in names]
        return {name: x.view(parts[name].shape) for name, x in zip(names, flat.split(sizes), strict=True)}

    def _set_rate(self, steps_per_epoch: int) -> float:
        phase, done = self.phase, (self.place.epoch - 1) * steps_per_epoch + self.place.step
        total = phase.epochs * steps_per_epoch
        scale = 0.5 * (1 + math.cos(math.pi * done / total)) if phase.cosine_decay else 1.0
        if done < (warmup := phase.warmup_fraction * total):
            scale = min(scale, (done + 1) / warmup)
        assert self.optimizer is not None  # settings with epochs and nothing to train are refused
        for group in self.optimizer.param_groups:
            group["lr"] = phase.lr * scale
        return phase.lr * scale

    # -- validation ---------------------------------------------------------------------------------------------

    def _validation_cases(self) -> Cases:
        cases, wanted = self.dataset.cases("validation"), self.pace.validation_users
        if len(cases) == 0 and self.pace.validates:
            raise UserError("no user has an interaction to validate on (leave-one-out needs three of one user); give "
                            "more data, or train without choosing an epoch: setting eval.validates = false "
                            "(laserrec fit DATA OUT --eval.no-validates)")
        return cases if wanted is None else cases.sample(wanted)

    def _chooses(self, phase: Phase) -> bool:
        return phase.validates and self.pace.validates

    @torch.no_grad()
    def _validate(self, phase: Phase) -> Metrics | None:
        if not self._chooses(phase):
            return None
        cases = self.validation.take(self.world.even_share(len(self.validation)))
        with Progress("validating", len(cases), self.show) as bar:
            ranks = rank_cases(phase.task.scorer(), cases, self.pace.eval_batch_size, self.dataset.n_items,
                               bar.advance).plain
        ranks = self.world.gather_rows(torch.from_numpy(ranks), len(self.validation))
        return Metrics.from_ranks(ranks.numpy(), k=self.pace.k)

    def _note(self, loss: float | None, metrics: Metrics | None, kept: bool | None = None, **facts: Any) -> None:
        """One line of the log. kept: whether this epoch is kept whatever its metrics."""
        place, numbers = self.place, {} if metrics is None else metrics.as_dict()
        entry = {"phase": self.phase.name, "epoch": 0 if kept is not None else place.epoch, "step": place.steps,
                 "loss": loss, **facts, "seconds": round(self._elapsed(), 1),
                 **{f"validation_{name}": value for name, value in numbers.items()}}
        self.log.append(entry)
        if metrics is not None and (kept or (kept is None and metrics.ndcg > place.best)):
            place.best, place.worse, place.kept, self.best = metrics.ndcg, 0, len(self.log) - 1, self._snapshot()
        elif metrics is not None and kept is None:
            place.worse += 1
        self.watch.epoch(place.steps, entry)

    def _snapshot(self) -> dict[str, Tensor]:
        return {name: tensor.detach().clone() for name, tensor in self.phase.task.state().items()}

    def _elapsed(self) -> float:
        return self.place.seconds + time.monotonic() - self.started

    def summary(self) -> dict[str, Any]:
        """{kept: the kept epoch's log entry or the last one's, epochs, seconds, trained_parameters}."""
        kept = self.log[self.place.kept] if self.place.kept is not None else self.log[-1] if self.log else {}
        return {"kept": kept, "epochs": sum(entry["epoch"] > 0 for entry in self.log),
                "seconds": round(self._elapsed(), 1), "trained_parameters": sum(p.numel() for p in self._trained())}

    # -- checkpoints --------------------------------------------------------------------------------------------

    @property
    def _file(self) -> Path:
        return self.folder / "checkpoint.safetensors"

    def _follow(self) -> None:
        """Machines of different kinds round differently; all go on with the first one's weights."""
        self.world.follow(self.phase.task.module.state_dict().values())

    def _pause(self) -> None:
        """Between two steps: save if it is time. Whichever process was asked to stop, all stop here."""
        stop = self.world.any(self._interrupt.requested)
        if stop or time.monotonic() - self._saved > 60 * self.pace.checkpoint_minutes:
            self._save()
        if stop:
            raise KeyboardInterrupt

    def _save(self) -> None:
        self._saved = time.monotonic()
        if not self.world.is_main:
            return
        tensors = {f"task.{k}": v for k, v in self.phase.task.state().items()}
        tensors |= {f"best.{k}": v for k, v in self.best.items()}
        tensors["rng"] = torch.get_rng_state()
        if self.device.type == "cuda":
            tensors["cuda_rng"] = torch.cuda.get_rng_state(self.device)
        if self.optimizer is not None:
            tensors |= {f"optimizer.{k}": v for k, v in checkpoint.optimizer_tensors(self.optimizer).items()}
        place = {**vars(self.place), "loss_sum": float(self._loss), "seconds": self._elapsed()}
        self.watch.flush()
        checkpoint.save(self._file, tensors, {"place": place, "log": self.log, "fingerprint": self.fingerprint})

    def _read_checkpoint(self) -> tuple[dict[str, Tensor], dict[str, Any] | None]:
        if not self._file.exists():
            return {}, None
        tensors, facts = checkpoint.load(self._file)
        if facts.get("fingerprint") != self.fingerprint:
            raise UserError(f"{self._file} belongs to a training with other settings or data; name another folder, or "
                            "delete this file to start over")
        return tensors, facts

    def _restore(self) -> bool:
        tensors, facts = self.world.from_main(self._read_checkpoint)
        if facts is None:
            return False
        self.place, self.log = Place(**facts["place"]), facts["log"]
        self._begin_phase()
        self.phase.task.load({k: v.to(self.device) for k, v in checkpoint.part(tensors, "task").items()})
        self.best = {k: v.to(self.device) for k, v in checkpoint.part(tensors, "best").items()}
        if self.optimizer is not None:
            checkpoint.restore_optimizer(self.optimizer, checkpoint.part(tensors, "optimizer"))
        torch.set_rng_state(tensors["rng"])
        if "cuda_rng" in tensors:
            torch.cuda.set_rng_state(tensors["cuda_rng"], self.device)
        return True
