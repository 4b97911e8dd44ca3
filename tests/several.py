"""What test_distributed.py starts in two processes: fits that leave what they found in files.

torchrun --nproc-per-node 2 tests/several.py LLM_FOLDER STEPS_FOLDER OUT
"""

import contextlib
import io
import json
import os
import signal
import sys
from pathlib import Path

import numpy as np
import tiny
import torch

from laserrec.cli import main as cli
from laserrec.config import BackboneConfig
from laserrec.llm.backbone import load_backbone
from laserrec.methods.laser import texts
from laserrec.methods.laser.task import LaserTask
from laserrec.util import checkpoint
from laserrec.util.distributed import World, join

COMMON = {"head": {"projection": True, "whiten_dims": 8, "seen_offset": True, "id_share": 0.3},
          "mformer": {"dropout": 0.0, "state_dropout": 0.3, "routing": "gate_scaled"}}
QUICK = {"batch_size": 5, "stage_one_epochs": 2, "stage_two_epochs": 1, "weight_decay": 0.1, "lr": 1e-3}
SETTINGS = {  # what is shared out differs between the layouts
    "prefix_first": {**COMMON, "train": {**QUICK, "tokens_per_pass": 12}},
    "text_first": {**COMMON, "train": {**QUICK, "item_gradient": True, "history_negatives": False},
                   "prompt": {"layout": "text_first", "item_side": "plain"}},
    "mean": {**COMMON, "train": {**QUICK, "item_gradient": True}, "neighbours": {"count": 4, "l2": 1.0},
             "prompt": {"layout": "text_first", "item_side": "mean"}},
    "learned": {"mformer": {"prefix": "learned"}, "train": {**QUICK, "stage_one_epochs": 1}},
}
SHARDED = {**COMMON, "train": {**QUICK, "tokens_per_pass": 12}}
SHARDS = {"sharded": {}, "sharded-recomputed": {"gradient_checkpointing": True, "layers": 2}}
USERS = 7  # 26 examples: the last batch is one example, too few for two processes; the others do not divide evenly


def quick_fit(llm, folder: Path, world: World, sections: dict, users: int = USERS):
    fit = tiny.trainer(llm, folder, tiny.planted(10, users=users), world=world, **sections)
    begin = fit._begin_phase

    def steadier():
        begin()
        for group in fit.optimizer.param_groups:
            group["eps"] = 1e-4  # Adam's own would turn the rounding of a gradient of zero into a whole step
    fit._begin_phase = steadier
    return fit


def found(fit) -> dict[str, torch.Tensor]:
    """All that must be equal, whatever the number of processes."""
    numbers = [[e["loss"] or 0.0, *(v for k, v in e.items() if k.startswith("validation_"))] for e in fit.log]
    return {**fit.best, "log": torch.tensor(numbers, dtype=torch.float64)}


def equal_fits(llm, out: Path, world: World) -> None:
    for name, sections in SETTINGS.items():
        fit = quick_fit(llm, out / name, world, sections)
        fit.run()
        checkpoint.save(out / f"{name}-{world.rank}.safetensors", found(fit))


def first_gradients(llm, out: Path, world: World) -> None:
    for name, sections in SETTINGS.items():
        fit = quick_fit(llm, out / f"{name}-gradient", world, sections)
        checkpoint.save(out / f"{name}-gradient-{world.rank}.safetensors", gradients(fit))


def gradients(fit) -> dict[str, torch.Tensor]:
    """Of one step on seven examples, before any weight moved."""
    fit._begin_phase()
    task, index = fit.phase.task, np.arange(7)
    task.start(lambda: None)
    fit.optimizer.step = lambda: None
    examples = task.begin_epoch(1)
    torch.manual_seed(6)
    fit._step(examples.batch(index), examples.lengths[index])
    given = {n: p.grad for n, p in task.module.named_parameters() if p.grad is not None}
    return {**given, "loss": fit._loss.detach()}


def stopped(llm, out: Path, world: World) -> None:
    """SIGTERM reaches the second process alone, in the midst of a step; where did each one stop?"""
    fit = quick_fit(llm, out / "stopped", world, SETTINGS["prefix_first"])
    step, calls = fit._step, []

    def counted(batch, lengths):
        calls.append(len(lengths))
        if world.rank == 1 and len(calls) == 8:
            signal.raise_signal(signal.SIGTERM)
        return step(batch, lengths)

    fit._step = counted
    try:
        fit.run()
    except KeyboardInterrupt:
        (out / f"stopped-{world.rank}.json").write_text(json.dumps({"calls": len(calls), "steps": fit.place.step}))


def resumed(llm, out: Path, world: World) -> None:
    """What one process left (test_distributed made it), two finish."""
    fit = quick_fit(llm, out / "one-then-two", world, SETTINGS["text_first"])
    fit.run()
    checkpoint.save(out / f"one-then-two-{world.rank}.safetensors", found(fit))


