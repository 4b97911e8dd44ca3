"""Our frozen-LLM engine beside transformers' model, in one process, on real histories of amazon-scientific.

Both read `[prefix][text][suffix]` of the same histories with the same trained parts; one step is the whole of Laser's:
ID states, M-Former, LLM, softmax over all items, backward. transformers gets what a plain implementation gives it:
batches in random order, padded to their longest; beside it the same batches sorted by length. Real tokens are counted,
padding is not.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from laserrec.bench.machine import describe, peak_memory, product_peak, side_by_side, spread
from laserrec.config import Config, Cuts, Engine, ItemTable, Precision, load_config, merge
from laserrec.data.dataset import Dataset
from laserrec.data.prompt import PromptEncoder
from laserrec.llm.backbone import load_backbone, resolve_precision
from laserrec.methods.laser.encoder import Catalogue, Encoder
from laserrec.methods.laser.model import Laser
from laserrec.methods.losses import item_contrast, load_balance, total_loss
from laserrec.methods.sequence import IdModel, make_id_model
from laserrec.training.batching import batches, split_by_tokens
from laserrec.training.train import epoch_examples
from laserrec.util.errors import UserError
from laserrec.util.progress import Progress

OURS, THEIRS, SORTED = "ours", "transformers", "transformers, batches sorted by length"
READING = "ours, texts read anew"
_FP32_TOLERANCE = 1e-4


def _id_model(config: Config, dataset: Dataset) -> IdModel:
    """A fresh one of the config's shape: what its item table was started from makes no difference to the time."""
    return make_id_model(config.id_model.model_copy(update={"items": ItemTable.IDS}), dataset.n_items)


@dataclass(frozen=True)
class Setting:
    """What is timed."""

    data: Path
    """A data folder."""
    layers: int | None = None
    """Of the backbone; None = all."""
    backbone: str = "smollm2-135m"
    batch_size: int = 16
    histories: int = 32
    items: int = 96
    runs: int = 7
    threads: int | None = None

    def config(self, engine: Engine, precision: Precision = Precision.AUTO, compiled: bool = True) -> Config:
        """The small preset with the paper's layout, text budget and item side."""
        return load_config("small", None, merge(
            {"prompt": {"layout": "prefix_first", "item_side": "trained", "max_item_tokens": 64},
             "head": {"whiten_dims": 0, "projection": False, "id_share": 0.0}},
            {"backbone": {"name": self.backbone, "layers": self.layers, "mean_layers": (), "engine": engine,
                          "precision": precision, "compiled": compiled and engine == Engine.NATIVE}}))


class Side:
    """One engine with everything around it; the same seed gives the same trained parts."""

    def __init__(self, setting: Setting, engine: Engine, precision: Precision = Precision.AUTO, compiled: bool = True,
                 dataset: Dataset | None = None):
        self.config = setting.config(engine, precision, compiled)
        self.dataset = dataset or Dataset.load(setting.data)
        torch.manual_seed(0)
        id_model = _id_model(self.config, self.dataset)
        laser = Laser(self.config, load_backbone(self.config.backbone), id_model.d_id)
        # Started at zero, as in the preset, it would hide what the states do to the prefix.
        torch.nn.init.normal_(laser.mformer.projection.weight, std=0.02)
        self.encoder = Encoder(laser.eval(), id_model, Catalogue(laser, self.dataset.items, self.dataset.n_items))
        self.items = torch.randn(self.dataset.n_items, laser.backbone.d_llm, generator=torch.Generator().manual_seed(1))

    def tokens(self, histories: list[np.ndarray], as_item: bool = False) -> int:
        """Real LLM tokens: prefix, text, suffix."""
        return sum(self.encoder.tokens(h, as_item) for h in histories)

    def step(self, histories: list[np.ndarray], targets: np.ndarray) -> Tensor:
        """Forward and backward of one batch; the gradient is left in the parameters. Returns the users' embeddings.
        Ours goes in passes of train.tokens_per_pass, as training does."""
        self.encoder.laser.zero_grad(set_to_none=True)
        parts = []
        for rows in self._passes(histories):
            users, route = self.encoder.embed([histories[i] for i in rows])
            wanted = torch.as_tensor(targets[rows].astype(np.int64)) - 1
            contrast = item_contrast(users, self.items, wanted, 0.05)
            (total_loss(contrast, load_balance(route), 0.01) * (len(rows) / len(histories))).backward()
            parts.append(users.detach())
        return torch.cat(parts)

    def _passes(self, histories: list[np.ndarray]) -> list[np.ndarray]:
        if not self.encoder.laser.backbone.native:
            return [np.arange(len(histories))]
        return split_by_tokens([self.encoder.tokens(h) for h in histories], self.config.train.tokens_per_pass)

    def encode(self, histories: list[np.ndarray], as_item: bool) -> Tensor:
        """Forward of one batch."""
        with torch.no_grad():
            return self.encoder.embed(histories, as_item)[0]


