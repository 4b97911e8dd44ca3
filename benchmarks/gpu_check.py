"""What a GPU changes: results against the CPU's, speed beside transformers' own forward, and peak memory.

Parity of outputs and gradients (whole texts, new tokens behind cached text, mean outputs) and of one short fit; then
tokens per second and memory of our decoder and of transformers' model, in the precision that `auto` measures. The LLM
is the default one if it was fetched, else one of the same shape with random weights, so that no network is needed.
Fails where a result is further from the CPU's than rounding explains.

Without a GPU it says so and runs the tests that pretend to have one.

  make gpu-check          # or: python benchmarks/gpu_check.py --out benchmarks/results/gpu_check.json
"""

from __future__ import annotations

import argparse
import gc
import subprocess
import sys
import tempfile
from collections.abc import Callable
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
FP32_ERROR = 1e-3
"""Largest difference over the largest value that products summed in another order explain."""
BF16_RATIO = 1.25
"""Our error in bf16 over transformers' own."""
FIT_ERROR = 0.02
"""Relative difference of the losses of a short fit."""
NEW_TOKENS = 33
"""The preset small's prefix and suffix."""
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


def read_texts(backbone: Backbone, tokens: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Outputs at the last token of whole texts, and their gradient at all embeddings."""
    rows = backbone.embed(torch.cat(tokens)).float().clone().requires_grad_()
    outputs = backbone.decoder.read_rows(rows.split([len(t) for t in tokens]), last_only=True)
    outputs.square().mean().backward()
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
    outputs.square().mean().backward()
    return outputs.detach(), new.grad


# -- parity ---------------------------------------------------------------------------------------------------------


def parity(llm: Llm, device: torch.device) -> dict[str, Any]:
    """Relative differences from the CPU in fp32; in bf16 our root mean square error over transformers' own."""
    own, there = llm.load(CPU, "fp32"), llm.load(device, "fp32")
    found: dict[str, Any] = {}
    for name, compute in (("texts", lambda b: read_texts(b, llm.tokens(b))),
                          ("behind a cache", lambda b: read_behind(b, cached(b, llm.tokens(b))))):
        ours, theirs = compute(there), compute(own)
        found |= {f"{name}: {what}": largest(a.cpu(), b)
                  for what, a, b in zip(("outputs", "gradients"), ours, theirs, strict=True)}
    means = [TextFeatures(b.config, PromptConfig(), b.device, backbone=b).vectors(llm.items[:256]).cpu()
             for b in (there, own)]
    alike = torch.nn.functional.cosine_similarity(*means).min()
    exact, _ = read_texts(own, llm.tokens(own))
    errors = {}
    for engine in ("native", "transformers"):
        rough, _ = read_texts(half := llm.load(device, "bf16", engine), llm.tokens(half))
        errors[engine] = float((rough.cpu() - exact).square().mean().sqrt())
    ratio = errors["native"] / errors["transformers"]
    return {"fp32": found, "whitened vectors: lowest cosine": float(alike), "bf16 error over transformers'": ratio,
            "passed": max(found.values()) < FP32_ERROR and bool(alike > 0.999) and ratio < BF16_RATIO}


def largest(ours: Tensor, theirs: Tensor) -> float:
    return float((ours - theirs).abs().max() / theirs.abs().max())


def short_fit(llm: Llm, device: torch.device) -> dict[str, Any]:
    """Laser on users who walk up a small catalogue: losses on the CPU and on the device, without dropout."""
    draw, losses, times = np.random.default_rng(1), {}, {}
    walks = [[(start + step) % 60 for step in range(8)] for start in draw.integers(0, 60, 120)]
    rows = [(f"u{u}", f"i{i}", at) for u, walk in enumerate(walks) for at, i in enumerate(walk)]
    raw = from_frames(pl.DataFrame(rows, schema=["user_id", "item_id", "timestamp"], orient="row"), catalogue(60))
    config = load_config("small", None, {
        "data": {"min_item_interactions": 1}, "id_model": {"max_epochs": 2, "dropout": 0.0},
        "backbone": {"name": str(llm.folder), "precision": "fp32", "layers": 2, "mean_layers": [2]},
        "prompt": {"max_items": 4}, "mformer": {"dropout": 0.0}, "head": {"whiten_dims": 32, "dropout": 0.0},
        "train": {"stage_one_epochs": 2, "stage_two_epochs": 1, "batch_size": 32}})
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


def speed(llm: Llm, device: torch.device) -> dict[str, Any]:
    """Tokens per second and peak memory in the precision that is measured as the faster."""
    precision = str(resolve_precision(Precision.AUTO, device))
    rows: dict[str, Any] = {"precision": precision}
    for name, settings in (("ours", {}), ("ours, compiled", {"compiled": True}),
                           ("transformers", {"engine": "transformers"})):
        try:
            rows[name] = measured(llm, llm.load(device, precision, **settings))
        except RuntimeError as error:  # no compiler, or too little memory: the others still count
            rows[name] = {"failed": str(error).splitlines()[0]}
    return rows


def measured(llm: Llm, backbone: Backbone) -> dict[str, Any]:
    tokens = llm.tokens(backbone)
    count, rows = sum(map(len, tokens)), backbone.embed(torch.cat(tokens)).split([len(t) for t in tokens])

    @torch.no_grad()
    def forward() -> None:
        backbone.decoder.read_rows(rows, last_only=False)

    out = {"forward": timed(forward, count, backbone.device),
           "forward and backward": timed(lambda: read_texts(backbone, tokens), count, backbone.device)}
    if backbone.native:
        past = cached(backbone, tokens)
        out["new tokens behind a cache, forward and backward"] = timed(
            lambda: read_behind(backbone, past), len(tokens) * NEW_TOKENS, backbone.device)
    return out


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
    more = {} if np.isnan(peak) else {"peak_gib": peak}
    return {"tokens_per_second": tokens / times["median_seconds"], **times, **more}


# -- the whole ------------------------------------------------------------------------------------------------------


def pretend() -> int:
    """The tests that run real code on a device that is only pretended."""
    print("no GPU here: running the tests on a pretended device; run this again on a machine with one", flush=True)
    files = sorted(str(f) for f in (ROOT / "tests").rglob("test_*.py") if "from devices import" in f.read_text("utf-8"))
    return subprocess.run([sys.executable, "-m", "pytest", "-q", *files], cwd=ROOT).returncode


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="auto", help="auto, cuda, cuda:N, mps; cpu compares the CPU with itself")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "gpu_check.json")
    parser.add_argument("--texts", type=int, default=512, help="item texts per batch")
    parser.add_argument("--layers", type=int, default=30, help="of the random LLM")
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
        for name, check in (("parity", parity), ("fit", short_fit), ("speed", speed)):
            found[name] = check(llm, device)
            print(name, found[name], flush=True)
    passed = found["parity"]["passed"] and found["fit"]["passed"]
    write_json(given.out, found)
    print(f"{card}: {'as the CPU' if passed else 'NOT as the CPU'}; {given.out}")
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