def masks(llm, out: Path, world: World) -> None:
    """Dropout differs between the processes, everything else they draw is the same."""
    fit = quick_fit(llm, out / "masks", world, SETTINGS["prefix_first"])
    laser, loss = fit.phases[0].task.module, LaserTask.loss
    laser.reader.mformer.blocks[0].dropout.p = 0.5
    drawn = []

    def spy(self, batch, rows):
        drawn.append(torch.rand(4))
        return loss(self, batch, rows)

    LaserTask.loss = spy
    try:
        fit.run()
    finally:
        LaserTask.loss = loss
    checkpoint.save(out / f"masks-{world.rank}.safetensors", {
        "drawn": torch.stack(drawn[:3]), "state": torch.get_rng_state(), **laser.state_dict()})


def world_of_two(out: Path, world: World) -> None:
    """The small tools, on numbers that can be counted."""
    rows = torch.tensor([[float(i), i * 10.0] for i in world.even_share(5)])
    p, never = torch.nn.Parameter(torch.zeros(2)), torch.nn.Parameter(torch.zeros(3))
    if world.rank == 1:  # the other has no gradient at all
        p.grad = torch.tensor([1.0, 2.0])
    loss, seven = world.sum_gradients([p, never], torch.tensor([0.5 + world.rank, 3.0 + world.rank])).tolist()
    followed = torch.full((), float(world.rank))
    world.follow([followed])
    tensors, value = world.from_main(lambda: ({"bytes": torch.tensor([7, 8], dtype=torch.uint8), "one": torch.tensor(3),
                                               "none": torch.empty(0), "half": torch.ones(2, dtype=torch.bfloat16)},
                                              {"epoch": 3}))
    facts = {"gathered": world.gather_rows(rows, 5).tolist(), "gradient": p.grad.tolist(), "never": never.grad is None,
             "loss": loss, "seven": seven, "most": world.most(world.rank + 4), "any": world.any(world.rank == 1),
             "none": world.any(False), "followed": followed.item(), "value": value,
             "tensors": {n: [str(t.dtype), t.tolist()] for n, t in tensors.items()},
             "share": world.share(3).tolist(), "empty": world.share(1).tolist()}
    (out / f"tools-{world.rank}.json").write_text(json.dumps(facts))


def read_together(llm, out: Path, world: World) -> None:
    """Item texts, three at a time; ten items make four batches."""
    texts._READ_AT_ONCE = 3
    fit = quick_fit(llm, out / "read", World(), SETTINGS["text_first"])
    read, encode_text, alone = [], llm.decoder.encode_text, fit.phases[0].task.module.texts
    llm.decoder.encode_text = lambda embeds, past: read.append(len(embeds)) or encode_text(embeds, past)
    together = texts.Texts(llm, alone.config, fit.dataset.items, world=world)
    used = together._used
    checkpoint.save(out / f"read-{world.rank}.safetensors", {
        "together": torch.stack([together._cache.keys[:, :used], together._cache.values[:, :used]]),
        "alone": torch.stack([alone._cache.keys[:, :used], alone._cache.values[:, :used]]),
        "read": torch.tensor(read)})


def sharded(llm_folder: Path, out: Path, world: World) -> None:
    """Each process holds half of the LLM; the second has fewer passes a step than the first."""
    for name, settings in SHARDS.items():
        config = BackboneConfig(name=str(llm_folder), precision="fp32", shard=True, **settings)
        llm = load_backbone(config)
        fit = quick_fit(llm, out / name, world, SHARDED, users=5)
        fit.run()
        held = sum((p.to_local() if hasattr(p, "to_local") else p).numel() for p in llm.decoder.parameters())
        checkpoint.save(out / f"{name}-{world.rank}.safetensors", found(fit) | {"held": torch.tensor(held)})


def failed(steps: Path, out: Path, world: World) -> None:
    """The command line, with other settings in the second process; what each says and how it ends."""
    sys.argv = ["laserrec", "fit", str(steps / "data"), str(out / "never"), "--id-model", str(steps / "ids"),
                "--config", str(steps / "tiny.toml"), "--device", "cpu", "--backbone.precision", "fp32", "--train.lr",
                f"{world.rank + 1}e-3"]
    said, code = io.StringIO(), 0
    try:
        with contextlib.redirect_stderr(said):
            cli.main()
    except SystemExit as stop:
        code = stop.code
    (out / f"failed-{world.rank}.json").write_text(json.dumps({"code": code, "said": said.getvalue()}))


def main() -> None:
    torch.set_num_threads(1)
    os.environ["HF_HUB_OFFLINE"] = "1"
    llm_folder, steps, out = map(Path, sys.argv[1:])
    world = join()
    world_of_two(out, world)
    llm = load_backbone(BackboneConfig(name=str(llm_folder), precision="fp32"))
    first_gradients(llm, out, world)
    equal_fits(llm, out, world)
    stopped(llm, out, world)
    resumed(llm, out, world)
    masks(llm, out, world)
    read_together(llm, out, world)
    sharded(llm_folder, out, world)
    failed(steps, out, world)


if __name__ == "__main__":
    main()
