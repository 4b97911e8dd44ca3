"""Whether reading the history with the LLM is worth its cost: variants of the preset `bi-tuning`, trained alike.

Every try is trained, blended and ranked on the same data, ID model, examples and users. One JSON line per try and seed
is appended to OUT, users' NDCG goes into the folder OUT without its ending; what stands there is not run again. In the
end a table compares all tries of these settings with `none`, user by user.

  none          no reading: the decayed sum of the history's items alone
  bi-tuning     as shipped; no-prefix, learned: with no prefix, or one for all users
  distil        the suffix's output is drawn to the ID model's user state; users and items spread (Wang & Isola 2020)
  each          a token from the ID model's state behind each item of the history, in place of the prefix at the end
  transformer   no LLM: a small causal transformer over the items' frozen vectors
  items-first   the head learns to tell items' neighbours in training sequences first; none-items-first: without reading
  layers-12, -20, -30, both-depths   a deeper pass; both-depths: the outputs of the middle and the last of 12 layers
  every-layer   prefix tuning at every layer, beside the M-Former's prefix at the input
  gate          what the output adds is learnt at a higher rate
  alone         the output at the suffix alone, without the sum
  lora          not in the default list, since nothing can be cached: the whole text through layers with LoRA

Tries are joined with +: distil+gate.

  python benchmarks/reading.py DATA --id-model DIR --tries none bi-tuning --device cuda --out F.jsonl
  python benchmarks/reading.py DATA --id-model DIR --out F.jsonl --set train.epoch_examples=2000 distil_weight=0.3
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
import torch.nn.functional as F
from readings import DEAR, TRIES, Options, Task, Try, compose
from scipy.stats import ttest_1samp
from torch import Tensor

from laserrec.config import Config, Layout, Prefix, load_config
from laserrec.data.dataset import Cases, Dataset
from laserrec.data.histories import Histories
from laserrec.evaluation.evaluate import rank_cases
from laserrec.evaluation.metrics import Metrics
from laserrec.evaluation.significance import bootstrap_interval, user_ndcg
from laserrec.experiments.inspect import shuffled
from laserrec.llm.backbone import load_backbone
from laserrec.llm.text_features import TextFeatures
from laserrec.methods.laser.build import phases
from laserrec.methods.laser.finish import choose_blend
from laserrec.methods.laser.model import Laser
from laserrec.methods.laser.texts import Texts
from laserrec.methods.neighbours import Neighbours
from laserrec.recommender.fitting import kept_texts, open_folder
from laserrec.training.trainer import Pace, Trainer
from laserrec.util.device import choose
from laserrec.util.distributed import World

_COSINE_USERS = 1_000


def find_try(names: str) -> Try:
    """Of a name, or of several joined with +, each of which changes what differs from `bi-tuning`."""
    found = Try()
    for name in names.split("+"):
        if name not in TRIES:
            sys.exit(f"no try {name!r}; there are: {', '.join(TRIES)}")
        own = TRIES[name]
        found = replace(found, **{f.name: getattr(own, f.name) for f in fields(Try)
                                  if getattr(own, f.name) != f.default})
    return found


def settings_of(tried: Try, overrides: dict[str, Any], seed: int, device: torch.device) -> Config:
    config = load_config("bi-tuning", overrides=overrides)
    reads = tried.reading not in (None, "transformer")
    layout = {"lora": Layout.PREFIX_FIRST}.get(tried.reading, Layout.TEXT_FIRST) if reads else Layout.NONE
    prefix = Prefix(tried.prefix) if reads and tried.reading != "each" else Prefix.NONE
    train: dict[str, Any] = {"seed": seed}
    if tried.reading == "lora":
        train["tokens_per_pass"] = 4096 if device.type == "cpu" else 65_536
    changes = {"prompt": {"layout": layout}, "mformer": {"prefix": prefix}, "train": train,
               "backbone": {"layers": tried.layers or config.backbone.layers}}
    return config.model_copy(update={name: getattr(config, name).model_copy(update=change)
                                     for name, change in changes.items()})


class Shared:
    """What all tries of a process have in common."""

    def __init__(self, data: Path, id_model: Path, config: Config, device: torch.device):
        self.dataset, self.device = Dataset.load(data), device
        self.below = open_folder(id_model, device)
        if self.below.facts["data"]["sha256"] != self.dataset.fingerprint:
            sys.exit(f"{id_model} was fitted on other data than {data}")
        self.features = TextFeatures(config.backbone, config.prompt, device, kept_texts(self.dataset))
        self.means = self.features.means(self.dataset.items)
        self.regressions: dict[str, tuple[Tensor, Tensor]] = {}
        self._texts: dict[tuple[Any, ...], Texts] = {}

    def texts(self, config: Config, adapted: bool) -> Texts:
        """Of the last try's kind alone, since the cache of a deep pass is large. adapted: over an LLM of its own."""
        key = config.backbone.layers, config.prompt.layout, adapted
        if adapted or key not in self._texts:
            self._texts = {}
            own = adapted or config.backbone.layers != self.features.config.layers
            backbone = load_backbone(config.backbone, self.device) if own else self.features.backbone
            self._texts = {key: Texts(backbone, config.prompt, self.dataset.items)}
        return self._texts[key]

    @contextmanager
    def regressions_once(self) -> Iterator[None]:
        """Their inputs are the same in all tries."""
        kept, fit = self.regressions, Neighbours.fit

        def once(own: Neighbours, sequences: Histories, text: Tensor) -> None:
            key = own.config.model_dump_json(exclude={"share", "temperature"})
            if key not in kept:
                fit(own, sequences, text)
                kept[key] = own.items.clone(), own.weights.clone()
            own.items.copy_(kept[key][0])
            own.weights.copy_(kept[key][1])

        with patch.object(Neighbours, "fit", once):
            yield


