"""Fit Laser's trainable parts in two stages (paper, 3.3.2), resumable at any step.

Stage 1: item embeddings are encoded anew at every epoch's start; the epoch that is best on validation is kept.
Stage 2: training goes on from there against that epoch's item embeddings, which stay fixed.

Several processes (laserrec.util.distributed) go through all this at the same pace: each takes its share of every step's
examples, of the items and of the validation users, and the first one alone writes and prints.
"""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from laserrec.config import Config, Cuts, ItemSide
from laserrec.data.dataset import Cases, Dataset
from laserrec.evaluation.evaluate import Scorer, rank_cases
from laserrec.evaluation.metrics import Metrics
from laserrec.llm.text_features import whitened
from laserrec.methods.laser.encoder import Encoder
from laserrec.methods.laser.mformer import Route
from laserrec.methods.losses import item_contrast, load_balance, total_loss
from laserrec.methods.seen import Seen
from laserrec.training.batching import batches, split_by_tokens
from laserrec.training.watch import Watch, expert_users
from laserrec.util import checkpoint
from laserrec.util.distributed import World
from laserrec.util.errors import UserError
from laserrec.util.interrupt import DeferredInterrupt
from laserrec.util.memory import rows_at_once
from laserrec.util.progress import Progress

_SCALE_USERS = 256
"""Users whose cosines say how neighbours are weighed against them."""


@dataclass(frozen=True)
class Example:
    """Predict `target` from `history`, both of one user's training sequence."""

    history: np.ndarray
    target: int


def epoch_examples(sequences: dict[int, np.ndarray], cuts: Cuts, seed: tuple[int, ...]) -> list[Example]:
    """This epoch's examples: every position that has a history (all), or one random such position per user."""
    rng = np.random.default_rng(seed)
    examples = []
    for sequence in sequences.values():
        if len(sequence) < 2:
            continue
        positions = range(1, len(sequence)) if cuts == Cuts.ALL else [int(rng.integers(1, len(sequence)))]
        examples += [Example(sequence[:p], int(sequence[p])) for p in positions]
    return examples


@dataclass
class Place:
    """Where a fit stands; with the tensors it is all that a resume needs."""

    stage: int = 1
    epoch: int = 1
    step: int = 0
    """Batches of this epoch that are done."""
    loss_sum: float = 0.0
    best: float = -1.0
    """Validation NDCG of the best epoch so far."""
    seconds: float = 0.0
    """Time spent in earlier runs."""
    steps: int = 0
    """Steps done in both stages."""


