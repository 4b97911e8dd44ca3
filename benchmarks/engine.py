"""Our frozen-LLM engine beside transformers' model, in one process, on real histories of amazon-scientific.

    python benchmarks/engine.py --json benchmarks/results/engine.json

Both read `[prefix][text][suffix]` of the same histories with the same trained parts; one step is the whole of Laser's:
ID states, M-Former, LLM, softmax over all items, backward. transformers gets what a plain implementation gives it:
batches in random order, padded to their longest; beside it the same batches sorted by length. Real tokens are counted,
padding is not. Run nothing else meanwhile.
"""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
from cyclopts import Parameter, run
from machine import peak_memory, product_peak, side_by_side, spread
from rich.console import Console
from rich.table import Table
from torch import Tensor

from laserrec.config import Config, Cuts, DataConfig, Engine, ItemTable, Precision, load_config, merge
from laserrec.data.dataset import Dataset
from laserrec.data.histories import Histories
from laserrec.data.prepare import prepare_source
from laserrec.data.prompt import PromptEncoder
from laserrec.experiments.machine import describe
from laserrec.llm.backbone import load_backbone
from laserrec.llm.precision import resolve_precision
from laserrec.llm.text_features import TextFeatures
from laserrec.methods.laser.build import compose
from laserrec.methods.laser.examples import LaserExamples, epoch_examples
from laserrec.methods.laser.losses import item_contrast, load_balance
from laserrec.methods.laser.model import Laser
from laserrec.methods.sasrec import SASRec
from laserrec.training.batching import batches, split_by_tokens
from laserrec.util.device import CPU
from laserrec.util.errors import UserError
from laserrec.util.io import write_json
from laserrec.util.progress import Progress

OURS, THEIRS, SORTED = "ours", "transformers", "transformers, batches sorted by length"
READING = "ours, texts read anew"
_FP32_TOLERANCE = 5e-4
"""Relative. Through 30 layers the prefix's gradient differs by 2.9e-5 on AVX-512 and by 1.03e-4 on AVX2."""


def _laser(config: Config, dataset: Dataset) -> Laser:
    """A fresh one on a fresh ID model: what its item table was started from makes no difference to the time."""
    id_model = SASRec(config.id_model.model_copy(update={"items": ItemTable.IDS}), dataset.n_items)
    features = TextFeatures(config.backbone, config.prompt, CPU, backbone=load_backbone(config.backbone))
    return compose(config, dataset.items, dataset.n_items, features, id_model.eval().requires_grad_(False)).eval()


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

    def config(self, engine: Engine, precision: Precision = Precision.AUTO, compiled: bool = True) -> Config:
        """The preset bi-tuning with the paper's layout, text budget and item side."""
        return load_config("bi-tuning", None, merge(
            {"prompt": {"layout": "prefix_first", "item_side": "trained", "max_item_tokens": 64},
             "head": {"whiten_dims": 0, "projection": False, "id_share": 0.0}, "neighbours": {"count": 0}},
            {"backbone": {"name": self.backbone, "layers": self.layers, "mean_layers": (), "engine": engine,
                          "precision": precision, "compiled": compiled and engine == Engine.NATIVE}}))


class Side:
    """One engine with everything around it; the same seed gives the same trained parts."""

    def __init__(self, setting: Setting, engine: Engine, precision: Precision = Precision.AUTO, compiled: bool = True,
                 dataset: Dataset | None = None):
        self.config = setting.config(engine, precision, compiled)
        self.dataset = dataset or Dataset.load(setting.data)
        torch.manual_seed(0)
        self.laser = _laser(self.config, self.dataset)
        self.reader = self.laser.reader
        # Started at zero, as in the preset, it would hide what the states do to the prefix.
        torch.nn.init.normal_(self.reader.mformer.projection.weight, std=0.02)
        self.items = torch.randn(self.dataset.n_items, self.reader.backbone.d_llm,
                                 generator=torch.Generator().manual_seed(1))

    def lengths(self, histories: Histories, as_item: bool = False) -> np.ndarray:
        """Real LLM tokens of each: prefix, text, suffix."""
        added = self.config.mformer.queries + 1
        return np.array([added + len(text) for text in self.reader.texts.texts(histories, as_item)])

    def step(self, histories: Histories, targets: Tensor) -> Tensor:
        """Forward and backward of one batch; the gradient is left in the parameters. Returns the users' outputs. Ours
        goes in passes of train.tokens_per_pass, as training does."""
        self.laser.zero_grad(set_to_none=True)
        parts = []
        for rows in self._passes(histories):
            users, route = self.reader.read(histories.take(rows))
            loss = item_contrast(users, self.items, targets[torch.as_tensor(rows)], 0.05) + 0.01 * load_balance(route)
            (loss * (len(rows) / len(histories))).backward()
            parts.append(users.detach())
        return torch.cat(parts)

    def _passes(self, histories: Histories) -> list[np.ndarray]:
        if not self.reader.backbone.native:
            return [np.arange(len(histories))]
        return split_by_tokens(self.lengths(histories).tolist(), self.config.train.tokens_per_pass)

    @torch.no_grad()
    def encode(self, histories: Histories, as_item: bool) -> Tensor:
        """Forward of one batch."""
        return self.reader.read_items(histories, plain=False) if as_item else self.reader.read(histories)[0]


