"""Serving a million items: latency with exact search and with usearch, how alike the answers are, new items meanwhile.

    python benchmarks/million.py runs/million --json benchmarks/results/million.json

The model is like one of preset `instant`, on planted data: items in groups of ten within a thousand kinds, histories
near groups, neighbours within the group. It is made without reading a million texts, is 64 wide, and embeds new items
by the LLM as any other model does. Making it takes two minutes and 17 GB of memory, once; the index of a million items
ten minutes.
"""

from __future__ import annotations

import json
import threading
import time
from http.client import HTTPConnection
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import polars as pl
from cyclopts import Parameter, run
from serve import drive
from soak import Caller, served

from laserrec.util.io import write_json

GROUP, KINDS, D, NEIGHBOURS, HISTORY = 10, 1000, 64, 9, 10
_COMPARED = 200
"""Histories whose answers with and without the index are compared."""
_ADDED, _PER_CALL = 1000, 100


def make(folder: Path, items: int) -> None:
    """A model folder."""
    import torch

    from laserrec.config import load_config
    from laserrec.data.dataset import Dataset
    from laserrec.llm.text_features import TextFeatures
    from laserrec.methods.laser import build
    from laserrec.methods.neighbours import Neighbours
    from laserrec.recommender import folder as folders
    from laserrec.recommender.fitting import Fitted
    from laserrec.util.device import CPU
    from laserrec.util.distributed import World

    config = load_config("instant", overrides={"backbone": {"mean_layers": [6]}, "head": {"whiten_dims": D},
                                               "neighbours": {"count": NEIGHBOURS}, "blend": {"trials": 0}})
    names = pl.select(pl.int_range(items, dtype=pl.Int32).alias("item")).with_columns(
        item_id=pl.format("item-{}", "item"), title=pl.format("Thing {} of group {}", "item", pl.col("item") // GROUP),
        brand=pl.lit(None, pl.String), category=pl.format("kind {}", _kind(pl.col("item") // GROUP)))
    acts = pl.DataFrame({"user": [0, 0, 0], "item": [0, 1, 2], "position": [0, 1, 2], "timestamp": [0, 1, 2],
                         "split": ["train", "validation", "test"]}, schema_overrides={
                             name: pl.Int32 for name in ("user", "item", "position")})
    dataset = Dataset(names, pl.DataFrame({"user": [0], "user_id": ["u"]}), acts, {"sha256": f"planted {items}"})
    features = TextFeatures(config.backbone, config.prompt, CPU)
    torch.manual_seed(0)
    without = config.model_copy(update={"neighbours": config.neighbours.model_copy(update={"count": 0})})
    laser = build.compose(without, names, items, features, None, _means(items, features.backbone.d_means))
    build.phases(laser, dataset, World())[0].task.start(lambda: None)
    partners = torch.arange(items)[:, None] // GROUP * GROUP + torch.arange(GROUP)
    others = partners[partners != torch.arange(items)[:, None]].view(items, GROUP - 1)
    laser.neighbours, laser.config = Neighbours(config.neighbours, items), config
    laser.neighbours.items.copy_(others)
    laser.neighbours.weights.copy_(torch.rand(items, NEIGHBOURS))
    backbone = features.backbone
    named = {"name": backbone.name, "revision": backbone.revision, "sha256": backbone.sha256}
    fitted = Fitted(laser, "laser", config, names, items, features, {"data": dataset.meta, "training": {}},
                    backbone=named)
    folders.save(folder, fitted.saved())


def _kind(group: Any) -> Any:
    return group * 7919 % KINDS


def _means(items: int, width: int) -> Any:
    """Float32[items width]: kind, group and item in 64 directions of falling variance, and a little noise."""
    import torch

    rng = np.random.default_rng(0)
    kinds, groups = (rng.standard_normal((n, D), dtype=np.float32) for n in (KINDS, -(-items // GROUP)))
    spread = rng.standard_normal((D, width), dtype=np.float32) * np.linspace(3, 0.5, D, dtype=np.float32)[:, None]
    out = np.empty((items, width), np.float32)
    for at in range(0, items, 100_000):
        group = np.arange(at, min(items, at + 100_000)) // GROUP
        own = rng.standard_normal((len(group), D), dtype=np.float32)
        out[at : at + len(group)] = (kinds[_kind(group)] + 0.7 * groups[group] + 0.5 * own) @ spread
        out[at : at + len(group)] += 0.05 * rng.standard_normal((len(group), width), dtype=np.float32)
    return torch.from_numpy(out)


def histories(items: int, count: int, seed: int) -> list[list[str]]:
    """Of ten items each: pairs from five groups."""
    rng = np.random.default_rng(seed)
    groups = rng.integers(0, items // GROUP, (count, HISTORY // 2)).repeat(2, axis=1)
    rows = groups * GROUP + rng.integers(0, GROUP, groups.shape)
    return [[f"item-{row}" for row in line] for line in rows.tolist()]


def answers(port: int, some: list[list[str]]) -> list[set[str]]:
    """The ten items of each."""
    caller = Caller(port)
    return [{item["item_id"] for item in caller.ask(history)[1]["items"]} for history in some]


def add_while(port: int, some: list[list[str]]) -> dict[str, Any]:
    """Add items a hundred a call while one caller asks."""
    took: list[float] = []
    told: list[str] = []

    def adding() -> None:
        connection = HTTPConnection("127.0.0.1", port, timeout=600)
        for at in range(0, _ADDED, _PER_CALL):
            new = [{"item_id": f"new-{j}", "title": f"Thing {j} of another kind"} for j in range(at, at + _PER_CALL)]
            start = time.perf_counter()
            connection.request("POST", "/v1/items", json.dumps({"items": new}), {"Content-Type": "application/json"})
            answer = connection.getresponse()
            told.append(f"{answer.status} {answer.read()[:200]!r}")
            took.append(time.perf_counter() - start)

    thread, caller, times = threading.Thread(target=adding), Caller(port), []
    thread.start()
    for history in some:
        if not thread.is_alive():
            break
        start = time.perf_counter()
        status, _ = caller.ask(history)
        times.append(time.perf_counter() - start if status == 200 else np.inf)
    thread.join()
    if len(took) < _ADDED // _PER_CALL or not all(line.startswith("201") for line in told):
        raise SystemExit(f"items were not added: {told}")
    return {"added": _ADDED, "seconds_per_call": round(float(np.mean(took)), 2),
            "slowest_call_seconds": round(max(took), 2), "requests": len(times),
            "unanswered": int(np.isinf(times).sum()), "p50_ms": round(1000 * float(np.quantile(times, 0.5)), 1),
            "p99_ms": round(1000 * float(np.quantile(times, 0.99)), 1)}


def resident_gib(process: int) -> float:
    """Memory of a process in GiB."""
    import psutil

    return round(psutil.Process(process).memory_info().rss / 2**30, 2)


def measure(model: Path, options: list[str], items: int, requests: int) -> tuple[dict[str, Any], list[set[str]]]:
    """One server: {ready_seconds, resident_gib, one caller, adding} and what it answers to the histories compared."""
    start = time.perf_counter()
    with served(model, "--timeout", "60", *options) as (port, process):
        ready = time.perf_counter() - start
        drive(port, histories(items, 20, 0), 1, 60)  # warm
        alone = drive(port, histories(items, requests, 1), 1, 120)
        found = answers(port, histories(items, _COMPARED, 2))
        before = resident_gib(process)
        adding = add_while(port, histories(items, 100_000, 3))
        after = drive(port, histories(items, requests, 4), 1, 120)
        return {"ready_seconds": round(ready, 1), "resident_gib": before, "alone": alone, "adding": adding,
                "after": after, "resident_gib_after": resident_gib(process)}, found


def main(folder: Path, *, items: int = 1_000_000, requests: int = 300, index: bool = True, contended: bool = False,
         json_file: Annotated[Path | None, Parameter(name="--json")] = None) -> None:
    """Make the model and its index in FOLDER, unless they are there, and measure servers of both.

    Parameters
    ----------
    folder
        Where model and index are kept.
    items
        Items of the catalogue.
    requests
        Requests by one caller.
    index
        Whether to build an index, most of the work, and to measure it.
    contended
        Note that other work ran at the same time.
    json_file
        Add the numbers to the list in this file.
    """
    from laserrec.recommender.indexing import build_index
    from laserrec.recommender.recommender import LaserRecommender
    from laserrec.retrieval.index import IndexKind

    model, graph, facts = folder / "model", folder / "index", folder / "index.json"
    if not model.is_dir():
        make(model, items)
    out: dict[str, Any] = {"items": items, "width": D, **({"contended": True} if contended else {})}
    out["exact"], truth = measure(model, [], items, requests)
    if index:
        if not facts.is_file():
            write_json(facts, build_index(LaserRecommender.from_pretrained(model), IndexKind.USEARCH, graph,
                                          queries=_COMPARED))
        out["index"] = json.loads(facts.read_text("utf-8"))
        out["usearch"], like = measure(model, ["--index", str(graph)], items, requests)
        alike = [len(a & b) / len(b) for a, b in zip(like, truth, strict=True)]
        out["recall@10 of the answers"] = round(float(np.mean(alike)), 4)
    print(json.dumps(out, indent=1))
    if json_file is not None:
        found = json.loads(json_file.read_text("utf-8")) if json_file.is_file() else []
        write_json(json_file, [*(row for row in found if row["items"] != items), out])


if __name__ == "__main__":
    run(main)