class Fit:
    """One fit in one folder. `run` returns the log's entries; the best weights are then in `encoder.laser`."""

    def __init__(self, encoder: Encoder, dataset: Dataset, config: Config, folder: Path, fingerprint: str,
                 progress: bool = True, world: World | None = None):
        self.encoder, self.laser, self.dataset, self.config = encoder, encoder.laser, dataset, config
        self.world = world or World()
        self.folder, self.show = folder, progress and self.world.is_main
        self.place, self.log = Place(), []
        self.outputs: Tensor = torch.empty(0)
        """Float[n_items d_items], the LLM's outputs for the items; `items` are their embeddings."""
        self._white: tuple[Tensor | None, Tensor | None] = (None, None)
        """Outputs and, of them, what the head makes before its trained part."""
        self.items: Tensor = torch.empty(0)
        self.best_items: Tensor = torch.empty(0)
        self.best_state: dict[str, Tensor] = {}
        self.validation = self._validation_cases()
        self.fingerprint, self.watch = fingerprint, Watch(folder if self.world.is_main else None)
        self._started = self._saved = time.monotonic()

    # -- the whole way ------------------------------------------------------------------------------------------

    def run(self) -> list[dict[str, Any]]:
        """Both stages from wherever the folder's checkpoint stands. Ctrl-C and SIGTERM save a checkpoint and
        are raised as KeyboardInterrupt."""
        self._new_optimizer()
        restored = self._restore()
        self.watch.start(self.place.steps if restored else None)
        if not restored:
            torch.manual_seed(self.config.train.seed)
            self._prepare_items()
        with DeferredInterrupt(say=self.world.is_main) as self._interrupt:
            try:
                for stage in (1, 2):
                    if self.place.stage == stage:
                        self._stage()
            finally:
                self.watch.close()
        self.laser.load_state_dict(self.best_state)
        return self.log

    def _epochs(self) -> int:
        train = self.config.train
        return train.stage_one_epochs if self.place.stage == 1 else train.stage_two_epochs

    def _stage(self) -> None:
        while self.place.epoch <= self._epochs():
            self._epoch()
        if self.place.stage == 1:
            # Without stage 1 the untrained items stay, which is Table 4's "w/o training stage 1".
            if self.best_state:
                self.laser.load_state_dict(self.best_state)
                self.items = self.best_items
            else:
                self._keep(self._validate())
            self.place = Place(stage=2, best=self.place.best, seconds=self.place.seconds, steps=self.place.steps)
            self._new_optimizer()
            self._save()

    def _prepare_items(self) -> None:
        laser, means = self.laser, self.encoder.catalogue.means
        self.outputs = means if self.encoder.mean_items else self._item_outputs()
        if laser.head.needs_whitening:
            laser.head.fit_whitening(self.outputs)
            if self.encoder.mean_items:
                laser.head.fit_suffix(self._item_outputs())
        if laser.neighbours is not None:
            laser.neighbours.fit(list(self.dataset.train_sequences.values()),
                                 whitened(means, laser.backbone.mean_depths))
        self._follow()
        self._embed_items()
        metrics = self._validate()
        self._note(epoch=0, loss=None, metrics=metrics, tokens=0)

    # -- one epoch ----------------------------------------------------------------------------------------------

    def _epoch(self) -> None:
        self._follow()
        place, train = self.place, self.config.train
        key = (train.seed, place.stage, place.epoch)
        examples = epoch_examples(self.dataset.train_sequences, train.cuts, key)
        lengths = np.array([self.encoder.catalogue.text_length(e.history) for e in examples])
        plan = batches(lengths, train.batch_size, key)
        title = f"stage {place.stage} epoch {place.epoch}/{self._epochs()}"
        with Progress(title, len(plan), self.show, done=place.step) as bar:
            for index in plan[place.step :]:
                self._set_rate(len(plan))
                loss = self._train_step([examples[i] for i in index])
                place.step, place.steps = place.step + 1, place.steps + 1
                place.loss_sum += loss
                self.watch.step(place.steps, len(index), stage=place.stage, epoch=place.epoch, **self._settings_now())
                bar.advance(loss=place.loss_sum / place.step)
                self._stop_if_asked()
                if time.monotonic() - self._saved > 60 * train.checkpoint_minutes:
                    self._save()
        if place.stage == 1:
            if self.config.prompt.item_side == ItemSide.TRAINED:
                self.outputs = self._item_outputs()
            self._embed_items()
        metrics = self._validate()
        if metrics.ndcg > place.best:
            self._keep(metrics)
        self._note(place.epoch, place.loss_sum / max(1, len(plan)), metrics, int(lengths.sum()))
        place.epoch, place.step, place.loss_sum = place.epoch + 1, 0, 0.0
        self._save()
        self._stop_if_asked()

    def _follow(self) -> None:
        """Machines of different kinds round differently; all go on with the first one's weights."""
        self.world.follow(self.laser.state_dict().values())

    def _stop_if_asked(self) -> None:
        """Between two steps. Whichever process was asked, all stop here."""
        if self.world.any(self._interrupt.requested):
            self._save()
            raise KeyboardInterrupt

    def _train_step(self, examples: list[Example]) -> float:
        self.laser.train()
        self.optimizer.zero_grad(set_to_none=True)
        hide = torch.rand(len(examples)) < self.config.mformer.state_dropout
        told, place = torch.zeros(4 + self.config.mformer.experts, dtype=torch.float64), self.place
        with self.world.own_randomness(self.config.train.seed, place.stage, place.epoch, place.step):
            for chunk in self._passes(examples):
                loss, parts = self._part_of_loss(examples, chunk, hide)
                loss.backward()
                told += parts
        total, contrast, balance, routed, *users = self.world.sum_gradients(self._trained(), told).tolist()
        norm = torch.nn.utils.clip_grad_norm_(self._trained(), self.config.train.max_grad_norm)
        self.watch.add(contrast=contrast, grad_norm=norm, **({"balance": balance} if routed else {}))
        self.watch.routed(users if routed else [])
        self.optimizer.step()
        return total

    def _passes(self, examples: list[Example]) -> list[np.ndarray]:
        """This process's share of a step's examples in passes of about `tokens_per_pass` tokens; one pass where the
        text is read already."""
        mine = self.world.share(len(examples))
        if self.encoder.catalogue.shared:
            return [mine] if len(mine) else []
        tokens = [self.encoder.tokens(examples[i].history) for i in mine]
        passes = [mine[chunk] for chunk in split_by_tokens(tokens, self.config.train.tokens_per_pass)]
        if self.laser.backbone.sharded:  # it computes in all processes or in none: the others get empty passes
            passes += [mine[:0]] * (self.world.most(len(passes)) - len(passes))
        return passes

    def _part_of_loss(self, examples: list[Example], chunk: np.ndarray, hide: Tensor) -> tuple[Tensor, Tensor]:
        """What the examples at `chunk` add to the loss of the whole step; and in numbers to the loss, its two parts,
        the passes that were routed and the users of each expert."""
        weight = self.config.train.balance_weight
        if len(chunk) == 0:
            contrast, balance, _ = self._losses(examples[:1], hide[:1])
            return total_loss(contrast, balance, weight) * 0.0, torch.zeros(())
        contrast, balance, route = self._losses([examples[i] for i in chunk], hide[chunk])
        contrast = contrast * (len(chunk) / len(examples))
        if balance is not None:  # it is a mean over users whose states are shown
            balance = balance * ((~hide[chunk]).sum() / max(1, int((~hide).sum())))
        loss = total_loss(contrast, balance, weight)
        if route is None:
            parts = [loss, contrast, loss.new_zeros(2 + self.config.mformer.experts)]
        else:
            parts = [loss, contrast, balance, loss.new_ones(1), expert_users(route)]
        return loss, torch.cat([part.detach().reshape(-1) for part in parts])

    def _losses(self, examples: list[Example], hide: Tensor) -> tuple[Tensor, Tensor | None, Route | None]:
        """Item contrast and load balance, means over these examples. hide: Bool[batch], whose ID states are hidden."""
        train, histories = self.config.train, [e.history for e in examples]
        outputs, route = self.encoder.outputs(histories, hide_states=hide)
        users = self.encoder.users(outputs, histories)
        targets = torch.tensor([e.target - 1 for e in examples])
        offset = self.laser.seen_offset
        seen = Seen.of(histories) if offset is not None or not train.history_negatives else None
        contrast = item_contrast(users, self._items_to_learn_from(), targets, self.laser.temperature, seen, offset)
        return contrast, None if route is None else load_balance(route), route

    def _items_to_learn_from(self) -> Tensor:
        """The epoch's fixed item embeddings (paper), or with gradient to the head; the LLM's part of them."""
        if self.config.train.item_gradient and self.place.stage == 1:
            if self._white[0] is not self.outputs:
                self._white = self.outputs, self.laser.head.whiten_items(self.outputs)
            return self.laser.head.embed_white(self._white[1])
        return self.items[:, : self.items.shape[1] - self._id_width()]

    def _id_width(self) -> int:
        return self.encoder.id_model.d_id if self.laser.head.id_share else 0

    def _trained(self) -> list[torch.nn.Parameter]:
        return [p for p in self.laser.parameters() if p.requires_grad]

    def _new_optimizer(self) -> None:
        train = self.config.train
        # Decay is for maps; it would pull tokens, norms and biases away from where the LLM can read them.
        maps = {id(m.weight) for m in self.laser.modules() if isinstance(m, torch.nn.Linear)}
        groups = [[p for p in self._trained() if (id(p) in maps) == decayed] for decayed in (True, False)]
        self.optimizer = torch.optim.AdamW(
            [{"params": g, "weight_decay": d} for g, d in zip(groups, (train.weight_decay, 0.0), strict=True)],
            lr=train.lr)

    def _settings_now(self) -> dict[str, float | None]:
        offset = self.laser.seen_offset
        now = {"lr": self.optimizer.param_groups[0]["lr"], "seen_offset": None if offset is None else offset.item()}
        if self.laser.log_temperature is not None:
            now["temperature"] = self.laser.temperature.item()
        return now

    def _set_rate(self, steps_per_epoch: int) -> None:
        train, place = self.config.train, self.place
        done = (place.epoch - 1) * steps_per_epoch + place.step
        total = self._epochs() * steps_per_epoch
        scale = 0.5 * (1 + math.cos(math.pi * done / total)) if train.cosine_decay else 1.0
        warmup = train.warmup_fraction * total if place.stage == 1 else 0.0
        if done < warmup:
            scale = min(scale, (done + 1) / warmup)
        for group in self.optimizer.param_groups:
            group["lr"] = train.lr * scale

    # -- items and validation -----------------------------------------------------------------------------------

    def _item_outputs(self) -> Tensor:
        count = len(self.encoder.catalogue)
        items = [np.array([i + 1], dtype=np.int32) for i in self.world.even_share(count)]
        with Progress("encoding items", len(items), self.show) as bar:
            outputs = self.encoder.encode(items, self.config.eval.batch_size, as_item=True, raw=True,
                                          progress=bar.advance)
        return self.world.gather_rows(outputs, count)

    @torch.no_grad()
    def _embed_items(self) -> None:
        self.laser.eval()  # no dropout in what is compared
        self.items = self.encoder.embed_item_outputs(self.outputs)

    def _validation_cases(self) -> Cases:
        cases = self.dataset.cases("validation")
        wanted = self.config.train.validation_users
        if wanted is None or wanted >= len(cases):
            return cases
        rng = np.random.default_rng(0)  # the same users for every seed, so that seeds can be compared
        return cases.take(np.sort(rng.choice(len(cases), wanted, replace=False)))

    def _validate(self) -> Metrics:
        size, k = self.config.eval.batch_size, self.config.eval.k
        cases = self.validation.take(self.world.even_share(len(self.validation)))
        items = torch.nn.functional.normalize(self.items, dim=-1)
        if self.laser.neighbours is not None:
            self._scale_neighbours(items)
        with Progress("validating", len(cases), self.show) as bar:
            users = self.encoder.encode(cases.histories, size, progress=bar.advance)
        users = torch.nn.functional.normalize(users, dim=-1)
        size = rows_at_once(len(items), size)
        ranks = rank_cases(self._scores_in_order(users, items, size), cases, size, len(items)).plain
        return Metrics.from_ranks(self.world.gather_rows(torch.from_numpy(ranks), len(self.validation)).numpy(), k=k)

    def _scale_neighbours(self, items: Tensor) -> None:
        """By some users' training sequences; the same in every process."""
        sequences = list(self.dataset.train_sequences.values())
        some = [sequences[i] for i in np.linspace(0, len(sequences) - 1, min(_SCALE_USERS, len(sequences))).astype(int)]
        users = self.encoder.encode(some, self.config.eval.batch_size)
        self.laser.neighbours.scale_to(torch.nn.functional.normalize(users, dim=-1) @ items.T)

    def _scores_in_order(self, users: Tensor, items: Tensor, size: int) -> Scorer:
        """The evaluator asks in order, `size` users at a time; hand it the next rows' scores."""
        rows: Iterator[Tensor] = iter(users.split(size))
        return lambda histories: self.laser.finish(next(rows) @ items.T, histories)

    def _keep(self, metrics: Metrics) -> None:
        self.place.best = metrics.ndcg
        self.best_items = self.items.clone()
        self.best_state = {name: tensor.clone() for name, tensor in self.laser.state_dict().items()}

    def _note(self, epoch: int, loss: float | None, metrics: Metrics, tokens: int) -> None:
        entry = {"stage": self.place.stage, "epoch": epoch, "loss": loss, "text_tokens": tokens,
                 "seconds": round(self._elapsed(), 1), **{f"validation_{k}": v for k, v in metrics.as_dict().items()}}
        self.log.append(entry)
        self.watch.epoch(self.place.steps, entry)

    def _elapsed(self) -> float:
        return self.place.seconds + time.monotonic() - self._started

    def summary(self) -> dict[str, Any]:
        """The kept epoch's log entry, and what the whole fit took."""
        trained = sum(p.numel() for p in self._trained())
        bi_tuning = self.laser.suffix.numel() + self.config.mformer.queries * self.laser.suffix.numel()
        best = max(self.log, key=lambda e: (e["epoch"] > 0, e[f"validation_ndcg@{self.config.eval.k}"]))
        return {"best": best, "seconds": round(self._elapsed(), 1), "trained_parameters": trained,
                "bi_tuning_parameters": bi_tuning}

    # -- resume -------------------------------------------------------------------------------------------------

    @property
    def _file(self) -> Path:
        return self.folder / "checkpoint.safetensors"

    def _save(self) -> None:
        self._saved = time.monotonic()
        if not self.world.is_main:
            return
        tensors = {"outputs": self.outputs, "items": self.items, "best_items": self.best_items}
        tensors["rng"] = torch.get_rng_state()
        tensors |= {f"laser.{k}": v for k, v in self.laser.state_dict().items()}
        tensors |= {f"best.{k}": v for k, v in self.best_state.items()}
        tensors |= {f"optimizer.{k}": v for k, v in checkpoint.optimizer_tensors(self.optimizer).items()}
        place = {**vars(self.place), "seconds": self._elapsed()}
        self.watch.flush()
        checkpoint.save(self._file, tensors, {"place": place, "log": self.log, "fingerprint": self.fingerprint})

    def discard_checkpoint(self) -> None:
        """Once the result is saved elsewhere."""
        self._file.unlink(missing_ok=True)

    def _read_checkpoint(self) -> tuple[dict[str, Tensor], dict[str, Any] | None]:
        if not self._file.exists():
            return {}, None
        tensors, facts = checkpoint.load(self._file)
        if facts["fingerprint"] != self.fingerprint:
            raise UserError(f"{self._file} belongs to a fit with other settings or data; give another folder for the "
                            "new fit, or delete this file to start over")
        return tensors, facts

    def _restore(self) -> bool:
        tensors, facts = self.world.from_main(self._read_checkpoint)
        if facts is None:
            return False
        self.place, self.log = Place(**facts["place"]), facts["log"]
        self.outputs, self.items, self.best_items = (tensors[n] for n in ("outputs", "items", "best_items"))
        self.laser.load_state_dict(checkpoint.part(tensors, "laser"))
        self.best_state = checkpoint.part(tensors, "best")
        checkpoint.restore_optimizer(self.optimizer, checkpoint.part(tensors, "optimizer"))
        torch.set_rng_state(tensors["rng"])
        return True


_PACE = (("train", "checkpoint_minutes"), ("train", "tokens_per_pass"), ("backbone", "compiled"),
         ("backbone", "gradient_checkpointing"), ("backbone", "shard"))


def fit_fingerprint(data_sha256: str, id_model: torch.nn.Module, config: Config) -> str:
    """What a resumed fit must share with the first: data, ID model and every setting but those of pace and memory."""
    tree = config.model_dump(mode="json")
    for section, name in _PACE:
        tree[section].pop(name)
    digest = hashlib.sha256(json.dumps([data_sha256, tree], sort_keys=True).encode())
    for name, tensor in sorted(id_model.state_dict().items()):
        digest.update(name.encode() + tensor.detach().cpu().numpy().tobytes())
    return digest.hexdigest()
