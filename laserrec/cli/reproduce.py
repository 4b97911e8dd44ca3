"""`laserrec reproduce`: the tables. Thin, as all of cli."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

from cyclopts import App, Parameter
from rich.console import Console
from rich.table import Table

from laserrec.cli.options import ConfigFile, Device, Flags, JsonFile, Preset, Quiet, finish, say, settings
from laserrec.cli.output import print_table
from laserrec.cli.paper import add_paper
from laserrec.config import Config

reproduce_app = App(name="reproduce", help="Train and compare: the paper's tables and figures, and those of "
                    "benchmarks/results.")
add_paper(reproduce_app)

Out = Annotated[Path, Parameter(help="Everything is kept here.")]
Data = Annotated[Path | None, Parameter(help="A data folder; else amazon-scientific is prepared in OUT/data.")]


@reproduce_app.command
def quality(out: Out = Path("runs/quality"), *, data: Data = None, seeds: int = 5, device: Device = "auto",
            preset: Preset = "small", config: ConfigFile = None, quiet: Quiet = False, json_file: JsonFile = None,
            flags: Flags = None) -> None:
    """Laser and its rivals: several seeds, paired significance. Run again to resume.

    Example: laserrec reproduce quality --seeds 5 --json benchmarks/results/quality.json

    Parameters
    ----------
    seeds
        Seeds 0, 1, ... of every model.
    """
    from laserrec.experiments.machine import describe
    from laserrec.experiments.quality import reproduce

    tree = settings(preset, config, flags)
    dataset, name = _dataset(data, out, tree)
    result = reproduce(dataset, tree, out, range(seeds), not quiet, device)
    k = tree.eval.k
    table = Table("model", f"Recall@{k}", f"NDCG@{k}", "MRR", "seeds", f"NDCG@{k} over the best ID model (95%)",
                  title=f"{name}, test split, all items ranked, nothing filtered: mean ± sd over seeds")
    for row in result["summary"]:
        cells = [f"{row[m]:.4f} ± {row[m + '_sd']:.4f}" for m in (f"recall@{k}", f"ndcg@{k}", "mrr")]
        difference = f"{row[f'ndcg@{k}_difference']:+.4f} ({row['low']:+.4f} to {row['high']:+.4f})"
        table.add_row(row["model"], *cells, str(row["seeds"]), difference)
    Console().print(table)
    for line in result["laser_over"]:
        say(over(line, k))
    finish({"machine": describe(), **result}, json_file)


@reproduce_app.command
def cold_start(out: Out = Path("runs/cold-start"), *, data: Data = None, seeds: int = 3, share: float = 0.1,
               device: Device = "auto", preset: Preset = "small", config: ConfigFile = None, quiet: Quiet = False,
               json_file: JsonFile = None, flags: Flags = None) -> None:
    """Items held out of all training, and users of 1, 2, 3 and 5+ items. Run again to resume.

    Example: laserrec reproduce cold-start --seeds 3 --json benchmarks/results/cold_start.json

    Parameters
    ----------
    seeds
        Seeds 0, 1, ... of the items held out and of the training.
    share
        Share of the items that is held out.
    """
    from laserrec.experiments.coldstart import reproduce
    from laserrec.experiments.machine import describe

    tree = settings(preset, config, flags)
    dataset, name = _dataset(data, out, tree)
    result = reproduce(dataset, tree, out, range(seeds), share, not quiet, device)
    k = tree.eval.k
    table = Table("target", "history", "model", f"Recall@{k}", f"NDCG@{k}", "cases", "seeds",
                  title=f"{name}, test split, all items ranked; new = held out of all training")
    rows = sorted(result["rows"], key=lambda r: (r["target"] != "new", r["history"]))
    for key in dict.fromkeys((r["target"], r["history"], r["model"]) for r in rows):
        own = [r for r in rows if (r["target"], r["history"], r["model"]) == key]
        means = [f"{sum(r[m] for r in own) / len(own):.4f}" for m in (f"recall@{k}", f"ndcg@{k}")]
        table.add_row(*key, *means, str(sum(r["users"] for r in own)), str(len(own)))
    Console().print(table)
    finish({"machine": describe(), **result}, json_file)


@reproduce_app.command
def datasets(root: Path, out: Out = Path("runs/datasets"), *, names: Annotated[
                 list[str] | None, Parameter(consume_multiple=True)] = None, models: Annotated[
                 list[str] | None, Parameter(consume_multiple=True)] = None, seeds: int = 3, trials: int = 12,
             device: Device = "auto", preset: Preset = "small", config: ConfigFile = None, quiet: Quiet = False,
             json_file: JsonFile = None, flags: Flags = None) -> None:
    """One default Laser on many data sets, beside rivals that are tuned on each. Run again to resume.

    Example: laserrec reproduce datasets shared/data --names steam amazon-games --seeds 3

    Parameters
    ----------
    root
        A folder of data sets: ROOT/NAME/interactions.csv.gz and ROOT/NAME/items.jsonl.gz.
    names
        Those to take; else all in ROOT.
    models
        Rows of the table to fit, by name ("laser", "EASE with LLM text"); else all.
    seeds
        Seeds 0, 1, ... of every model in which something is random.
    trials
        Most settings that each rival is tried with on a data set's validation split.
    """
    from laserrec.experiments.datasets import means, reproduce
    from laserrec.experiments.machine import describe

    tree = settings(preset, config, flags)
    k = tree.eval.k
    rows = reproduce(root, names or [], out, tree, range(seeds), trials, not quiet, device, models)
    for data in dict.fromkeys(row["data"] for row in rows):
        print_table(f"{data}, test split, all items ranked, nothing filtered",
                    ("model", f"Recall@{k}", f"NDCG@{k}", "seeds", "trials"),
                    [(row["model"], f"{row[f'recall@{k}']:.4f}", f"{row[f'ndcg@{k}']:.4f}", row["seeds"], row["trials"])
                     for row in means(rows, k) if row["data"] == data])
    finish({"machine": describe(), "rows": rows}, json_file)


def over(line: dict[str, Any], k: int) -> str:
    """One entry of "laser_over" as a sentence."""
    what = {"id": "ID-only", "text": "text"}[line["kind"]]
    recall, ndcg = (line[f"{metric}@{k}_ratio"] for metric in ("recall", "ndcg"))
    return (f"Laser over the best {what} model, {line['best']}: Recall@{k} x {recall:.3f}, NDCG@{k} x {ndcg:.3f}; "
            f"difference of NDCG@{k} {line[f'ndcg@{k}_difference']:+.4f} ({line['low']:+.4f} to {line['high']:+.4f})")


def _dataset(data: Path | None, out: Path, config: Config) -> Any:
    """The data set and its name."""
    from laserrec.data.dataset import Dataset
    from laserrec.data.prepare import prepare_source

    if data is None:
        prepare_source("amazon-scientific", out / "data", config.data)
    return Dataset.load(out / "data" if data is None else data), "amazon-scientific" if data is None else str(data)
