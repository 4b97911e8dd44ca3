"""Seconds and peak memory of each part at growing sizes, on synthetic data with planted structure.

Items come in groups of ten partners that are bought together and have similar texts; popularity falls by a power law.
Each measurement is a process of its own and is written as soon as it is done; what is there already is not repeated.

  python benchmarks/scale.py neighbours prepare --items 10000 100000 --interactions 1000000
  python benchmarks/scale.py --list                  # parts

Results: benchmarks/results/scale.json, a list of {part, items, interactions, seconds, peak_gib, ...}. peak_gib is the
process's largest resident memory, torch (about .3) included.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

RESULTS = Path(__file__).parent / "results" / "scale.json"
GROUP, LENGTH, D_TEXT = 10, 10, 64
_PARTNER, _POWER = 0.6, 0.8
_FREQUENT = 10
"""Training interactions from which on an item's partners can be expected to be found."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", default=[])
    parser.add_argument("--items", type=int, nargs="+", default=[10_000])
    parser.add_argument("--interactions", type=int, nargs="+", default=[1_000_000])
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--contended", action="store_true", help="note that other work ran at the same time")
    parser.add_argument("--list", action="store_true", help="name the parts")
    parser.add_argument("--one", action="store_true", help="measure here and print; what the script calls itself with")
    given = parser.parse_args()
    if given.list:
        print(*PARTS, sep="\n")
        return
    if unknown := [part for part in given.parts if part not in PARTS]:
        parser.error(f"unknown part {unknown[0]!r}; there are: {', '.join(PARTS)}")
    if given.one:
        print(json.dumps(measured(given.parts[0], given.items[0], given.interactions[0])))
        return
    for part in given.parts:
        for items in given.items:
            for interactions in given.interactions:
                _measure(part, items, interactions, given.out, {"contended": True} if given.contended else {})


def _measure(part: str, items: int, interactions: int, out: Path, notes: dict) -> None:
    found = json.loads(out.read_text("utf-8")) if out.is_file() else []
    key = {"part": part, "items": items, "interactions": interactions}
    if any(key.items() <= row.items() for row in found):
        return
    command = [sys.executable, __file__, part, "--items", str(items), "--interactions", str(interactions), "--one"]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    row = {**key, **json.loads(done.stdout.splitlines()[-1]), "cores": os.cpu_count(), **notes}
    print(json.dumps(row), flush=True)
    found = json.loads(out.read_text("utf-8")) if out.is_file() else []  # others may have been measured meanwhile
    temporary = out.with_suffix(".tmp")
    temporary.write_text(json.dumps([*found, row], indent=1) + "\n", "utf-8")
    temporary.replace(out)


def measured(part: str, items: int, interactions: int) -> dict:
    """{seconds, peak_gib} and what the part tells of itself; making the data does not count as time."""
    with tempfile.TemporaryDirectory(prefix="laserrec-scale-") as folder:
        work = PARTS[part](items, interactions, Path(folder))
        start = time.perf_counter()
        facts = work()
        seconds = time.perf_counter() - start
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # in KiB on Linux
    return {"seconds": round(seconds, 1), "peak_gib": round(peak, 2), **facts()}


Facts = Callable[[], dict]
Work = Callable[[], Facts]


# -- planted data -----------------------------------------------------------------------------------------------------


def planted(items: int, interactions: int, seed: int = 0) -> np.ndarray:
    """Int32[users LENGTH] item rows, oldest first. Partners are rows of the same group of ten; ranks of popularity are
    dealt out at random."""
    rng, users = np.random.default_rng(seed), interactions // LENGTH
    share = np.cumsum(1 / np.arange(1, items + 1) ** _POWER)
    by_rank = rng.permutation(items).astype(np.int32)
    out = np.empty((users, LENGTH), np.int32)
    for place in range(LENGTH):
        drawn = by_rank[np.searchsorted(share, rng.random(users) * share[-1])]
        if place:
            partner = out[:, place - 1] // GROUP * GROUP + rng.integers(0, GROUP, users, dtype=np.int32)
            drawn = np.where(rng.random(users) < _PARTNER, np.minimum(partner, items - 1), drawn)
        out[:, place] = drawn
    return out


