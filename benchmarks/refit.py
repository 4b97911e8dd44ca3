"""A refit beside a fit from nothing, period after period, as a shop would live with it.

The interactions are cut into periods of equal size by time. At the end of each period all that happened so far is
there to learn from (its newest twentieth to validate on), and what comes next is what is measured. The first period's
model is fitted; later ones are refitted from the one before, and fitted from nothing too.

    python benchmarks/refit.py /data runs/refit steam amazon-games --periods 2

/data/NAME holds interactions.csv.gz with timestamps, and items.jsonl.gz. Every step is one `laserrec` command; what is
finished is not done again. Results: benchmarks/results/refit.json, a list of {data, period, how: fit | refit,
interactions, users, items, seconds, recall@10, ndcg@10, mrr, tested}. seconds: the whole command, its start included.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import polars as pl

RESULTS = Path(__file__).parent / "results" / "refit.json"
_PERIOD, _VALIDATION = 0.1, 0.05
"""Shares of all interactions: one period, and what is validated on at its end."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("root", type=Path)
    parser.add_argument("folder", type=Path, help="where data and models are kept")
    parser.add_argument("names", nargs="+")
    parser.add_argument("--periods", type=int, default=2, help="refits after the first fit")
    parser.add_argument("--preset", default="small")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--contended", action="store_true", help="note that other work ran at the same time")
    given = parser.parse_args()
    for name in given.names:
        before: Path | None = None
        for period in range(given.periods + 1):
            data = _data(given.root / name, given.folder / name, period, 1 - _PERIOD * (given.periods + 1 - period))
            fresh = given.folder / name / f"fit-{period}"
            _measure(given, name, period, "fit", data, fresh, ["fit", data, fresh, "--preset", given.preset])
            if before is not None:
                refitted = given.folder / name / f"refit-{period}"
                _measure(given, name, period, "refit", data, refitted, ["refit", before, data, refitted])
            before = fresh if before is None else refitted


def _data(source: Path, folder: Path, period: int, until: float) -> Path:
    """Everything up to a share `until` of the interactions to learn from, and the next period as test split."""
    out, end = folder / f"data-{period}", until + _PERIOD
    if not (out / "meta.json").is_file():
        acts = pl.read_csv(source / "interactions.csv.gz")
        if "timestamp" not in acts.columns:
            sys.exit(f"{source} has no timestamps, so that it can't be cut into periods")
        acts = acts.sort("timestamp", "user_id", "position").head(round(end * acts.height))
        out.parent.mkdir(parents=True, exist_ok=True)
        file = folder / f"until-{period}.csv"
        acts.write_csv(file)
        _command(["prepare", file, out, "--items", source / "items.jsonl.gz", "--data.split", "temporal",
                  "--data.test-fraction", _PERIOD / end, "--data.validation-fraction", _VALIDATION / end])
        file.unlink()
    return out


def _measure(given: argparse.Namespace, name: str, period: int, how: str, data: Path, model: Path, command: list[Any]
             ) -> None:
    key = {"data": name, "period": period, "how": how}
    found = json.loads(given.out.read_text("utf-8")) if given.out.is_file() else []
    if any(key.items() <= row.items() for row in found):
        return
    taken = _command(command)
    result = model.with_name(model.name + ".json")
    _command(["evaluate", data, model, "--json", result])
    ranked, = json.loads(result.read_text("utf-8"))
    sizes = json.loads((data / "meta.json").read_text("utf-8"))["table1"]
    row = {**key, **{name: sizes[name] for name in ("interactions", "users", "items")}, "seconds": round(taken, 1),
           **{name: round(ranked[name], 5) for name in ("recall@10", "ndcg@10", "mrr")}, "tested": ranked["users"],
           "cores": os.cpu_count(), **({"contended": True} if given.contended else {})}
    print(json.dumps(row), flush=True)
    temporary = given.out.with_suffix(".tmp")
    temporary.write_text(json.dumps([*found, row], indent=1) + "\n", "utf-8")
    temporary.replace(given.out)


def _command(words: list[Any]) -> float:
    """Run one; its seconds."""
    started = time.perf_counter()
    subprocess.run([sys.executable, "-m", "laserrec", *map(str, words)], check=True)
    return time.perf_counter() - started


if __name__ == "__main__":
    main()
