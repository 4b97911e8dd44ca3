"""`laserrec distil`. Thin, as cli.py."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from cyclopts import App, Parameter
from rich.console import Console
from rich.table import Table

from laserrec.cli.settings import StudentSettings
from laserrec.config import StudentConfig, valid
from laserrec.util.io import write_json

distil_app = App(name="distil")
out_console = Console()


@distil_app.default
def distil(data: Path, model: Path, out: Path, *, quiet: bool = False,
           json_file: Annotated[Path | None, Parameter(name="--json")] = None,
           settings: Annotated[StudentSettings | None, Parameter(name="*", show_default=False)] = None) -> None:
    """Make of a fitted model one that answers without the LLM, at an ID model's speed. Run again to resume.

    Example: laserrec distil runs/data runs/model runs/fast

    Parameters
    ----------
    data
        A data folder of MODEL's catalogue, as a rule the one it was fitted on. Its training sequences are learnt from.
    model
        A model folder.
    out
        The model folder to make. It takes MODEL's place in recommend, batch, serve and the rest.
    quiet
        No progress.
    json_file
        Write {"config", "histories", "seconds", "validation": {"teacher", "student"}} to this file.
    """
    from laserrec.data.dataset import Dataset
    from laserrec.recommender.distil import distil as work
    from laserrec.recommender.recommender import LaserRecommender

    config = valid(StudentConfig, settings.model_dump(exclude_unset=True) if settings is not None else {}, "flags")
    made = work(LaserRecommender.from_pretrained(model), Dataset.load(data), out, config, not quiet)
    facts = made.facts["student"]
    metrics = [name for name in facts["validation"]["student"] if name not in ("users", "seconds")]
    table = Table("validation", *metrics, "seconds for all users", title=f"model {out}, {facts['seconds']:.0f} s")
    for name, row in facts["validation"].items():
        table.add_row(name, *(f"{row[m]:.4f}" for m in metrics), f"{row['seconds']:.1f}")
    out_console.print(table)
    if json_file is not None:
        write_json(json_file, {k: v for k, v in facts.items() if k != "fingerprint"})
