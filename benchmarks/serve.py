"""A server under load over loopback: seconds per request and requests per second, by callers at once.

    laserrec serve runs/quickstart/model --state runs/served --port 8000 &
    python benchmarks/serve.py runs/quickstart/model --port 8000 --json benchmarks/results/serve.json
"""

from __future__ import annotations

import json
import threading
import time
from http.client import HTTPConnection
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import polars as pl
from cyclopts import Parameter, run
from rich.console import Console
from rich.table import Table

from laserrec.util.errors import UserError
from laserrec.util.io import write_json
from laserrec.util.progress import Progress


def random_histories(item_ids: list[str], count: int, length: int, seed: int) -> list[list[str]]:
    """So many that none comes twice, and no cache helps."""
    rng = np.random.default_rng(seed)
    return [[item_ids[i] for i in rng.integers(0, len(item_ids), length)] for _ in range(count)]


class _Caller(threading.Thread):
    def __init__(self, port: int, histories: list[list[str]], until: float, step):
        super().__init__(daemon=True)
        self.port, self.histories, self.until, self.step = port, histories, until, step
        self.seconds: list[float] = []
        self.shed = 0
        self.error: Exception | None = None

    def run(self) -> None:
        connection = HTTPConnection("127.0.0.1", self.port, timeout=60)
        try:
            for history in self.histories:
                if time.monotonic() > self.until:
                    return
                self._one(connection, history)
                self.step(1)
        except Exception as error:  # told by the caller of `drive`
            self.error = error

    def _one(self, connection: HTTPConnection, history: list[str]) -> None:
        start = time.perf_counter()
        connection.request("POST", "/v1/recommend", json.dumps({"history": history}),
                           {"Content-Type": "application/json"})
        answer = connection.getresponse()
        answer.read()
        if answer.status == 200:
            self.seconds.append(time.perf_counter() - start)
        elif answer.status in (429, 503):
            self.shed += 1
        else:
            raise RuntimeError(f"the server answered {answer.status}")


def drive(port: int, histories: list[list[str]], callers: int, seconds: float, step=lambda n: None) -> dict[str, Any]:
    """`callers` threads, each asking again as soon as it is answered, until the histories or the seconds are used up.
    Returns {callers, requests, p50_ms, p99_ms, requests_per_second, shed}. Raises what a caller met."""
    start = time.monotonic()
    threads = [_Caller(port, histories[i::callers], start + seconds, step) for i in range(callers)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    took = time.monotonic() - start
    for thread in threads:
        if thread.error is not None:
            raise thread.error
    times = np.concatenate([thread.seconds for thread in threads])
    if not len(times):
        raise UserError("no request was answered in the time given; raise --seconds")
    return {"callers": callers, "requests": len(times), "p50_ms": round(1000 * float(np.quantile(times, 0.5)), 2),
            "p99_ms": round(1000 * float(np.quantile(times, 0.99)), 2),
            "requests_per_second": round(len(times) / took, 1), "shed": sum(t.shed for t in threads)}


def main(model: Path, *, port: int = 8000, requests: int = 400,
         callers: Annotated[list[int] | None, Parameter(consume_multiple=True)] = None, seconds: float = 60.0,
         history: int = 10, quiet: bool = False,
         json_file: Annotated[Path | None, Parameter(name="--json")] = None) -> None:
    """Drive a server that runs on this machine.

    Parameters
    ----------
    model
        The folder of the model that it serves, for the item ids.
    port
        Where it listens.
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
    json_file
        Write the numbers to this file.
    """
    item_ids = pl.read_parquet(model / "items.parquet")["item_id"].to_list()
    drive(port, random_histories(item_ids, 20, history, 0), 1, seconds)  # warm
    rows = []
    for seed, count in enumerate(callers or [1, 4, 16], 1):
        with Progress(f"{count} callers", requests, not quiet) as bar:
            rows.append(drive(port, random_histories(item_ids, requests, history, seed), count, seconds, bar.advance))
    table = Table("callers", "p50 ms", "p99 ms", "requests/s", "requests", "turned away",
                  title=f"histories of {history} items, no answer cached, over loopback")
    for row in rows:
        table.add_row(str(row["callers"]), f"{row['p50_ms']:.1f}", f"{row['p99_ms']:.1f}",
                      f"{row['requests_per_second']:.1f}", str(row["requests"]), str(row["shed"]))
    Console().print(table)
    if json_file is not None:
        write_json(json_file, rows)


if __name__ == "__main__":
    run(main)