def _plan(lengths: np.ndarray, size: int) -> dict[str, list[np.ndarray]]:
    order = np.random.default_rng(0).permutation(len(lengths))
    random = [order[at : at + size] for at in range(0, len(order), size)]
    return {OURS: random, THEIRS: random, SORTED: batches(lengths, size, (0,))}


def _check_equality(setting: Setting, dataset: Dataset) -> dict[str, float]:
    """Largest relative differences of outputs and of the prefix's and suffix's gradients, in float32 against
    transformers' own. Raises UserError beyond 1e-4: times of unequal things mean nothing."""
    examples = epoch_examples(dict(list(dataset.train_sequences.items())[:5]), Cuts.RANDOM, (0,))
    histories, targets = [e.history for e in examples], np.array([e.target for e in examples])
    results = []
    for engine in (Engine.NATIVE, Engine.TRANSFORMERS):
        side = Side(setting, engine, Precision.FP32, dataset=dataset)
        users, laser = side.step(histories, targets), side.encoder.laser
        results.append((users, laser.suffix.grad.clone(), laser.mformer.projection.weight.grad.clone()))
    errors = {name: float((a - b).abs().max() / b.abs().max())
              for name, a, b in zip(("outputs", "suffix gradient", "prefix gradient"), *results, strict=True)}
    if max(errors.values()) > _FP32_TOLERANCE:
        raise UserError(f"the native forward is not transformers' on this machine: {errors}; nothing was timed")
    return errors


def _report(setting: Setting, works: dict[str, Callable[[], object]], tokens: int, flops: float, show: bool,
            title: str) -> dict[str, Any]:
    with Progress(title, setting.runs * len(works), show) as bar:
        first, measured = side_by_side(list(works.values()), setting.runs, bar.advance)
    times = dict(zip(works, measured, strict=True))
    peak = product_peak(torch.bfloat16 if resolve_precision(Precision.AUTO) == Precision.BF16 else torch.float32)
    best = {name: min(t) for name, t in times.items()}
    fastest = min((n for n in best if n not in (OURS, READING)), key=best.get)
    return {
        "ratio": best[THEIRS] / best[OURS],
        "ratio_of_medians": statistics.median(times[THEIRS]) / statistics.median(times[OURS]),
        "ratio_to_fastest_reference": best[fastest] / best[OURS],
        "tokens_per_second": tokens / best[OURS], "reference_tokens_per_second": tokens / best[THEIRS],
        "peak_share": flops / best[OURS] / peak, "reference_peak_share": flops / best[THEIRS] / peak,
        "compile_seconds": max(0.0, first[0] - statistics.median(times[OURS])),
        "product_peak_gflops": peak / 1e9, "real_tokens": tokens, "runs": setting.runs,
        "times": {name: spread(t) for name, t in times.items()},
    }


def _product_flops(side: Side, tokens: int, backward: bool) -> float:
    """Of the LLM's matrix products over real tokens; attention and all else are not counted."""
    weights = sum(b.numel() for layer in side.encoder.laser.backbone.decoder.layers for n, b in layer.named_buffers()
                  if b is not None and b.ndim == 2)
    return 2.0 * weights * tokens * (2 if backward else 1)


def _sides(setting: Setting, dataset: Dataset) -> tuple[Side, Side]:
    return tuple(Side(setting, e, dataset=dataset) for e in (Engine.NATIVE, Engine.TRANSFORMERS))


