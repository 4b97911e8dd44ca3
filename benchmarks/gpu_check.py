"""What a GPU changes: results against the CPU's, speed beside transformers' own forward, and peak memory.

parity  outputs and gradients of whole texts and of new tokens behind cached text, mean outputs; in bf16 beside what
        transformers' own forward is off
fit     losses of a short fit
speed   tokens per second, kernels and memory of our decoder and of transformers' model, in the precision that `auto`
        measures: for short texts and for a training batch of histories

The LLM is the default one if it was fetched, else one of the same shape with random weights, so that no network is
needed. Fails where a result is further from the CPU's than rounding explains.

Without a GPU it says so and runs the tests that pretend to have one.

  make gpu-check          # or: python benchmarks/gpu_check.py --only speed --out benchmarks/results/gpu_check.json
"""

from __future__ import annotations

import argparse
import gc
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import torch
from machine import seconds, spread
from torch import Tensor

from laserrec.config import BackboneConfig, Precision, PromptConfig, load_config
from laserrec.data.dataset import Dataset
from laserrec.data.prepare import prepare
from laserrec.data.raw import from_frames
from laserrec.experiments.machine import describe
from laserrec.llm import varlen
from laserrec.llm.attention import Past, TextCache
from laserrec.llm.backbone import Backbone, load_backbone
from laserrec.llm.fetch import default_folder, is_fetched
from laserrec.llm.precision import resolve_precision
from laserrec.llm.text_features import TextFeatures
from laserrec.recommender.fitting import fit
from laserrec.util.device import CPU, choose, move
from laserrec.util.io import write_json

ROOT = Path(__file__).parents[1]
SMOLLM2 = {"hidden_size": 576, "intermediate_size": 1536, "num_attention_heads": 9, "num_key_value_heads": 3}
WORDS = ("steel", "hammer", "cordless", "drill", "oak", "shelf", "garden", "hose", "paint", "brush", "lamp", "cable")
FP32_ERROR = 1e-4
"""Largest difference over the largest value that products summed in another order explain: a relative change of the
embeddings by 1e-6 makes 3e-6 of outputs and of gradients."""
BF16_RATIO = 1.25
"""Our error in bf16 over transformers' own."""
BF16_CACHED_RATIO = 1.5
"""Our relative error in bf16 behind a cache over transformers' for whole texts."""
FIT_ERROR = 5e-4
"""Relative difference of the losses of a short fit; a change of all LLM weights by 1e-6 makes 3e-4 of a step's at
most."""
HISTORIES, HISTORY_TOKENS = 128, (100, 200)
"""A training batch."""
NEW_TOKENS = 33
"""The preset bi-tuning's prefix and suffix."""
RUNS = 10


# -- what is measured on --------------------------------------------------------------------------------------------


def catalogue(n: int) -> pl.DataFrame:
    """Titles of 3 to 30 words."""
    draw = np.random.default_rng(0)
    titles = [" ".join(draw.choice(WORDS, draw.integers(3, 30))) + f" {i}" for i in range(n)]
    return pl.DataFrame({"item_id": [f"i{i}" for i in range(n)], "title": titles})


def random_llm(folder: Path, layers: int) -> Path:
    """SmolLM2-135M's shape, random weights, and a byte-level tokenizer made from the catalogue."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    core = Tokenizer(models.BPE())
    core.pre_tokenizer, core.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    core.train_from_iterator(catalogue(200)["title"], trainers.BpeTrainer(
        vocab_size=1000, special_tokens=["<eos>"], show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<eos>").save_pretrained(folder)
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**SMOLLM2, vocab_size=core.get_vocab_size(), num_hidden_layers=layers)
                     ).save_pretrained(folder)
    return folder


class Llm:
    """One LLM's folder, loaded as it is asked for."""

    def __init__(self, folder: Path, texts: int):
        self.folder, self.items = folder, catalogue(texts)

    def load(self, device: torch.device, precision: str, engine: str = "native", **more: Any) -> Backbone:
        return load_backbone(self.config(precision, engine=engine, **more), device)

    def config(self, precision: str, **more: Any) -> BackboneConfig:
        return BackboneConfig(name=str(self.folder), precision=precision, **more)

    def tokens(self, backbone: Backbone) -> list[Tensor]:
        """Token ids of each item's text, on the device."""
        lists = backbone.tokenizer(self.items["title"].to_list())["input_ids"]
        return list(backbone.tokens(np.concatenate(lists)).split([len(ids) for ids in lists]))


# -- what is computed -----------------------------------------------------------------------------------------------


