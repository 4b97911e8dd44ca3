"""The item-to-item regression's two forms side by side on real data: accuracy, seconds and peak memory.

    python benchmarks/forms.py /data runs/forms amazon-scientific amazon-games --methods ease ease-text
    python benchmarks/forms.py /data runs/forms food --methods popularity ease-text --forms auto

/data/NAME holds interactions.csv.gz and items.jsonl.gz. Item texts are read once for each data set, before anything is
measured, through the LLM's first six layers. `instant` is Laser's preset of that name without other regressions tried.
Each fit is a process of its own. Results: benchmarks/results/forms.json, a list; what is there is not repeated.
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
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results" / "forms.json"
METHODS = ("popularity", "ease", "ease-text", "instant")
_USERS = 8000
"""At most so many, drawn at random, are ranked; scoring is most of the work where the form is exact."""
_TEXT = {"backbone": {"mean_layers": [6]}, "blend": {"regressions": 0}}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("root", type=Path)
    parser.add_argument("folder", type=Path, help="where data folders are kept")
    parser.add_argument("names", nargs="+")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=["ease", "ease-text"])
    parser.add_argument("--forms", nargs="+", choices=["auto", "exact", "local"], default=["exact", "local"])
    parser.add_argument("--set", default="{}", help='further settings as JSON, {"neighbours": {"candidates": 500}}')
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--contended", action="store_true", help="note that other work ran at the same time")
    parser.add_argument("--one", action="store_true", help="measure here and print; what the script calls itself with")
    given = parser.parse_args()
    changes = json.loads(given.set)
    if given.one:
        print(json.dumps(measured(given.folder / given.names[0], given.methods[0], given.forms[0], changes)))
        return
    for name in given.names:
        reads = {"ease-text", "instant"} & set(given.methods)
        _prepare(given.root / name, given.folder / name, changes if reads else None)
        for method in given.methods:
            for form in ["auto"] if method == "popularity" else given.forms:
                key = {"data": name, "method": method, "wanted": form, **({"changes": changes} if changes else {})}
                _measure(key, given, {"contended": True} if given.contended else {})


def _measure(key: dict[str, Any], given: argparse.Namespace, notes: dict[str, Any]) -> None:
    found = json.loads(given.out.read_text("utf-8")) if given.out.is_file() else []
    if any({**key, "changes": key.get("changes")}.items() <= {"changes": None, **row}.items() for row in found):
        return
    command = [sys.executable, __file__, str(given.root), str(given.folder), key["data"], "--methods", key["method"],
               "--forms", key["wanted"], "--set", given.set, "--one"]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    row = {**key, **json.loads(done.stdout.splitlines()[-1]), "cores": os.cpu_count(), **notes}
    print(json.dumps(row), flush=True)
    found = json.loads(given.out.read_text("utf-8")) if given.out.is_file() else []
    temporary = given.out.with_suffix(".tmp")
    temporary.write_text(json.dumps([*found, row], indent=1) + "\n", "utf-8")
    temporary.replace(given.out)


def _prepare(source: Path, folder: Path, changes: dict[str, Any] | None) -> None:
    """A data folder, and unless `changes` is None in it the LLM's means of the texts."""
    from laserrec.config import load_config, merge
    from laserrec.data.dataset import Dataset
    from laserrec.data.prepare import prepare_source
    from laserrec.llm.text_features import TextFeatures
    from laserrec.recommender.fitting import kept_texts
    from laserrec.util.device import CPU

    if not (folder / "data").is_dir():
        prepare_source([source / "interactions.csv.gz", source / "items.jsonl.gz"], folder / "data")
    if changes is not None:
        config, dataset = load_config(overrides=merge(_TEXT, changes)), Dataset.load(folder / "data")
        TextFeatures(config.backbone, config.prompt, CPU, kept_texts(dataset), progress=True).means(dataset.items)


def measured(folder: Path, method: str, form: str, changes: dict[str, Any]) -> dict[str, Any]:
    """Fit, and rank all test users' items. peak_gib: of the whole process, torch and the evaluation included."""
    from laserrec.config import load_config, merge
    from laserrec.data.dataset import Dataset
    from laserrec.evaluation.evaluate import rank_cases
    from laserrec.evaluation.metrics import Metrics
    from laserrec.llm.text_features import TextFeatures
    from laserrec.methods.neighbours import is_local
    from laserrec.recommender.fitting import fit, kept_texts
    from laserrec.util.device import CPU

    name, preset = ("laser", "instant") if method == "instant" else (method, "small")
    own = merge({**_TEXT, "neighbours": {"form": form}}, changes)
    config, dataset = load_config(preset, overrides=own, method=name), Dataset.load(folder / "data")
    features = TextFeatures(config.backbone, config.prompt, CPU, kept_texts(dataset))
    with tempfile.TemporaryDirectory(prefix="laserrec-forms-") as scratch:
        start, cpu = time.perf_counter(), time.process_time()
        model = fit(name, dataset, config, Path(scratch) / "model", CPU, features=features, progress=False).model
        seconds, cpu = time.perf_counter() - start, time.process_time() - cpu
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    out = {"items": dataset.n_items, "interactions": len(dataset.interactions), "users": len(dataset.users),
           "form": "local" if is_local(config.neighbours, dataset.n_items) else "exact", "seconds": round(seconds, 1),
           "cpu_seconds": round(cpu, 1), "peak_gib": round(peak / 2**20, 2)}
    for split in ("validation", "test"):
        ranks = rank_cases(model, dataset.cases(split).sample(_USERS), config.eval.batch_size, dataset.n_items)
        found = Metrics.from_ranks(ranks.plain, 10).as_dict()
        out[split] = {name: round(found[name], 5) for name in ("recall@10", "ndcg@10", "users")}
    return out


if __name__ == "__main__":
    main()