def train(shared: Shared, config: Config, tried: Try, o: Options, users: int | None) -> tuple[Task, dict[str, Any]]:
    """The fitted model's last task, and what is told of the training."""
    torch.manual_seed(config.train.seed)
    laser = compose(shared, config, tried, o)
    plan = [replace(p, task=Task(laser, shared.dataset, p.task.fixed, tried, o))
            for p in phases(laser, shared.dataset, World())]
    pace = Pace(config.train.seed, config.eval.k, config.eval.batch_size, True, users, 1e9, sys.stderr.isatty())
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(plan, shared.dataset, Path(folder), "one try", pace, World(), shared.device)
        log = trainer.run()
    laser.eval().requires_grad_(False)
    curve = [entry.get(f"validation_ndcg@{config.eval.k}") for entry in log]
    kept = trainer.summary()
    return trainer.phase.task, {"kept": {name: kept["kept"].get(name) for name in ("phase", "epoch")},
                                "validation_curve": curve, "trained_parameters": kept["trained_parameters"]}


# -- what is measured -------------------------------------------------------------------------------------------------


class Remembered:
    """A user side that reads each history once."""

    def __init__(self, side: Any):
        self.side, self._kept = side, {}

    def text(self, histories: Histories, hide: Tensor | None = None) -> tuple[Tensor, None]:
        keys = [tuple(row) for row in histories.lists()]
        new = [i for i, key in enumerate(keys) if key not in self._kept]
        if new:
            found, _ = self.side.text(histories.take(new))
            self._kept.update(zip((keys[i] for i in new), found, strict=True))
        return torch.stack([self._kept[key] for key in keys]), None


def measure(task: Task, cases: dict[str, Cases]) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Metrics by split and part, the blend and the shuffle cosine; users' NDCG."""
    laser, k = task.module, task.module.config.eval.k
    found: dict[str, Any] = {split: {} for split in cases}
    ndcg: dict[str, np.ndarray] = {}

    def rank(part: str) -> None:
        for split, own in cases.items():
            ranks = rank_cases(laser, own, laser.config.eval.batch_size, task.dataset.n_items).plain
            metrics = Metrics.from_ranks(ranks, k)
            found[split][part] = {f"recall@{k}": metrics.recall, f"ndcg@{k}": metrics.ndcg}
            ndcg[f"{split}_{part}"] = user_ndcg(ranks, k).astype(np.float32)

    side, neighbours, share = laser.user_side, laser.neighbours, laser.id_share
    laser.neighbours = None
    laser.set_id_share(0.0)
    found["shuffle_cosine"] = shuffle_cosine(laser, cases["test"])
    if side.more and side.summed:
        laser.user_side = side.sums_alone()
        rank("text without reading")
    laser.user_side = Remembered(side)
    rank("text")
    laser.neighbours = neighbours
    laser.set_id_share(share)
    task.scale_neighbours()
    _, told = choose_blend(task)
    found["blend"] = told.get("chosen", {})
    rank("blend")
    return found, ndcg


@torch.no_grad()
def shuffle_cosine(laser: Laser, cases: Cases) -> float | None:
    """Mean cosine of users' text parts before and after their histories are shuffled."""
    several = torch.bincount(cases.histories.distinct().users, minlength=len(cases)) > 1
    rows, sums = several.nonzero()[:_COSINE_USERS, 0], []
    for some in rows.split(laser.config.eval.batch_size):
        own = cases.histories.take(some)
        sums.append(F.cosine_similarity(laser.users(own), laser.users(shuffled(own)), dim=-1))
    return float(torch.cat(sums).mean()) if sums else None