@cache
def weights(shape: torch.Size, device: torch.device) -> Tensor:
    """Of the outputs in a loss. A sum of squares would be constant behind an RMS norm, and its gradient rounding."""
    return move(torch.randn(shape, generator=torch.Generator().manual_seed(0)), device)


def read_texts(backbone: Backbone, tokens: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Outputs at the last token of whole texts, and their gradient at all embeddings."""
    rows = backbone.embed(torch.cat(tokens)).float().clone().requires_grad_()
    outputs = backbone.decoder.read_rows(rows.split([len(t) for t in tokens]), last_only=True)
    (outputs * weights(outputs.shape, outputs.device)).sum().backward()
    return outputs.detach(), rows.grad


def cached(backbone: Backbone, tokens: list[Tensor]) -> Past:
    """Each text's keys and values, to be read before new tokens."""
    length = torch.tensor([len(t) for t in tokens])
    embeds = backbone.embed(torch.nn.utils.rnn.pad_sequence(tokens, batch_first=True))
    keys, values = (t.flatten(1, 2) for t in backbone.decoder.encode_text(embeds))
    index = torch.arange(embeds.shape[0] * embeds.shape[1]).view(embeds.shape[:2])
    return Past(TextCache(keys, values), move(index, backbone.device), move(length, backbone.device))


def read_behind(backbone: Backbone, past: Past) -> tuple[Tensor, Tensor]:
    """Outputs at the last of 33 new tokens behind each cached text, and their gradient at the new tokens."""
    ids = torch.arange(len(past.length) * NEW_TOKENS) % len(backbone.embedding)
    new = backbone.embed(move(ids, backbone.device)).float().clone().requires_grad_()
    outputs = backbone.decoder.read(new, backbone.decoder.behind(past, NEW_TOKENS), last_only=True)
    (outputs * weights(outputs.shape, outputs.device)).sum().backward()
    return outputs.detach(), new.grad


# -- parity ---------------------------------------------------------------------------------------------------------


def parity(llm: Llm, device: torch.device) -> dict[str, Any]:
    """Relative differences from the CPU in fp32; in bf16 our root mean square error over transformers' own."""
    own, there = llm.load(CPU, "fp32"), llm.load(device, "fp32")
    half, theirs = llm.load(device, "bf16"), llm.load(device, "bf16", "transformers")
    fp32, bf16 = {}, {}
    exact = read_texts(own, llm.tokens(own))
    behind = read_behind(own, cached(own, llm.tokens(own)))
    got = read_texts(there, llm.tokens(there)), read_behind(there, cached(there, llm.tokens(there)))
    rough = read_texts(half, llm.tokens(half)), read_behind(half, cached(half, llm.tokens(half)))
    reference = read_texts(theirs, llm.tokens(theirs))
    for i, what in enumerate(("outputs", "gradients")):
        fp32 |= {f"texts: {what}": largest(got[0][i].cpu(), exact[i]),
                 f"behind a cache: {what}": largest(got[1][i].cpu(), behind[i])}
        unit = relative(reference[i].cpu(), exact[i])
        bf16 |= {f"texts: {what}": relative(rough[0][i].cpu(), exact[i]) / unit,
                 f"behind a cache: {what}": relative(rough[1][i].cpu(), behind[i]) / unit,
                 f"transformers' own relative error of {what}": unit}
    means = [TextFeatures(b.config, PromptConfig(), b.device, backbone=b).vectors(llm.items[:256]).cpu()
             for b in (there, own)]
    real = means[1].square().sum(dim=1) > 0
    alike = float(torch.nn.functional.cosine_similarity(*means)[real].min())
    passed = (max(fp32.values()) < FP32_ERROR and alike > 0.999
              and all(bf16[f"texts: {what}"] < BF16_RATIO for what in ("outputs", "gradients"))
              and all(bf16[f"behind a cache: {what}"] < BF16_CACHED_RATIO for what in ("outputs", "gradients")))
    return {"fp32": fp32, "whitened vectors: lowest cosine": alike, "bf16 error over transformers'": bf16,
            "attention without padding": varlen.usable(device, torch.bfloat16, *heads(half)), "passed": passed}


def heads(backbone: Backbone) -> tuple[int, int, int]:
    shape = backbone.decoder.shape
    return shape.heads, shape.kv_heads, shape.head_dim


def relative(ours: Tensor, exact: Tensor) -> float:
    """Root mean square error over the root mean square."""
    return float((ours.float() - exact).square().mean().sqrt() / exact.square().mean().sqrt())


def largest(ours: Tensor, theirs: Tensor) -> float:
    return float((ours - theirs).abs().max() / theirs.abs().max())


def short_fit(llm: Llm, device: torch.device) -> dict[str, Any]:
    """Laser on users who walk up a small catalogue: losses on the CPU and on the device, without dropout."""
    draw, losses, times = np.random.default_rng(1), {}, {}
    walks = [[(start + step) % 60 for step in range(8)] for start in draw.integers(0, 60, 120)]
    rows = [(f"u{u}", f"i{i}", at) for u, walk in enumerate(walks) for at, i in enumerate(walk)]
    raw = from_frames(pl.DataFrame(rows, schema=["user_id", "item_id", "timestamp"], orient="row"), catalogue(60))
    config = load_config("bi-tuning", None, {
        "data": {"min_item_interactions": 1}, "id_model": {"max_epochs": 2, "dropout": 0.0},
        "backbone": {"name": str(llm.folder), "precision": "fp32", "layers": 2, "mean_layers": [2]},
        "prompt": {"max_items": 4}, "mformer": {"dropout": 0.0}, "head": {"whiten_dims": 32, "dropout": 0.0},
        "train": {"stage_one_epochs": 2, "stage_two_epochs": 1, "batch_size": 32, "lr": 3e-4},
        "eval": {"validates": False}})  # the best epoch is another one where a hair's breadth decides
    with tempfile.TemporaryDirectory() as scratch:
        prepare(raw.interactions, raw.items, config.data, Path(scratch) / "data", notes=raw.notes)
        dataset = Dataset.load(Path(scratch) / "data")
        for place in (CPU, device):
            folder = Path(scratch) / f"model-{len(losses)}"
            times[str(place)] = seconds(lambda p=place, f=folder: losses.update(
                {len(losses): fit("laser", dataset, config, f, p, progress=False).log}))
    both = [[e["loss"] for e in log if e.get("loss")] for log in losses.values()]
    error = max(abs(a - b) / abs(b) for a, b in zip(*reversed(both), strict=True))
    return {"losses": dict(zip(("cpu", "device"), both, strict=True)), "seconds": times, "error": error,
            "passed": error < FIT_ERROR}


# -- speed ----------------------------------------------------------------------------------------------------------


def speed(llm: Llm, device: torch.device, compiled: bool = False) -> dict[str, Any]:
    """Tokens per second and peak memory in the precision that is measured as the faster."""
    precision = str(resolve_precision(Precision.AUTO, device))
    rows: dict[str, Any] = {"precision": precision}
    for name, settings in (("ours", {}), ("ours, compiled", {"compiled": True}),
                           ("transformers", {"engine": "transformers"})):
        if "compiled" in settings and not compiled:
            continue
        try:
            rows[name] = measured(llm, llm.load(device, precision, **settings))
        except RuntimeError as error:  # no compiler, or too little memory: the others still count
            rows[name] = {"failed": str(error).splitlines()[0]}
    return rows


def measured(llm: Llm, backbone: Backbone) -> dict[str, Any]:
    """Of each batch forward, forward and backward, and 33 new tokens per text behind a cache."""
    out: dict[str, Any] = {}
    for batch, tokens in ((f"{len(llm.items)} short texts", llm.tokens(backbone)),
                          (f"{HISTORIES} histories", histories(backbone))):
        count, rows = sum(map(len, tokens)), backbone.embed(torch.cat(tokens)).split([len(t) for t in tokens])

        @torch.no_grad()
        def forward(rows: Sequence[Tensor] = rows) -> None:
            backbone.decoder.read_rows(rows, last_only=False)

        out[f"{batch}, forward"] = timed(forward, count, backbone.device)
        out[f"{batch}, forward and backward"] = timed(lambda t=tokens: read_texts(backbone, t), count, backbone.device)
        if backbone.native:
            past = cached(backbone, tokens)
            out[f"{batch} cached, {NEW_TOKENS} new tokens each, forward and backward"] = timed(
                lambda p=past: read_behind(backbone, p), len(tokens) * NEW_TOKENS, backbone.device)
    return out


def histories(backbone: Backbone) -> list[Tensor]:
    """Token ids as long as users' histories."""
    draw = np.random.default_rng(2)
    lengths = draw.integers(*HISTORY_TOKENS, HISTORIES)
    ids = backbone.tokens(draw.integers(0, len(backbone.embedding), lengths.sum()))
    return list(ids.split(lengths.tolist()))


def timed(work: Callable[[], object], tokens: int, device: torch.device) -> dict[str, float]:
    def once() -> None:
        work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    for _ in range(3):
        once()
    gc.collect()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    times = spread([seconds(once) for _ in range(RUNS)])
    peak = torch.cuda.max_memory_allocated(device) / 2**30 if device.type == "cuda" else float("nan")
    more = {} if np.isnan(peak) else {"peak_gib": peak, **kernels(once)}
    return {"tokens_per_second": tokens / times["median_seconds"], **times, **more}


def kernels(work: Callable[[], object]) -> dict[str, float]:
    """How many, and their seconds: where these are far below the whole's, launching them is what takes the time."""
    from torch.autograd import DeviceType
    from torch.profiler import ProfilerActivity, profile

    try:
        with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as found:
            work()
        there = [event for event in found.events() if event.device_type == DeviceType.CUDA]
    except RuntimeError:  # no right to profile
        return {}
    return {"kernels": len(there), "kernel_seconds": sum(event.time_range.elapsed_us() for event in there) / 1e6}


# -- the whole ------------------------------------------------------------------------------------------------------


def pretend() -> int:
    """The tests that run real code on a device that is only pretended."""
    print("no GPU here: running the tests on a pretended device; run this again on a machine with one", flush=True)
    files = sorted(str(f) for f in (ROOT / "tests").rglob("test_*.py") if "from devices import" in f.read_text("utf-8"))
    return subprocess.run([sys.executable, "-m", "pytest", "-q", *files], cwd=ROOT).returncode


CHECKS: dict[str, Callable[..., dict[str, Any]]] = {"parity": parity, "fit": short_fit, "speed": speed}


def table(found: dict[str, Any]) -> str:
    """The result on one screen."""
    lines = [f"{found['card']}, torch {found['machine']['torch']}, {found['llm']}"]
    if parity := found.get("parity"):
        groups = ("fp32", "bf16 error over transformers'")
        numbers = {f"{group}, {name}": value for group in groups for name, value in parity[group].items()}
        lines += [f"  {name:<72}{value:10.2g}" for name, value in numbers.items()]
        lines += [f"  {name:<72}{parity[name]:10.6g}" for name in
                  ("whitened vectors: lowest cosine", "attention without padding")]
    if fitted := found.get("fit"):
        lines.append(f"  {'fit: difference of losses':<72}{fitted['error']:10.2g}")
    theirs = found.get("speed", {}).get("transformers", {})
    for engine, rows in found.get("speed", {}).items():
        if not isinstance(rows, dict):
            continue
        lines.append(f"  {engine}, {found['speed']['precision']}: {rows.get('failed', '')}")
        for name, row in rows.items():
            if isinstance(row, dict):
                speed, time = row["tokens_per_second"], 1e3 * row["median_seconds"]
                lines.append(f"    {name:<62}{speed:>9.0f} tokens/s{time:8.1f} ms{_beside(row, theirs.get(name))}")
    return "\n".join(lines)


def _beside(row: dict[str, float], theirs: dict[str, float] | None) -> str:
    """Kernels and memory of a row, and its speed beside transformers'."""
    out = ""
    if "kernels" in row:
        out += f" {row['kernels']:5.0f} kernels in {1e3 * row['kernel_seconds']:.1f} ms"
    if "peak_gib" in row:
        out += f" {row['peak_gib']:5.1f} GiB"
    return out + (f" {row['tokens_per_second'] / theirs['tokens_per_second']:5.2f} x transformers'" if theirs else "")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="auto", help="auto, cuda, cuda:N, mps; cpu compares the CPU with itself")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "gpu_check.json")
    parser.add_argument("--texts", type=int, default=512, help="item texts per batch")
    parser.add_argument("--layers", type=int, default=30, help="of the random LLM")
    parser.add_argument("--only", choices=list(CHECKS), help="one of the checks")
    parser.add_argument("--compiled", action="store_true", help="measure backbone.compiled too")
    given = parser.parse_args()
    device = choose(given.device)
    if device == CPU and given.device == "auto":
        return pretend()
    card = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    with tempfile.TemporaryDirectory() as scratch:
        folder = default_folder() if is_fetched() else random_llm(Path(scratch) / "llm", given.layers)
        llm = Llm(folder, given.texts)
        found = {"card": card, "cuda": torch.version.cuda, "machine": describe(), "texts": given.texts,
                 "llm": "smollm2-135m" if is_fetched() else f"random weights, {given.layers} layers of SmolLM2-135M's"}
        for name in [given.only] if given.only else CHECKS:
            more = {"compiled": given.compiled} if name == "speed" else {}
            found[name] = CHECKS[name](llm, device, **more)
            print(name, found[name], flush=True)
            write_json(given.out, found)
    passed = all(found[name].get("passed", True) for name in CHECKS if name in found)
    print(table(found))
    print(f"{card}: {'as the CPU' if passed else 'NOT as the CPU'}; {given.out}")
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
