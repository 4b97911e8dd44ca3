"""A server under load over loopback: seconds per request and requests per second, by callers at once."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from http.client import HTTPConnection
from pathlib import Path
from socket import socket
from typing import Any

import numpy as np
import polars as pl

from laserrec.util.errors import UserError
from laserrec.util.progress import Progress

_START = 300.0
"""Seconds that a server may take to load its model."""


@contextmanager
def running(model: Path, *flags: str) -> Iterator[int]:
    """A server of its own process on a free port of loopback, with a fresh state. Raises UserError if it ends early."""
    with socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with tempfile.TemporaryDirectory(prefix="laserrec-served-") as state:
        command = [sys.executable, "-m", "laserrec", "serve", str(model), "--port", str(port), "--state", state, *flags]
        process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
        try:
            _wait(process, port)
            yield port
        finally:
            process.terminate()
            try:
                process.communicate(timeout=30)
            except subprocess.TimeoutExpired:
                process.kill()
                process.communicate()


def _wait(process: subprocess.Popen, port: int) -> None:
    until = time.monotonic() + _START
    while time.monotonic() < until:
        if process.poll() is not None:
            raise UserError(f"the server ended at once: {process.stderr.read().strip()}")
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/readyz", timeout=5):
                return
        except (urllib.error.URLError, OSError):
            time.sleep(0.2)
    raise UserError(f"the server was not ready after {_START:.0f} s")


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


def serve_bench(model: Path, callers: list[int], requests: int, seconds: float, length: int, show: bool) -> list[dict]:
    """One server, warmed up, driven by each number of callers in turn."""
    try:
        item_ids = pl.read_parquet(model / "items.parquet")["item_id"].to_list()
    except FileNotFoundError:
        raise UserError(f"{model} is not a model folder; make one with laserrec fit") from None
    rows = []
    with running(model) as port:
        drive(port, random_histories(item_ids, 20, length, 0), 1, seconds)
        for seed, count in enumerate(callers, 1):
            with Progress(f"{count} callers", requests, show) as bar:
                histories = random_histories(item_ids, requests, length, seed)
                rows.append(drive(port, histories, count, seconds, bar.advance))
    return rows