def _plan(lengths: np.ndarray, size: int) -> dict[str, list[np.ndarray]]:
    order = np.random.default_rng(0).permutation(len(lengths))
    random = [order[at : at + size] for at in range(0, len(order), size)]
    return {OURS: random, THEIRS: random, SORTED: batches(lengths, size, (0,))}


def _check_equality(setting: Setting, dataset: Dataset) -> dict[str, float]:
    """Largest relative differences of outputs and of the prefix's and suffix's gradients, in float32 against
    transformers' own. Raises UserError beyond _FP32_TOLERANCE: times of unequal things mean nothing."""
    histories, targets = _examples(dataset, 5, some=np.arange(5))
    results = []
    for engine in (Engine.NATIVE, Engine.TRANSFORMERS):
        side = Side(setting, engine, Precision.FP32, dataset=dataset)
        users = side.step(histories, targets)
        results.append((users, side.reader.suffix.grad.clone(), side.reader.mformer.projection.weight.grad.clone()))
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
    weights = sum(b.numel() for layer in side.reader.backbone.decoder.layers for n, b in layer.named_buffers()
                  if b is not None and b.ndim == 2)
    return 2.0 * weights * tokens * (2 if backward else 1)


def _sides(setting: Setting, dataset: Dataset) -> tuple[Side, Side]:
    return tuple(Side(setting, e, dataset=dataset) for e in (Engine.NATIVE, Engine.TRANSFORMERS))


def bench_train(setting: Setting, progress: bool = True) -> dict[str, Any]:
    """Train steps over real histories, one random cut per user."""
    dataset = Dataset.load(setting.data)
    equality = _check_equality(setting, dataset)
    ours, theirs = _sides(setting, dataset)
    histories, targets = _examples(dataset, setting.histories)
    lengths = ours.lengths(histories)
    plan = _plan(lengths, setting.batch_size)

    def epoch(side: Side, chunks: list[np.ndarray]) -> Callable[[], None]:
        def work() -> None:
            for chunk in chunks:
                side.step(histories.take(chunk), targets[torch.as_tensor(chunk)])
        return work

    works = {name: epoch(ours if name == OURS else theirs, chunks) for name, chunks in plan.items()}
    tokens = int(lengths.sum())
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
    users, _ = _examples(dataset, setting.histories)
    items = _each(rng.choice(dataset.n_items, setting.items, replace=False))
    out: dict[str, Any] = {}
    for name, histories, as_item in (("users", users, False), ("items", items, True)):
        lengths = ours.lengths(histories, as_item)
        plan = _plan(lengths, setting.batch_size)

        def epoch(side: Side, chunks: list[np.ndarray], histories=histories, as_item=as_item) -> Callable[[], None]:
            def work() -> None:
                for chunk in chunks:
                    side.encode(histories.take(chunk), as_item)
            return work

        works = {n: epoch(ours if n == OURS else theirs, chunks) for n, chunks in plan.items()}
        tokens = int(lengths.sum())
        out[name] = _report(setting, works, tokens, _product_flops(ours, tokens, backward=False), progress,
                            f"encoding {name}")
    out["items_shared"] = _bench_shared_items(setting, dataset, progress)
    memory = {name: peak_memory(_one_encode, setting, engine)
              for name, engine in ((OURS, Engine.NATIVE), (THEIRS, Engine.TRANSFORMERS))}
    return {**out.pop("users"), **out, "peak_memory_gib": memory[OURS],
            "reference_peak_memory_gib": memory[THEIRS], "equality_float32": equality, **_settings_of(setting)}


