"""`laserrec reproduce table1 ... figure4, all`: the paper's tables and figures."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

from cyclopts import App, Parameter

from laserrec.cli.options import ConfigFile, Device, Flags, JsonFile, Quiet, finish, given, say
from laserrec.cli.output import print_table
from laserrec.util.errors import UserError

TITLES = {"table1": "statistics of the data", "table2": "Laser and the rivals", "table3": "trained parameters",
          "table4": "Laser without its parts", "table5": "how an embedding is taken from the LLM",
          "table6": "wording of the prompt", "table7": "number of experts and queries",
          "figure4": "Laser on other ID models"}
Names = Annotated[list[str] | None, Parameter(consume_multiple=True)]
Percents = Annotated[list[float] | None, Parameter(consume_multiple=True)]


def add_paper(app: App) -> None:
    """Give `laserrec reproduce` a command for each table and figure, and `all`."""
    for name, title in TITLES.items():
        app.command(_command(name, title), name=name)
    app.command(figure3)
    app.command(_command("all", "all tables and figures"), name="all")


_BASES = {"table2": "paper-small and small"}
"""Presets that a table is made for, if not paper-small and bi-tuning."""
_WITHOUT_MODELS = ("table1", "table3", "all")


def _command(name: str, title: str) -> Callable[..., None]:
    def command(out: Path = Path("runs/paper"), *, data: Names = None, models: Names = None, bases: Names = None,
                seeds: int = 1, budget: float | None = None, workers: int = 1, device: Device = "auto",
                config: ConfigFile = None, quiet: Quiet = False, json_file: JsonFile = None, flags: Flags = None
                ) -> None:
        if models is not None and name in _WITHOUT_MODELS:
            raise UserError(f"models can't be chosen for {name}; leave --models out")
        _check_numbers(seeds, budget, workers)
        until = _until(budget)

        def one(each: str) -> dict[str, Any]:
            return _one(each, out, data, models, bases, seeds, until, workers, device, config, quiet, flags)

        if name != "all":
            finish(one(name), json_file)
            return
        told = _every(one)
        if data is not None and len(data) > 1:
            told.append(_transfer(out, data, bases, seeds, until, device, config, quiet, flags))
        finish(told, json_file)

    command.__name__ = name
    command.__doc__ = f"""The paper's {name if name != 'all' else 'tables and figures'}: {title}. Run again to resume.

    The result is OUT/{name if name != 'all' else 'NAME'}.json, .md and .png, the paper's own figures beside ours.

    Example: laserrec reproduce {name} --data amazon-scientific amazon-office-2014 --seeds 3 --budget 60

    Parameters
    ----------
    out
        Everything is kept here; what several tables share is fitted once.
    data
        Names of data sets that come with the source tree, or data folders; else amazon-scientific.
    models
        Rows to fit, by name (KAR, "w/o MoE (one expert)"); else all. What was measured of others stays in the result.
    bases
        Presets to start from; else {_BASES.get(name, "paper-small and bi-tuning")}.
    seeds
        Seeds 0, 1, ... of every model in which something is random.
    budget
        Minutes after which nothing new is begun{', for all tables together' if name == 'all' else ''}.
    workers
        Processes that fit side by side.
    """
    return command


def _every(one: Callable[[str], dict[str, Any]]) -> list[dict[str, Any]]:
    """All of TITLES. What this installation can't count is told first and left out: the rest may take hours."""
    from laserrec.experiments.paper import counts

    try:
        counts.check_peft()
    except UserError as error:
        say(f"not measured: table3: {error}")
        left_out = {"experiment": "table3", "title": TITLES["table3"], "rows": [], "missing": [{"why": str(error)}]}
        return [left_out if name == "table3" else one(name) for name in TITLES]
    return [one(name) for name in TITLES]


def figure3(out: Path = Path("runs/paper"), *, data: Names = None, sources: Names = None, models: Names = None,
            percents: Percents = None, bases: Names = None, seeds: int = 1, budget: float | None = None,
            device: Device = "auto", config: ConfigFile = None, quiet: Quiet = False, json_file: JsonFile = None,
            flags: Flags = None) -> None:
    """The paper's figure 3: transfer to another shop with none, few or all of its users. Run again to resume.

    Models that were fitted on one data set go on with a share of another one's training users, beside models that begin
    with nothing on the same users. The result is OUT/figure3.json, .md and .png.

    Example: laserrec reproduce figure3 --data amazon-scientific amazon-office-2014 --percents 0 1 10 100 --budget 60

    Parameters
    ----------
    out
        Everything is kept here; models of whole data sets are those of the other tables.
    data
        Two or more names of data sets that come with the source tree, or data folders; else amazon-scientific and
        amazon-office-2014.
    sources
        Data sets, by name, from which models go to all others; else from each.
    models
        Of Laser, RECFORMER, ZESRec and text SASRec; else all.
    percents
        Shares of the other data set's training users in percent, 0 among them or not; else 0 1 5 10 20 50 100.
    bases
        Presets to start from; else small.
    seeds
        Seeds 0, 1, ... of every model and of the users that are drawn.
    budget
        Minutes after which nothing new is begun.
    """
    _check_numbers(seeds, budget)
    finish(_transfer(out, data, bases, seeds, _until(budget), device, config, quiet, flags, sources, models, percents),
           json_file)


