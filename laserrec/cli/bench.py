"""`laserrec bench`: speed and memory, side by side with the obvious way. Thin, as cli.py."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

from cyclopts import App, Parameter
from rich.console import Console
from rich.table import Table

from laserrec.util.io import write_json

bench_app = App(name="bench", help="Measure speed and memory here, side by side with the obvious way. Run nothing else "
                "meanwhile.")
out_console = Console()

JsonFile = Annotated[Path | None, Parameter(name="--json", help="Write the numbers to this file.")]
DataFolder = Annotated[Path | None, Parameter(help="A data folder; else amazon-scientific is prepared for it.")]
Quiet = Annotated[bool, Parameter(help="No progress.")]


def _help(text: str) -> Parameter:
    return Parameter(help=text)


@Parameter(name="*")
@dataclass(frozen=True)
class EngineFlags:
    """What is timed."""

    backbone: Annotated[str, _help("The LLM, as backbone.name.")] = "smollm2-135m"
    layers: Annotated[int | None, _help("Use only the first so many layers of the LLM.")] = None
    batch_size: Annotated[int, _help("Histories or items per step.")] = 16
    histories: Annotated[int, _help("Histories in all.")] = 32
    items: Annotated[int, _help("Items in all, where items are encoded.")] = 96
    runs: Annotated[int, _help("Timed runs of each side, in turn.")] = 7
    threads: Annotated[int | None, _help("Threads of torch; else its own choice.")] = None


_DEFAULTS = EngineFlags()


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


def _run(work: Callable[..., dict[str, Any]], data: Path | None, flags: EngineFlags, file: Path | None, quiet: bool
         ) -> dict[str, Any]:
    import torch

    from laserrec.bench.engine import Setting
    from laserrec.bench.machine import describe

    settings = asdict(flags)
    if threads := settings.pop("threads"):
        torch.set_num_threads(threads)
    with _data(data) as folder:
        result = work(Setting(data=folder, **settings), not quiet)
    result.setdefault("machine", describe())
    if file is not None:
        write_json(file, result)
    return result


def _print_engine(title: str, result: dict[str, Any]) -> None:
    table = Table("", "tokens/s", "minimum s", "median s", "of peak", "memory", title=title)
    names = list(result["times"])
    for name in names:
        times = result["times"][name]
        share, memory = {names[0]: ("peak_share", "peak_memory_gib"),
                         names[1]: ("reference_peak_share", "reference_peak_memory_gib")}.get(name, ("", ""))
        table.add_row(name, f"{result['real_tokens'] / times['minimum_seconds']:,.0f}",
                      f"{times['minimum_seconds']:.2f}", f"{times['median_seconds']:.2f}",
                      f"{result[share]:.0%}" if share in result else "",
                      f"{result[memory]:.2f} GiB" if memory in result else "")
    out_console.print(table)
    out_console.print(f"ratio {result['ratio']:.2f} (medians {result['ratio_of_medians']:.2f}; to the fastest "
                      f"reference {result['ratio_to_fastest_reference']:.2f}); {result['real_tokens']:,} real tokens, "
                      f"products' peak {result['product_peak_gflops']:.0f} GFLOP/s; compiling took "
                      f"{result['compile_seconds']:.0f} s, once", highlight=False, soft_wrap=True)


def _print_encoding(result: dict[str, Any]) -> None:
    _print_engine("encoding users", result)
    _print_engine("encoding items", result["items"])
    _print_engine("encoding items, texts read before", result["items_shared"])


@bench_app.command
def train(data: DataFolder = None, *, flags: EngineFlags = _DEFAULTS, quiet: Quiet = False,
          json_file: JsonFile = None) -> None:
    """Time train steps of our frozen-LLM engine and of transformers' model, after checking that both agree.

    Example: laserrec bench train --runs 7 --json train.json
    """
    from laserrec.bench.engine import bench_train

    _print_engine("train step", _run(bench_train, data, flags, json_file, quiet))


@bench_app.command
def encode(data: DataFolder = None, *, flags: EngineFlags = _DEFAULTS, quiet: Quiet = False,
           json_file: JsonFile = None) -> None:
    """Time the encoding of users and items by our engine and by transformers' model, after checking that both agree.

    Example: laserrec bench encode --runs 7 --json encode.json
    """
    from laserrec.bench.engine import bench_encode

    _print_encoding(_run(bench_encode, data, flags, json_file, quiet))


@bench_app.command
def engine(data: DataFolder = None, *, flags: EngineFlags = _DEFAULTS, quiet: Quiet = False,
           json_file: JsonFile = None) -> None:
    """Both of the above and the LLM tokens of an epoch: what benchmarks/results/engine.json keeps.

    Example: laserrec bench engine --json benchmarks/results/engine.json
    """
    from laserrec.bench.engine import bench_engine

    result = _run(bench_engine, data, flags, json_file, quiet)
    _print_engine("train step", result["train"])
    _print_encoding(result["encode"])
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


@bench_app.command
def serve(model: Path, *, callers: Annotated[list[int] | None, Parameter(consume_multiple=True)] = None,
          requests: int = 400, seconds: float = 60.0, history: int = 10, quiet: bool = False,
          json_file: JsonFile = None) -> None:
    """Start a server on loopback and drive it: seconds per request and requests per second, by callers at once.

    Example: laserrec bench serve runs/quickstart/model --json benchmarks/results/serve.json

    Parameters
    ----------
    model
        A model folder.
    callers
        Callers at once, each asking again as soon as it is answered; 1, 4 and 16 if not given.
    requests
        Requests for each number of callers.
    seconds
        Time bound for each number of callers.
    history
        Items of a history; they are drawn at random, so that no answer is in the cache.
    quiet
        No progress.
    """
    from laserrec.bench.serve import serve_bench

    rows = serve_bench(model, callers or [1, 4, 16], requests, seconds, history, not quiet)
    table = Table("callers", "p50 ms", "p99 ms", "requests/s", "requests", "turned away",
                  title=f"histories of {history} items, no answer cached, over loopback")
    for row in rows:
        table.add_row(str(row["callers"]), f"{row['p50_ms']:.1f}", f"{row['p99_ms']:.1f}",
                      f"{row['requests_per_second']:.1f}", str(row["requests"]), str(row["shed"]))
    out_console.print(table)
    if json_file is not None:
        write_json(json_file, rows)