def _bench_shared_items(setting: Setting, dataset: Dataset, progress: bool) -> dict[str, Any]:
    """Items read with no prefix and [EOS] as suffix. Ours reads the instruction once and every item behind it, once per
    fit; an epoch then costs one token per item. transformers reads all of it for every item and epoch. The same
    outputs, which is checked. `ratio` is an epoch's, `ratio_with_reading` a one-epoch fit's."""
    small = {"prompt": {"item_side": "plain", "max_item_tokens": 64}, "neighbours": {"count": 0},
             "head": {"whiten_dims": 0, "projection": False, "id_share": 0.0}}
    some = replace(dataset, items=dataset.items.sample(setting.items, seed=0))
    rows = torch.arange(setting.items)

    def laser(engine: Engine, precision: Precision, layout: str) -> Laser:
        backbone = setting.config(engine, precision).backbone.model_dump()
        changes = merge(small, {"prompt": {"layout": layout}, "backbone": backbone})
        return _laser(load_config("bi-tuning", None, changes), some)

    def ours(mine: Laser) -> Tensor:
        return torch.cat([mine.item_outputs(part) for part in rows.split(setting.batch_size)])

    @torch.no_grad()
    def theirs(reference: Laser) -> Tensor:
        parts = rows.split(setting.batch_size)
        return torch.cat([reference.reader.read_items(_each(part), plain=True) for part in parts])

    def both(precision: Precision) -> tuple[Laser, Laser]:
        mine, reference = laser(Engine.NATIVE, precision, "text_first"), laser(Engine.TRANSFORMERS, precision,
                                                                               "prefix_first")
        reference.reader.texts.prompt = mine.reader.texts.prompt  # the same words: items without a number
        return mine, reference

    mine, reference = both(Precision.FP32)
    exact = theirs(reference)
    error = float((ours(mine) - exact).abs().max() / exact.abs().max())
    if error > _FP32_TOLERANCE:
        raise UserError(f"shared reading of items is not transformers' on this machine: {error}; nothing was timed")
    mine, reference = both(Precision.AUTO)
    tokens = sum(len(text) + 1 for text in mine.reader.texts.texts(_each(rows), True))
    works = {OURS: lambda: ours(mine), THEIRS: lambda: theirs(reference),
             READING: lambda: ours(laser(Engine.NATIVE, Precision.AUTO, "text_first"))}
    result = _report(setting, works, tokens, 0.0, progress, "encoding items, texts read before")
    result["ratio_with_reading"] = (result["times"][THEIRS]["minimum_seconds"]
                                    / result["times"][READING]["minimum_seconds"])
    return {k: v for k, v in result.items() if "peak_share" not in k} | {"equality_float32": error}


def tokens_per_epoch(setting: Setting) -> dict[str, int]:
    """LLM tokens an epoch of training and item encoding takes, by scheme."""
    dataset = Dataset.load(setting.data)
    side, config = Side(setting, Engine.NATIVE, compiled=False, dataset=dataset), load_config("bi-tuning")
    items = side.lengths(_each(np.arange(dataset.n_items)), as_item=True).sum()
    everyone, one = (_histories(dataset, *epoch_examples(dataset.train_sequences, cuts, (0,)))[0]
                     for cuts in (Cuts.ALL, Cuts.RANDOM))
    prompt = PromptEncoder(side.reader.backbone.tokenizer, config.prompt)
    text = len(prompt.instruction) + sum(len(prompt.block(t)) for t in prompt.item_tokens(dataset.items))
    added = config.mformer.queries + 1
    counts = {"per_position": side.lengths(everyone).sum() + items, "random_cut": side.lengths(one).sum() + items,
              "ours": added * len(everyone), "ours_random_cut": added * len(one), "ours_once_per_fit": text}
    return {name: int(count) for name, count in counts.items()}


def bench_engine(setting: Setting, progress: bool = True) -> dict[str, Any]:
    """All of it, as kept in benchmarks/results/engine.json."""
    return {"machine": describe(), "train": bench_train(setting, progress), "encode": bench_encode(setting, progress),
            "tokens_per_epoch": tokens_per_epoch(setting)}


def _examples(dataset: Dataset, count: int, some: np.ndarray | None = None) -> tuple[Histories, Tensor]:
    """Histories and targets of random cuts, one per user; `some` of them, else `count` drawn ones."""
    of, cut = epoch_examples(dataset.train_sequences, Cuts.RANDOM, (0,))
    if count > len(of):
        raise UserError(f"the data folder has {len(of)} users with two or more training items, not {count}")
    some = np.random.default_rng(1).choice(len(of), count, replace=False) if some is None else some
    return _histories(dataset, of[torch.as_tensor(some)], cut[torch.as_tensor(some)])


