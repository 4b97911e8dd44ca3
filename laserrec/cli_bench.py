"""`laserrec bench`: speed and memory, side by side with the obvious way. Thin, as cli.py."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

from cyclopts import App, Parameter
from rich.console import Console
from rich.table import Table

from laserrec.io import write_json

bench_app = App(name="bench", help="Measure speed and memory here, side by side with the obvious way. Run nothing else "
                "meanwhile.")
out_console = Console()

JsonFile = Annotated[Path | None, Parameter(name="--json", help="Write the numbers to this file.")]
DataFolder = Annotated[Path | None, Parameter(help="A data folder; else amazon-scientific is prepared for it.")]


@contextmanager
def _data(folder: Path | None) -> Iterator[Path]:
    from laserrec.config import DataConfig
    from laserrec.data.prepare import prepare_source

    if folder is not None:
        yield folder
        return
    with tempfile.TemporaryDirectory(prefix="laserrec-bench-") as scratch:
        prepare_source("amazon-scientific", Path(scratch) / "data", DataConfig())
        yield Path(scratch) / "data"


def _run(work: Callable[..., dict[str, Any]], data: Path | None, file: Path | None, quiet: bool, **settings: Any
         ) -> dict[str, Any]:
    import torch

    from laserrec.bench.engine import Setting
    from laserrec.bench.machine import describe

    if threads := settings.get("threads"):
        torch.set_num_threads(threads)
    with _data(data) as folder:
        result = work(Setting(data=folder, **settings), not quiet)
    result.setdefault("machine", describe())
    if file is not None:
        write_json(file, result)
    return result


def _print_engine(title: str, result: dict[str, Any]) -> None:
    table = Table("", "tokens/s", "minimum s", "median s", "share of peak", "peak memory", title=title)
    names = list(result["times"])
    for name in names:
        times = result["times"][name]
        share = {names[0]: "peak_share", names[1]: "reference_peak_share"}.get(name)
        memory = {names[0]: "peak_memory_gib", names[1]: "reference_peak_memory_gib"}.get(name)
        table.add_row(name, f"{result['real_tokens'] / times['minimum_seconds']:,.0f}",
                      f"{times['minimum_seconds']:.2f}", f"{times['median_seconds']:.2f}",
                      f"{result[share]:.0%}" if share else "", f"{result[memory]:.2f} GiB" if memory in result else "")
    out_console.print(table)
    out_console.print(f"ratio {result['ratio']:.2f} (medians {result['ratio_of_medians']:.2f}; to the fastest "
                      f"reference {result['ratio_to_fastest_reference']:.2f}); {result['real_tokens']:,} real tokens, "
                      f"products' peak {result['product_peak_gflops']:.0f} GFLOP/s", highlight=False)


@bench_app.command
def train(data: DataFolder = None, *, layers: int | None = None, batch_size: int = 32, histories: int = 64,
          runs: int = 7, threads: int | None = None, quiet: bool = False, json_file: JsonFile = None) -> None:
    """Time train steps of our frozen-LLM engine and of transformers' model, after checking that both agree.

    Example: laserrec bench train --runs 7 --json train.json

    Parameters
    ----------
    layers
        Use only the first so many layers of the LLM.
    batch_size
        Histories per step.
    histories
        Histories in all.
    runs
        Timed runs of each, in turn.
    threads
        Threads of torch; else its own choice.
    quiet
        No progress.
    """
    from laserrec.bench.engine import bench_train

    result = _run(bench_train, data, json_file, quiet, layers=layers, batch_size=batch_size, histories=histories,
                  runs=runs, threads=threads)
    _print_engine("train step", result)


@bench_app.command
def encode(data: DataFolder = None, *, layers: int | None = None, batch_size: int = 32, histories: int = 64,
           items: int = 256, runs: int = 7, threads: int | None = None, quiet: bool = False,
           json_file: JsonFile = None) -> None:
    """Time the encoding of users and items by our engine and by transformers' model, after checking that both agree.

    Example: laserrec bench encode --runs 7 --json encode.json

    Parameters
    ----------
    layers
        Use only the first so many layers of the LLM.
    batch_size
        Histories or items per pass.
    histories
        Histories in all.
    items
        Items in all.
    runs
        Timed runs of each, in turn.
    threads
        Threads of torch; else its own choice.
    quiet
        No progress.
    """
    from laserrec.bench.engine import bench_encode

    result = _run(bench_encode, data, json_file, quiet, layers=layers, batch_size=batch_size, histories=histories,
                  items=items, runs=runs, threads=threads)
    _print_engine("encoding users", result)
    _print_engine("encoding items", result["items"])


@bench_app.command
def engine(data: DataFolder = None, *, layers: int | None = None, runs: int = 7, threads: int | None = None,
           quiet: bool = False, json_file: JsonFile = None) -> None:
    """Both of the above and the LLM tokens of an epoch: what benchmarks/results/engine.json keeps.

    Example: laserrec bench engine --json benchmarks/results/engine.json

    Parameters
    ----------
    layers
        Use only the first so many layers of the LLM.
    runs
        Timed runs of each, in turn.
    threads
        Threads of torch; else its own choice.
    quiet
        No progress.
    """
    from laserrec.bench.engine import bench_engine

    result = _run(bench_engine, data, json_file, quiet, layers=layers, runs=runs, threads=threads)
    _print_engine("train step", result["train"])
    _print_engine("encoding users", result["encode"])
    _print_engine("encoding items", result["encode"]["items"])
    for name, count in result["tokens_per_epoch"].items():
        out_console.print(f"LLM tokens, {name}: {count:,}", highlight=False)


@bench_app.command
def score(*, sizes: Annotated[list[int] | None, Parameter(consume_multiple=True)] = None, width: int = 576,
          batch_size: int = 128, runs: int = 3, quiet: bool = False, json_file: JsonFile = None) -> None:
    """Time and memory of the softmax over all items (with gradient) and of ranking them, ours and plain torch's.

    Example: laserrec bench score --sizes 10000 100000 1000000

    Parameters
    ----------
    sizes
        Numbers of items; 10,000, 100,000 and 1,000,000 if not given.
    width
        Of the embeddings.
    batch_size
        Users at once.
    runs
        Timed runs of each.
    quiet
        No progress.
    """
    from laserrec.bench.machine import describe
    from laserrec.bench.score import bench_score

    rows = bench_score(sizes or [10_000, 100_000, 1_000_000], width, batch_size, runs, not quiet)
    table = Table("items", "task", "ours s", "torch s", "ours GiB", "torch GiB",
                  title=f"{batch_size} users, {width} wide; memory of a fresh process beyond items and libraries")
    for row in rows:
        table.add_row(f"{row['items']:,}", row["task"], *(f"{row[name]:.2f}" for name in (
            "ours_seconds", "torch_seconds", "ours_gib", "torch_gib")))
    out_console.print(table)
    if json_file is not None:
        write_json(json_file, {"machine": describe(), "rows": rows})