def bench_train(setting: Setting, progress: bool = True) -> dict[str, Any]:
    """Train steps over real histories, one random cut per user."""
    dataset = Dataset.load(setting.data)
    equality = _check_equality(setting, dataset)
    ours, theirs = _sides(setting, dataset)
    examples = _examples(dataset, setting.histories)
    histories, targets = [e.history for e in examples], np.array([e.target for e in examples])
    plan = _plan(np.array([ours.tokens([h]) for h in histories]), setting.batch_size)

    def epoch(side: Side, chunks: list[np.ndarray]) -> Callable[[], None]:
        def work() -> None:
            for chunk in chunks:
                side.step([histories[i] for i in chunk], targets[chunk])
        return work

    works = {name: epoch(ours if name == OURS else theirs, chunks) for name, chunks in plan.items()}
    tokens = ours.tokens(histories)
    result = _report(setting, works, tokens, _product_flops(ours, tokens, backward=True), progress, "train steps")
    memory = {name: peak_memory(_one_train_step, setting, engine)
              for name, engine in ((OURS, Engine.NATIVE), (THEIRS, Engine.TRANSFORMERS))}
    return {**result, "peak_memory_gib": memory[OURS], "reference_peak_memory_gib": memory[THEIRS],
            "equality_float32": equality, **_settings_of(setting)}


def bench_encode(setting: Setting, progress: bool = True) -> dict[str, Any]:
    """Encoding of users and of items."""
    dataset = Dataset.load(setting.data)
    equality = _check_equality(setting, dataset)
    ours, theirs = _sides(setting, dataset)
    rng = np.random.default_rng(0)
    users = [e.history for e in _examples(dataset, setting.histories)]
    items = [np.array([i], dtype=np.int32) for i in rng.choice(dataset.n_items, setting.items, replace=False) + 1]
    out: dict[str, Any] = {}
    for name, histories, as_item in (("users", users, False), ("items", items, True)):
        plan = _plan(np.array([ours.tokens([h], as_item) for h in histories]), setting.batch_size)

        def epoch(side: Side, chunks: list[np.ndarray], histories=histories, as_item=as_item) -> Callable[[], None]:
            def work() -> None:
                for chunk in chunks:
                    side.encode([histories[i] for i in chunk], as_item)
            return work

        works = {n: epoch(ours if n == OURS else theirs, chunks) for n, chunks in plan.items()}
        tokens = ours.tokens(histories, as_item)
        out[name] = _report(setting, works, tokens, _product_flops(ours, tokens, backward=False), progress,
                            f"encoding {name}")
    out["items_shared"] = _bench_shared_items(setting, dataset, progress)
    memory = {name: peak_memory(_one_encode, setting, engine)
              for name, engine in ((OURS, Engine.NATIVE), (THEIRS, Engine.TRANSFORMERS))}
    return {**out.pop("users"), **out, "peak_memory_gib": memory[OURS],
            "reference_peak_memory_gib": memory[THEIRS], "equality_float32": equality, **_settings_of(setting)}