def texts(items: int, seed: int = 1) -> np.ndarray:
    """Float32[items D_TEXT] of which partners' have a cosine of about a half."""
    rng = np.random.default_rng(seed)
    out = rng.standard_normal((items, D_TEXT), dtype=np.float32)
    return out + np.repeat(rng.standard_normal((-(-items // GROUP), D_TEXT), dtype=np.float32), GROUP, axis=0)[:items]


def _histories(items: int, interactions: int):
    import torch

    from laserrec.data.histories import Histories

    rows = planted(items, interactions)
    ends = torch.arange(1, len(rows) + 1) * LENGTH
    return Histories(torch.from_numpy(rows.ravel()).long(), ends)


def _dataset(items: int, interactions: int):
    import polars as pl

    from laserrec.data.dataset import Dataset

    rows = planted(items, interactions)
    split = pl.Series(["train"] * (LENGTH - 2) + ["validation", "test"])
    acts = pl.DataFrame({"user": np.repeat(np.arange(len(rows), dtype=np.int32), LENGTH), "item": rows.ravel(),
                         "position": np.tile(np.arange(LENGTH, dtype=np.int32), len(rows))})
    acts = acts.with_columns(split=split.gather(acts["position"]), timestamp=pl.col("position").cast(pl.Int64))
    goods, users = pl.DataFrame({"item": np.arange(items)}), pl.DataFrame({"user": np.arange(len(rows))})
    return Dataset(goods, users, acts, {"sha256": f"planted {items} {interactions}"})


# -- parts ------------------------------------------------------------------------------------------------------------


def neighbours(items: int, interactions: int, folder: Path, form: str = "auto") -> Work:
    """Laser's neighbours, a hundred of each item."""
    import torch

    from laserrec.config import NeighboursConfig
    from laserrec.methods.neighbours import Neighbours, is_local

    config = NeighboursConfig(count=100, form=form)
    histories, text, made = _histories(items, interactions), torch.from_numpy(texts(items)), Neighbours(config, items)

    def work() -> Facts:
        made.fit(histories, text)

        def facts() -> dict:
            frequent = torch.bincount(histories.items, minlength=items) >= _FREQUENT
            partner = made.items[:, : GROUP - 1] // GROUP == torch.arange(items)[:, None] // GROUP
            partner &= made.weights[:, : GROUP - 1] > 0
            return {"form": "local" if is_local(config, items) else "exact",
                    "partners_found": round(float(partner[frequent].float().mean()), 4)}

        return facts

    return work


def prepare(items: int, interactions: int, folder: Path) -> Work:
    """From parquet files to a data folder; the process makes the files part by part, within little memory."""
    import polars as pl

    from laserrec.data.prepare import prepare_source

    (folder / "interactions").mkdir()
    for part, at in enumerate(range(0, interactions, 1_000_000)):
        rows = planted(items, min(1_000_000, interactions - at), seed=part)
        user = part * 100_000 + np.repeat(np.arange(len(rows)), LENGTH)
        pl.DataFrame({"user_id": user, "item_id": rows.ravel(), "timestamp": np.tile(np.arange(LENGTH), len(rows))}
                     ).select(pl.format("user-{}", "user_id").alias("user_id"),
                              pl.format("item-{}", "item_id").alias("item_id"), "timestamp"
                              ).write_parquet(folder / "interactions" / f"{part:04}.parquet")
    names = pl.DataFrame({"item": np.arange(items)}).select(pl.format("item-{}", "item").alias("item_id"),
                                                            pl.format("Item number {}", "item").alias("title"))
    names.write_parquet(folder / "items.parquet")

    def work() -> Facts:
        report = prepare_source([folder / "interactions", folder / "items.parquet"], folder / "data")
        return lambda: {"kept": report["table1"]["interactions"]}

    return work


def sasrec(items: int, interactions: int, folder: Path, softmax: str = "auto") -> Work:
    """One epoch of SASRec, and the validation of a thousand users."""
    import torch

    from laserrec.config import IdModelConfig
    from laserrec.methods.protocol import Phase
    from laserrec.methods.sampled_softmax import is_sampled
    from laserrec.methods.sasrec import SASRec
    from laserrec.methods.sequence_task import SequenceTask
    from laserrec.training.trainer import Pace, Trainer

    config, dataset = IdModelConfig(softmax=softmax, dropout=0.2), _dataset(items, interactions)
    torch.manual_seed(0)
    phase = Phase("sasrec", SequenceTask(SASRec(config, items), dataset), epochs=1)
    fit = Trainer([phase], dataset, folder, "planted", Pace(progress=False, validation_users=1000))

    def work() -> Facts:
        fit.run()
        return lambda: {"softmax": "sampled" if is_sampled(config, items) else "full",
                        "ndcg@10": round(fit.place.best, 4)}

    return work


def laser(items: int, interactions: int, folder: Path) -> Work:
    """The default Laser from nothing, but for the reading of texts: items have vectors of their own. Two epochs of its
    ID model; the rest as the preset `small` has it."""
    import polars as pl

    from laserrec import LaserRecommender
    from laserrec.config import load_config
    from laserrec.data.dataset import Dataset
    from laserrec.data.prepare import prepare_source

    rows = planted(items, interactions)
    names = pl.Series([f"item-{row}" for row in range(items)])
    pl.DataFrame({"user_id": np.repeat(np.arange(len(rows)), LENGTH), "item_id": names.gather(rows.ravel()),
                  "timestamp": np.tile(np.arange(LENGTH), len(rows))}).write_parquet(folder / "interactions.parquet")
    pl.DataFrame({"item_id": names, "title": names}).write_parquet(folder / "items.parquet")
    pl.DataFrame({"item_id": names, "vector": texts(items)}).write_parquet(folder / "vectors.parquet")
    prepare_source([folder / "interactions.parquet", folder / "items.parquet"], folder / "data",
                   vectors=folder / "vectors.parquet")
    config = load_config("small", None, {"backbone": {"item_vectors": "instead"}, "head": {"whiten_dims": D_TEXT},
                                         "id_model": {"max_epochs": 2}, "blend": {"shuffles": ()}})

    def work() -> Facts:
        model = LaserRecommender.fit_dataset(Dataset.load(folder / "data"), config, folder / "model", progress=False)
        told = model.facts["training"]
        return lambda: {"laser_seconds": told["seconds"], "ndcg@10": told["parts"]["ndcg@10"]}

    return work


PARTS: dict[str, Callable[[int, int, Path], Work]] = {
    "neighbours": neighbours,
    "neighbours, exact": lambda *size: neighbours(*size, form="exact"),
    "neighbours, local": lambda *size: neighbours(*size, form="local"),
    "prepare": prepare,
    "sasrec": sasrec,
    "sasrec, full": lambda *size: sasrec(*size, softmax="full"),
    "laser": laser,
    "sasrec, sampled": lambda *size: sasrec(*size, softmax="sampled"),
}
"""(items, interactions, an empty folder) -> the work, which returns what tells its facts afterwards."""


if __name__ == "__main__":
    main()
