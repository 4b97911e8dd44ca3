"""What the measurements here share: times of works in turn, the matrix-product peak, memory of a fresh process."""

from __future__ import annotations

import multiprocessing
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch


def product_peak(dtype: torch.dtype, runs: int = 5) -> float:
    """FLOP/s of the fastest of several large matrix products."""
    size = 3072
    a, b = torch.randn(size, size).to(dtype), torch.randn(size, size).to(dtype)
    return 2 * size**3 / min(seconds(lambda: torch.mm(a, b)) for _ in range(runs + 1))


def seconds(work: Callable[[], object]) -> float:
    """How long one call takes."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def side_by_side(works: Sequence[Callable[[], object]], runs: int, progress: Callable[[int], None] | None = None
                 ) -> tuple[list[float], list[list[float]]]:
    """Seconds of each work's first call (compilation included), and of `runs` further ones, in turn, so that a slow
    spell of a shared machine strikes all of them."""
    first = [seconds(work) for work in works]
    out: list[list[float]] = [[] for _ in works]
    for _ in range(runs):
        for times, work in zip(out, works, strict=True):
            times.append(seconds(work))
            if progress:
                progress(1)
    return first, out


def spread(times: Sequence[float]) -> dict[str, float]:
    """Minimum and median, in seconds."""
    return {"minimum_seconds": min(times), "median_seconds": statistics.median(times)}


def peak_memory(work: Callable[..., object], *arguments: object) -> float:
    """GiB of resident memory at the peak of `work(*arguments)` in a fresh process, the interpreter and its libraries
    included. `work` must be importable. Raises RuntimeError if the process dies."""
    context = multiprocessing.get_context("spawn")
    receive, send = context.Pipe(duplex=False)
    process = context.Process(target=_measured, args=(send, work, arguments))
    process.start()
    send.close()
    try:
        return float(receive.recv())
    except EOFError:
        raise RuntimeError(f"the process that measured the memory of {work.__name__} died (out of memory?)") from None
    finally:
        process.join()


def _measured(send: Any, work: Callable[..., object], arguments: tuple) -> None:
    work(*arguments)
    send.send(_peak_bytes() / 2**30)
    send.close()


def _peak_bytes() -> int:
    """Highest resident memory of this process so far."""
    status = Path("/proc/self/status")
    if status.is_file():  # getrusage's figure on Linux is inherited from the process that started this one
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) * 1024
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