def _bench_shared_items(setting: Setting, dataset: Dataset, progress: bool) -> dict[str, Any]:
    """Items as the small preset reads them: no prefix, [EOS] as suffix. Ours reads the instruction once and every item
    behind it, once per fit; an epoch then costs one token per item. transformers reads all of it for every item and
    epoch. The same outputs, which is checked. `ratio` is an epoch's, `ratio_with_reading` a one-epoch fit's."""
    small = {"prompt": {"item_side": "plain", "max_item_tokens": 64}, "head": {"whiten_dims": 0, "projection": False,
                                                                              "id_share": 0.0}}
    items = dataset.items.sample(setting.items, seed=0)

    def laser(engine: Engine, precision: Precision, layout: str) -> Laser:
        config = load_config("small", None, merge(small, {"prompt": {"layout": layout}, "backbone": setting.config(
            engine, precision).backbone.model_dump()}))
        return Laser(config, load_backbone(config.backbone), config.id_model.d_id).eval()

    def read(mine: Laser) -> Encoder:
        return Encoder(mine, _id_model(mine.config, dataset), Catalogue(mine, items, len(items)))

    def ours(encoder: Encoder) -> Tensor:
        return encoder.encode_items(setting.batch_size, raw=True)

    @torch.no_grad()
    def theirs(reference: Laser, prompt: PromptEncoder) -> Tensor:
        texts = [np.concatenate([prompt.instruction, prompt.block(t)]) for t in prompt.item_tokens(items)]
        nothing = torch.zeros(len(texts), 1, reference.config.id_model.d_id)
        parts = [slice(at, at + setting.batch_size) for at in range(0, len(texts), setting.batch_size)]
        return torch.cat([reference(texts[p], nothing[p], nothing[p, :, 0] > 0, plain=True)[0] for p in parts])

    def both(precision: Precision) -> tuple[Laser, Laser, PromptEncoder]:
        mine = laser(Engine.NATIVE, precision, "text_first")
        return (mine, laser(Engine.TRANSFORMERS, precision, "prefix_first"),
                PromptEncoder(mine.backbone.tokenizer, mine.config.prompt))

    mine, reference, prompt = both(Precision.FP32)
    exact = theirs(reference, prompt)
    error = float((ours(read(mine)) - exact).abs().max() / exact.abs().max())
    if error > _FP32_TOLERANCE:
        raise UserError(f"shared reading of items is not transformers' on this machine: {error}; nothing was timed")
    mine, reference, prompt = both(Precision.AUTO)
    tokens = sum(len(prompt.instruction) + len(prompt.block(t)) + 1 for t in prompt.item_tokens(items))
    encoder = read(mine)
    works = {OURS: lambda: ours(encoder), THEIRS: lambda: theirs(reference, prompt),
             READING: lambda: ours(read(mine))}
    result = _report(setting, works, tokens, 0.0, progress, "encoding items, texts read before")
    result["ratio_with_reading"] = (result["times"][THEIRS]["minimum_seconds"]
                                    / result["times"][READING]["minimum_seconds"])
    return {k: v for k, v in result.items() if "peak_share" not in k} | {"equality_float32": error}


def tokens_per_epoch(setting: Setting) -> dict[str, int]:
    """LLM tokens an epoch of training and item encoding takes, by scheme."""
    dataset = Dataset.load(setting.data)
    side = Side(setting, Engine.NATIVE, compiled=False, dataset=dataset)
    small = load_config("small")
    items = side.tokens([np.array([i], dtype=np.int32) for i in range(1, dataset.n_items + 1)], as_item=True)
    everyone, one = (epoch_examples(dataset.train_sequences, cuts, (0,)) for cuts in (Cuts.ALL, Cuts.RANDOM))
    prompt = PromptEncoder(side.encoder.laser.backbone.tokenizer, small.prompt)
    text = len(prompt.instruction) + sum(len(prompt.block(t)) for t in prompt.item_tokens(dataset.items))
    added = small.mformer.queries + 1
    return {"per_position": side.tokens([e.history for e in everyone]) + items,
            "random_cut": side.tokens([e.history for e in one]) + items,
            "ours": added * len(everyone), "ours_random_cut": added * len(one), "ours_once_per_fit": text}


def bench_engine(setting: Setting, progress: bool = True) -> dict[str, Any]:
    """All of it, as kept in benchmarks/results/engine.json."""
    return {"machine": describe(), "train": bench_train(setting, progress), "encode": bench_encode(setting, progress),
            "tokens_per_epoch": tokens_per_epoch(setting)}


def _examples(dataset: Dataset, count: int) -> list:
    examples = epoch_examples(dataset.train_sequences, Cuts.RANDOM, (0,))
    if count > len(examples):
        raise UserError(f"the data folder has {len(examples)} users with two or more training items, not {count}")
    return [examples[i] for i in np.random.default_rng(1).choice(len(examples), count, replace=False)]


def _settings_of(setting: Setting) -> dict[str, Any]:
    return {"layers": setting.layers, "batch_size": setting.batch_size, "histories": setting.histories}


def _one_train_step(setting: Setting, engine: Engine) -> None:
    side = Side(setting, engine)
    examples = _examples(side.dataset, setting.histories)
    for at in range(0, len(examples), setting.batch_size):
        chunk = examples[at : at + setting.batch_size]
        side.step([e.history for e in chunk], np.array([e.target for e in chunk]))


def _one_encode(setting: Setting, engine: Engine) -> None:
    side = Side(setting, engine)
    examples = _examples(side.dataset, setting.histories)
    for at in range(0, len(examples), setting.batch_size):
        side.encode([e.history for e in examples[at : at + setting.batch_size]], False)