def _histories(dataset: Dataset, of: Tensor, cut: Tensor) -> tuple[Histories, Tensor]:
    batch = LaserExamples(dataset.train_sequences, of, cut, np.ones(len(of), int), 0.0).batch(np.arange(len(of)))
    return batch.histories, batch.targets


def _each(rows: np.ndarray | Tensor) -> Histories:
    """A history of one item for each."""
    return Histories(torch.as_tensor(rows), torch.arange(1, len(rows) + 1))


def _settings_of(setting: Setting) -> dict[str, Any]:
    return {"layers": setting.layers, "batch_size": setting.batch_size, "histories": setting.histories}


def _one_train_step(setting: Setting, engine: Engine) -> None:
    side = Side(setting, engine)
    histories, targets = _examples(side.dataset, setting.histories)
    for part in torch.arange(len(histories)).split(setting.batch_size):
        side.step(histories.take(part), targets[part])


def _one_encode(setting: Setting, engine: Engine) -> None:
    side = Side(setting, engine)
    histories, _ = _examples(side.dataset, setting.histories)
    for part in torch.arange(len(histories)).split(setting.batch_size):
        side.encode(histories.take(part), False)


# -- the command ----------------------------------------------------------------------------------------------------

def _print(title: str, result: dict[str, Any]) -> None:
    table = Table("", "tokens/s", "minimum s", "median s", "of peak", "memory", title=title)
    names = list(result["times"])
    for name in names:
        times = result["times"][name]
        share, memory = {names[0]: ("peak_share", "peak_memory_gib"),
                         names[1]: ("reference_peak_share", "reference_peak_memory_gib")}.get(name, ("", ""))
        table.add_row(name, f"{result['real_tokens'] / times['minimum_seconds']:,.0f}",
                      f"{times['minimum_seconds']:.2f}", f"{times['median_seconds']:.2f}",
                      f"{result[share]:.0%}" if share in result else "",
                      f"{result[memory]:.2f} GiB" if memory in result else "")
    console = Console()
    console.print(table)
    console.print(f"ratio {result['ratio']:.2f} (medians {result['ratio_of_medians']:.2f}; to the fastest reference "
                  f"{result['ratio_to_fastest_reference']:.2f}); {result['real_tokens']:,} real tokens, products' peak "
                  f"{result['product_peak_gflops']:.0f} GFLOP/s; compiling took {result['compile_seconds']:.0f} s, "
                  "once", highlight=False, soft_wrap=True)


def main(data: Path | None = None, *, backbone: str = "smollm2-135m", layers: int | None = None, batch_size: int = 16,
         histories: int = 32, items: int = 96, runs: int = 7, threads: int | None = None, quiet: bool = False,
         json_file: Annotated[Path | None, Parameter(name="--json")] = None) -> None:
    """Time train steps and encoding, after checking that both engines agree, and count LLM tokens per epoch.

    Parameters
    ----------
    data
        A data folder; else amazon-scientific is prepared for it.
    backbone
        The LLM, as backbone.name.
    layers
        Use only the first so many layers of the LLM.
    batch_size
        Histories or items per step.
    histories
        Histories in all.
    items
        Items in all, where items are encoded.
    runs
        Timed runs of each side, in turn.
    threads
        Threads of torch; else its own choice.
    quiet
        No progress.
    json_file
        Write the numbers to this file.
    """
    if threads:
        torch.set_num_threads(threads)
    with tempfile.TemporaryDirectory(prefix="laserrec-bench-") as scratch:
        if data is None:
            prepare_source("amazon-scientific", data := Path(scratch) / "data", DataConfig())
        result = bench_engine(Setting(data, layers, backbone, batch_size, histories, items, runs), not quiet)
    if json_file is not None:
        write_json(json_file, result)
    for title, part in (("train step", result["train"]), ("encoding users", result["encode"]),
                        ("encoding items", result["encode"]["items"]),
                        ("encoding items, texts read before", result["encode"]["items_shared"])):
        _print(title, part)
    for name, count in result["tokens_per_epoch"].items():
        print(f"LLM tokens, {name}: {count:,}")


if __name__ == "__main__":
    run(main)
