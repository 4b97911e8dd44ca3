"""`laserrec reproduce`: the tables. Thin, as cli.py."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

from cyclopts import App, Parameter
from rich.console import Console
from rich.table import Table

from laserrec.cli.settings import Settings
from laserrec.config import load_config
from laserrec.util.io import write_json

reproduce_app = App(name="reproduce", help="Train and compare, several seeds, as the tables of benchmarks/results say.")
out_console = Console()


@reproduce_app.command
def quality(out: Path = Path("runs/quality"), *, seeds: int = 5, preset: str = "small", plot: Path | None = None,
            quiet: bool = False, json_file: Annotated[Path | None, Parameter(name="--json")] = None,
            settings: Annotated[Settings | None, Parameter(name="*", show_default=False)] = None) -> None:
    """Laser and its rivals on amazon-scientific: several seeds, paired significance. Run again to resume.

    Example: laserrec reproduce quality --seeds 5 --json benchmarks/results/quality.json

    Parameters
    ----------
    out
        Everything is kept here.
    seeds
        Seeds 0, 1, ... of every model.
    preset
        Starting point of Laser's settings.
    plot
        Draw the table into this file (.svg or .png).
    quiet
        No progress.
    json_file
        Write all rows to this file.
    """
    from laserrec.bench.machine import describe
    from laserrec.data.dataset import Dataset
    from laserrec.data.prepare import prepare_source
    from laserrec.experiments import quality as work

    config = load_config(preset, None, settings.model_dump(exclude_unset=True) if settings is not None else None)
    prepare_source("amazon-scientific", out / "data", config.data)
    result = work.reproduce(Dataset.load(out / "data"), config, out, range(seeds), not quiet)
    _print(result["summary"], config.eval.k)
    for line in result["laser_over"]:
        out_console.print(over(line, config.eval.k))
    if json_file is not None:
        write_json(json_file, {"machine": describe(), **result})
    if plot is not None:
        work.plot(result["summary"], plot, config.eval.k)


@reproduce_app.command
def cold_start(out: Path = Path("runs/cold-start"), *, seeds: int = 3, share: float = 0.1, preset: str = "small",
               quiet: bool = False, json_file: Annotated[Path | None, Parameter(name="--json")] = None,
               settings: Annotated[Settings | None, Parameter(name="*", show_default=False)] = None) -> None:
    """Items held out of all training, and users of 1, 2, 3 and 5+ items, on amazon-scientific. Run again to resume.

    Example: laserrec reproduce cold-start --seeds 3 --json benchmarks/results/cold_start.json

    Parameters
    ----------
    out
        Everything is kept here.
    seeds
        Seeds 0, 1, ... of the items held out and of the training.
    share
        Share of the items that is held out.
    preset
        Starting point of Laser's settings.
    quiet
        No progress.
    json_file
        Write all rows to this file.
    """
    from laserrec.bench.machine import describe
    from laserrec.data.dataset import Dataset
    from laserrec.data.prepare import prepare_source
    from laserrec.experiments import coldstart as work

    config = load_config(preset, None, settings.model_dump(exclude_unset=True) if settings is not None else None)
    prepare_source("amazon-scientific", out / "data", config.data)
    result = work.reproduce(Dataset.load(out / "data"), config, out, range(seeds), share, not quiet)
    _print_cold_start(result["rows"], config.eval.k)
    if json_file is not None:
        write_json(json_file, {"machine": describe(), **result})


def _print_cold_start(rows: list[dict[str, Any]], k: int) -> None:
    table = Table("target", "history", "model", f"Recall@{k}", f"NDCG@{k}", "cases", "seeds",
                  title="amazon-scientific, test split, all items ranked; new = held out of all training")
    keys = dict.fromkeys((r["target"], r["history"], r["model"]) for r in sorted(
        rows, key=lambda r: (r["target"] != "new", r["history"])))
    for key in keys:
        own = [r for r in rows if (r["target"], r["history"], r["model"]) == key]
        means = [f"{sum(r[m] for r in own) / len(own):.4f}" for m in (f"recall@{k}", f"ndcg@{k}")]
        table.add_row(*key, *means, str(sum(r["users"] for r in own)), str(len(own)))
    out_console.print(table)


def over(line: dict[str, Any], k: int) -> str:
    """One entry of "laser_over" as a sentence."""
    what = {"id": "ID-only", "text": "text"}[line["kind"]]
    recall, ndcg = (line[f"{metric}@{k}_ratio"] for metric in ("recall", "ndcg"))
    return (f"Laser over the best {what} model, {line['best']}: Recall@{k} x {recall:.3f}, NDCG@{k} x {ndcg:.3f}; "
            f"difference of NDCG@{k} {line[f'ndcg@{k}_difference']:+.4f} ({line['low']:+.4f} to {line['high']:+.4f})")


def _print(summary: list[dict[str, Any]], k: int) -> None:
    table = Table("model", f"Recall@{k}", f"NDCG@{k}", "MRR", "seeds", f"NDCG@{k} over the best ID model (95%)",
                  title="amazon-scientific, test split, all items ranked, nothing filtered: mean ± sd over seeds")
    for row in summary:
        cells = [f"{row[m]:.4f} ± {row[m + '_sd']:.4f}" for m in (f"recall@{k}", f"ndcg@{k}", "mrr")]
        difference = f"{row[f'ndcg@{k}_difference']:+.4f} ({row['low']:+.4f} to {row['high']:+.4f})"
        table.add_row(row["model"], *cells, str(row["seeds"]), difference)
    out_console.print(table)
