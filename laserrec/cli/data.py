"""`laserrec prepare`."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Annotated, Literal

from cyclopts import Parameter

from laserrec.cli.options import (
    READING,
    ConfigFile,
    DataFlags,
    JsonFile,
    Preset,
    Reading,
    Switch,
    finish,
    say,
    settings,
)
from laserrec.cli.output import print_table
from laserrec.util.errors import UserError


def prepare(
    source: str, out: Path, *, items: Path | None = None,
    format: Literal["auto", "amazon2018", "amazon2023", "recbole", "csv", "parquet", "movielens"] = "auto",
    columns: Annotated[list[str] | None, Parameter(consume_multiple=True)] = None,
    vectors: Path | None = None, on_error: Literal["raise", "skip"] = "raise", reading: Reading = READING,
    overwrite: Switch = False, preset: Preset = "small", config: ConfigFile = None, json_file: JsonFile = None,
    flags: DataFlags = None,
) -> None:
    """Clean, number and split raw files into a data folder.

    Examples:
      laserrec prepare amazon-scientific runs/data
      laserrec prepare orders.csv runs/data --items goods.csv --columns user_id=customer item_id=sku timestamp=date
      laserrec prepare orders.csv runs/data --items goods.csv --vectors images.parquet
      laserrec prepare clicks.csv runs/data

    Parameters
    ----------
    source
        A bundled data set's name, a folder with both files, or the interactions' file.
    out
        The data folder to make.
    items
        The items' file, when SOURCE is the interactions' file. Without it, SOURCE may have the items' columns too;
        items have no text where it has none.
    format
        Of the files; auto looks at their names and columns.
    columns
        ours=yours pairs: user_id, item_id, timestamp, position; title, brand, category, further item columns.
    vectors
        Table of the items' own vectors, of images or by another model: item_id, and vector with lists of numbers (or
        one number per column). backbone.item_vectors says how they are used.
    on_error
        skip leaves broken lines out and counts them.
    overwrite
        Replace a data folder of other settings.
    """
    from laserrec.data.losses import LossWarning
    from laserrec.data.prepare import prepare_source
    from laserrec.data.summary import summary_lines

    pairs = dict(_pair(text) for text in columns or [])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", LossWarning)  # the lines below tell the same
        report = prepare_source([source, str(items)] if items else source, out, settings(preset, config, flags).data,
                                format=format, columns=pairs or None, on_error=on_error, overwrite=overwrite,
                                vectors=vectors, **vars(reading))
    one = report["table1"]
    print_table(f"data folder {out}", ("users", "items", "interactions", "avg n", "density"), [
        (f"{one['users']:,}", f"{one['items']:,}", f"{one['interactions']:,}", f"{one['avg_history_length']:.2f}",
         f"{one['density']:.1e}")])
    for line in summary_lines(report):
        say(line)
    if report["reused"]:
        say("the same data folder was there already; it is reused")
    finish(report, json_file)


def _pair(text: str) -> tuple[str, str]:
    ours, equals, yours = text.partition("=")
    if not (ours and equals and yours):
        raise UserError(f"--columns takes ours=yours pairs, such as user_id=customer; {text!r} is none")
    return ours, yours
