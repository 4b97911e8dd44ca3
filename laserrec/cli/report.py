"""`laserrec report`."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from cyclopts import App

from laserrec.cli.options import Device, JsonFile, finish, say

report_app = App(name="report")


@report_app.default
def report(run: Path, *, out: Path | None = None, data: Path | None = None, results: Path | None = None,
           map: Literal["tsne", "pca"] | None = None, device: Device = "auto", json_file: JsonFile = None) -> None:
    """Write one HTML page about a run: curves, results, experts, a map of the items, recommendations.

    Works for every method; what a method does not have is left out. The page loads nothing else and can be mailed.
    The run's data, results and ID model are looked for beside it, as quickstart lays them out. Needs the extra
    `report`: pip install 'laserrec[report]'.

    Examples:
      laserrec report runs/quickstart
      laserrec report runs/model --data runs/data --results results.json --out report.html

    Parameters
    ----------
    run
        A model folder, or a folder with model/ in it (made by quickstart).
    out
        The page; else RUN/report.html.
    data
        The data folder the model was trained on, if it is not beside it.
    results
        What evaluate --json or reproduce quality wrote.
    map
        tsne keeps neighbours together, pca shows the directions of most variance; else tsne unless items are too few.
    """
    from laserrec.report.collect import collect
    from laserrec.report.page import render
    from laserrec.report.places import find
    from laserrec.util.io import check_file, write_text

    places, out = find(run, data, results), out or run / "report.html"
    check_file(out)
    found = collect(places, map, device)
    text = render(found)
    write_text(out, text)
    say(f"report {out}: {len(text.encode()) / 2**20:.1f} MiB")
    finish(found.numbers(), json_file)