def _transfer(out: Path, data: list[str] | None, bases: list[str] | None, seeds: int, until: float | None,
              device: str, file: Path | None, quiet: bool, flags: Any, sources: list[str] | None = None,
              models: list[str] | None = None, percents: list[float] | None = None) -> dict[str, Any]:
    from laserrec.config import load_config
    from laserrec.experiments.machine import describe
    from laserrec.experiments.paper import curves
    from laserrec.experiments.paper.run import Setup
    from laserrec.experiments.paper.show import write
    from laserrec.experiments.paper.transfer import NAME, PERCENTS, reproduce
    from laserrec.util.io import write_json

    folders = _folders(data or ["amazon-scientific", "amazon-office-2014"], out)
    trees = {base: load_config(base, file, given(flags)) for base in bases or ["small"]}
    setup = Setup(folders, trees, out, device, not quiet)
    found = reproduce(setup, range(seeds), percents or PERCENTS, models, sources, until)
    result: dict[str, Any] = {"machine": describe(), **found}
    write_json(out / f"{NAME}.json", result)
    k = next(iter(trees.values())).eval.k
    for (source, target, base), panel in curves.lines(result["rows"], f"ndcg@{k}").items():
        heads, rows = curves.table(panel)
        print_table(f"NDCG@{k} on {target} of models from {source}, preset {base}, by share of the training users",
                    heads, rows, folded="model")
    for row in result["missing"]:
        say(f"not measured: {curves.told(row)}: {row['why']}")
    files = [out / f"{NAME}.json", *write(result, out, k, curves.markdown, curves.plot)]
    say(f"written: {', '.join(map(str, files))}")
    return result


def _check_numbers(seeds: int, budget: float | None, workers: int = 1) -> None:
    for what, value in (("seeds", seeds), ("workers", workers)):
        if value < 1:
            raise UserError(f"{what} is {value}; it must be at least 1")
    if budget is not None and not budget > 0:
        raise UserError(f"budget is {budget} minutes; it must be above 0")


def _until(budget: float | None) -> float | None:
    """time.monotonic when so many minutes are over."""
    return None if budget is None else time.monotonic() + 60 * budget


def _one(name: str, out: Path, data: list[str] | None, models: list[str] | None, bases: list[str] | None, seeds: int,
         until: float | None, workers: int, device: str, file: Path | None, quiet: bool, flags: Any) -> dict[str, Any]:
    from laserrec.config import load_config
    from laserrec.experiments.machine import describe
    from laserrec.experiments.paper import counts
    from laserrec.experiments.paper.run import Setup, reproduce
    from laserrec.experiments.paper.show import cells, groups, heads, write
    from laserrec.experiments.paper.spec import EXPERIMENTS
    from laserrec.util.io import write_json

    if name == "table3":
        return _counted(name, out, counts.table3(), {
            "llm": "LLM", "tuning": "tuning", "trained": "trained", "share_percent": "% of all",
            "published": "paper's"}, folded="tuning")
    folders = _folders(data or ["amazon-scientific"], out)
    if name == "table1":
        return _counted(name, out, counts.table1(folders), {
            "data": "data", "users": "users", "items": "items", "interactions": "interactions",
            "mean_history": "per user", "density": "density", "published": "paper's"}, folded="data")
    wanted = bases or EXPERIMENTS[name]().bases
    setup = Setup(folders, {base: load_config(base, file, given(flags)) for base in wanted}, out, device, not quiet)
    found_now = reproduce(name, setup, range(seeds), until, workers, models)
    result: dict[str, Any] = {"machine": describe(), **found_now}
    write_json(out / f"{name}.json", result)
    k = next(iter(setup.bases.values())).eval.k
    found = groups(result["rows"], k)
    for place in dict.fromkeys((line["data"], line["base"]) for line in found):
        print_table(f"{result['title']}: {place[0]}, preset {place[1]}, {result['split']} split, all items ranked",
                    ("model", *heads(k)), ((line["model"], *cells(line, k)) for line in found
                                           if (line["data"], line["base"]) == place), folded="model")
    missing: list[dict[str, Any]] = result["missing"]
    for row in missing:
        say(f"not measured: {row['data']}, {row['base']}, {row['model']}: {row['why']}")
    say(f"written: {', '.join(map(str, [out / f'{name}.json', *write(result, out, k)]))}")
    return result


def _counted(name: str, out: Path, rows: list[dict[str, Any]], columns: dict[str, str], folded: str
             ) -> dict[str, Any]:
    """columns: key of the rows -> heading; folded: the key of the column that may be narrow."""
    from laserrec.experiments.machine import describe
    from laserrec.util.io import write_json

    result = {"machine": describe(), "experiment": name, "title": TITLES[name], "rows": rows}
    write_json(out / f"{name}.json", result)
    print_table(TITLES[name], columns.values(), ([_shown(row[key]) for key in columns] for row in rows),
                folded=columns[folded])
    say(f"written: {out / f'{name}.json'}")
    return result


def _shown(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:,}" if isinstance(value, int) else f"{value:.3g}" if isinstance(value, float) else str(value)


def _folders(data: list[str], out: Path) -> dict[str, Path]:
    """Name -> data folder; those that come with the source tree are prepared in OUT/data/NAME."""
    from laserrec.config import DataConfig
    from laserrec.data.prepare import prepare_source
    from laserrec.data.sources import BUNDLED

    folders: dict[str, Path] = {}
    for name in data:
        if name in BUNDLED:
            folders[name] = out / "data" / name
            prepare_source(name, folders[name], DataConfig())
        else:
            folders[Path(name).resolve().name] = Path(name)
    if len(folders) < len(data):
        raise UserError("two of the data folders have the same name; rename one")
    return folders