def compare(out: Path, group: str) -> None:
    """A line per try of these settings: means over seeds, and the users' differences from `none`, whose NDCG is the
    mean over seeds."""
    lines = [line for line in read_lines(out) if line["group"] == group]
    kept: dict[str, list[Any]] = {}
    for line in lines:
        kept.setdefault(line["try"], []).append(np.load(users_file(out, line)))
    print(f"{'try':18} seeds  {'text NDCG@10: validation, test':38} {'blend NDCG@10: validation, test':38}")
    for name, own in kept.items():
        text = [f"{name:18} {len(own):5} "]
        for part in ("text", "blend"):
            for split in ("validation", "test"):
                mean, base = (np.mean([x[f"{split}_{part}"] for x in kept[of]], axis=0) if of in kept else None
                              for of in (name, "none"))
                text.append(f"{mean.mean():.4f}")
                if split == "test" and base is not None and name != "none":
                    low, high = bootstrap_interval((mean - base).astype(np.float64))
                    p = float(ttest_1samp(mean - base, 0).pvalue)
                    text.append(f"{100 * (mean.mean() / max(1e-9, base.mean()) - 1):+.1f}% "
                                f"[{100 * low / base.mean():+.1f}, {100 * high / base.mean():+.1f}] p {p:.3f} ")
        print(" ".join(text))


# -- the file ---------------------------------------------------------------------------------------------------------


def read_lines(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in out.read_text().splitlines()] if out.is_file() else []


def users_file(out: Path, line: dict[str, Any]) -> Path:
    return out.with_suffix("") / f"{line['data']}-{line['try']}-{line['seed']}-{line['key']}.npz"


def digest(facts: Any) -> str:
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:12]


def parse(settings: list[str]) -> tuple[dict[str, Any], Options]:
    """NAME=VALUE: settings of the preset, which have a dot in their name, and of the tries."""
    tree: dict[str, Any] = {}
    own: dict[str, Any] = {}
    for setting in settings:
        name, _, value = setting.partition("=")
        try:
            read = json.loads(value)
        except ValueError:
            read = value
        section, dot, inner = name.partition(".")
        if dot:
            tree.setdefault(section, {})[inner] = read
        elif name in {f.name for f in fields(Options)}:
            own[name] = read
        else:
            sys.exit(f"no setting {name!r}; there are section.name and: {', '.join(asdict(Options()))}")
    return tree, Options(**own)


def run(shared: Shared, name: str, config: Config, o: Options, users: int | None, out: Path, facts: dict[str, Any]
        ) -> None:
    """One try, written to the file."""
    started, tried = time.monotonic(), find_try(name)
    cases = {split: shared.dataset.cases(split) for split in ("validation", "test")}
    cases = {split: own if users is None else own.sample(users) for split, own in cases.items()}
    with shared.regressions_once():
        task, told = train(shared, config, tried, o, users)
        trained = time.monotonic()
        found, ndcg = measure(task, cases)
    seconds = {"training": round(trained - started, 1), "measuring": round(time.monotonic() - trained, 1)}
    line = {**facts, **found, **told, "seconds": seconds, "device": str(shared.device),
            "users": {split: len(own) for split, own in cases.items()}}
    file = users_file(out, line)
    file.parent.mkdir(parents=True, exist_ok=True)
    np.savez_compressed(file, **ndcg, **{f"{split}_users": own.users for split, own in cases.items()})
    with out.open("a") as lines:
        lines.write(json.dumps(line) + "\n")
    parts = {part: f"{found['test'][part][f'ndcg@{config.eval.k}']:.4f}" for part in ("text", "blend")}
    print(name, config.train.seed, parts, seconds, flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, help="prepared data folder")
    parser.add_argument("--id-model", type=Path, required=True, help="model folder of a SASRec fitted on it")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--tries", nargs="*", default=[name for name in TRIES if name not in DEAR])
    parser.add_argument("--seeds", nargs="*", type=int, default=[0])
    parser.add_argument("--device", default="auto")
    parser.add_argument("--users", type=int, help="validation and test users, drawn at random; all if not given")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--set", nargs="*", default=[], metavar="NAME=VALUE", help="train.lr=0.002, distil_weight=0.3")
    given = parser.parse_args()
    if given.threads:
        torch.set_num_threads(given.threads)
    device, (tree, o), failed = choose(given.device), parse(given.set), False
    for name in given.tries:
        find_try(name)
    given.out.parent.mkdir(parents=True, exist_ok=True)
    shared = Shared(given.data, given.id_model, load_config("bi-tuning", overrides=tree), device)
    tree["id_model"] = shared.below.config.id_model.model_dump(mode="json")
    group = digest([shared.dataset.fingerprint, shared.below.facts.get("fingerprint"), given.users, asdict(o),
                    load_config("bi-tuning", overrides=tree).model_dump(mode="json")])
    for seed in given.seeds:
        for name in given.tries:
            config = settings_of(find_try(name), tree, seed, device)
            facts = {"try": name, "seed": seed, "data": given.data.resolve().name, "group": group,
                     "key": digest([group, name, seed]), "set": given.set}
            if facts["key"] in {line["key"] for line in read_lines(given.out)}:
                print(name, seed, "is there already", flush=True)
                continue
            try:
                run(shared, name, config, o, given.users, given.out, facts)
            except Exception:  # the other tries go on
                traceback.print_exc()
                failed = True
    compare(given.out, group)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
