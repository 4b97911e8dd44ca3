"""A server at twice its capacity for a while: what is answered, refused, lost or wrong, how long answers take, memory.

Server and callers share this machine and talk over loopback alone. First each history is asked for alone, so that the
right answers are known. Then, round after round of three minutes, the capacity is measured by 16 and 32 callers who ask
again as soon as they are answered (the most answers a second count), and requests are sent at fixed times, twice as
many as that, whether or not earlier ones were answered. The capacity is measured again each round because the speed of
a shared machine changes within half an hour; goodput is what was answered in the rounds over what could have been.

  python benchmarks/soak.py runs/quickstart/model --minutes 30 --out benchmarks/results/soak.json
"""

from __future__ import annotations

import argparse
import itertools
import json
import multiprocessing
import re
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.client import HTTPConnection, HTTPException
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np
import polars as pl

from laserrec.util.io import write_json

CALLERS = 96
"""Requests that may be under way at once."""
MOST_REQUESTS = 2_000_000
_PROBE_SECONDS = 0.05
"""Between two looks at /healthz."""
_ROUND_SECONDS = 180.0


@contextmanager
def served(model: Path, *options: str) -> Iterator[tuple[int, int]]:
    """(port, process id) of a fresh server without a cache. options: further ones of `laserrec serve`."""
    with tempfile.TemporaryDirectory(prefix="laserrec-soak-") as state:
        command = [sys.executable, "-m", "laserrec", "serve", str(model), "--port", "0", "--state", f"{state}/served",
                   "--cache", "0", *options]
        process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
        try:
            line = process.stderr.readline()
            if (found := re.search(r"ready at http://127\.0\.0\.1:(\d+)", line)) is None:
                raise SystemExit(f"the server did not start: {line}{process.stderr.read()}")
            threading.Thread(target=process.stderr.read, daemon=True).start()  # its log must not fill the pipe
            yield int(found[1]), process.pid
        finally:
            process.terminate()
            process.wait(60)


class Caller:
    """One connection; a new one after each failure."""

    def __init__(self, port: int):
        self._port, self._connection = port, None

    def ask(self, history: list[str]) -> tuple[int, dict]:
        return self.call("POST", "/v1/recommend", json.dumps({"history": history, "exclude_seen": True}))

    def call(self, method: str, path: str, body: str | None = None) -> tuple[int, dict]:
        """Status and JSON; status 0 if there was no answer."""
        for retry in (True, False):
            fresh = self._connection is None
            self._connection = self._connection or HTTPConnection("127.0.0.1", self._port, timeout=30)
            try:
                self._connection.request(method, path, body, {"Content-Type": "application/json"})
                answer = self._connection.getresponse()
                return answer.status, json.loads(answer.read() or b"{}")
            except (OSError, HTTPException, ValueError):
                self._connection.close()
                self._connection = None
                if fresh or not retry:  # a kept connection may have been closed by the server in between
                    break
        return 0, {}


class LeanCaller:
    """Sends ready-made requests over one kept connection and takes an answer's bytes as they are. Callers usually run
    elsewhere: here each moment that they take is the server's loss."""

    def __init__(self, port: int):
        self._port, self._socket = port, None

    def ask(self, request: bytes) -> tuple[int, bytes]:
        """Status and body; status 0 if there was no answer."""
        for retry in (True, False):
            fresh = self._socket is None
            try:
                self._socket = self._socket or socket.create_connection(("127.0.0.1", self._port), timeout=30)
                self._socket.sendall(request)
                return self._answer()
            except (OSError, ValueError):
                if self._socket is not None:
                    self._socket.close()
                self._socket = None
                if fresh or not retry:
                    break
        return 0, b""

    def _answer(self) -> tuple[int, bytes]:
        data = b""
        while (end := data.find(b"\r\n\r\n")) < 0:
            data += self._more()
        head = data[:end].lower()
        size = int(head.split(b"content-length:", 1)[1].split(b"\r\n", 1)[0]) if b"content-length:" in head else 0
        while len(data) < end + 4 + size:
            data += self._more()
        return int(data[9:12]), data[end + 4 :]

    def _more(self) -> bytes:
        if not (part := self._socket.recv(65536)):
            raise ValueError("the connection was closed")
        return part


def request_of(history: list[str], port: int) -> bytes:
    """What `Caller.ask` sends."""
    body = json.dumps({"history": history, "exclude_seen": True}).encode()
    return (f"POST /v1/recommend HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\nContent-Type: application/json\r\n"
            f"Content-Length: {len(body)}\r\n\r\n").encode() + body


def same(answer: dict, want: dict) -> bool:
    """Equal but for rounding: batches change the last digits of scores, and so the order of items that are level."""
    scores = [np.array([item["score"] for item in a["items"]]) for a in (answer, want)]
    if len(scores[0]) != len(scores[1]) or not np.allclose(*scores, atol=1e-4):
        return False
    ids = [[item["item_id"] for item in a["items"]] for a in (answer, want)]
    level = {item["item_id"]: item["score"] for item in want["items"]}
    last = want["items"][-1]["score"] if want["items"] else 0.0
    return all(one == other or abs(level.get(one, last) - level[other]) < 2e-4
               for one, other in zip(*ids, strict=True))


def in_threads(count: int, work: Callable[[int], None]) -> None:
    threads = [threading.Thread(target=work, args=(j,), daemon=True) for j in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def capacity(port: int, histories: list[list[str]], callers: int, seconds: float) -> float:
    """Answers a second to callers who ask again as soon as they are answered."""
    until, answered = time.monotonic() + seconds, Counter()

    def work(number: int) -> None:
        caller = LeanCaller(port)
        for request in itertools.cycle([request_of(history, port) for history in histories[number::callers]]):
            if time.monotonic() > until:
                return
            answered[number] += caller.ask(request)[0] == 200

    in_threads(callers, work)
    return answered.total() / seconds


@dataclass
class Flood:
    """What became of the requests of one round or several. waits: seconds of those answered; probes: of looks at
    /healthz; possible: answers that the measured capacity would give in that time."""

    sent: int = 0
    seconds: float = 0.0
    possible: float = 0.0
    seen: Counter[str] = field(default_factory=Counter)
    waits: list[float] = field(default_factory=list)
    probes: list[float] = field(default_factory=list)

    def add(self, other: Flood) -> None:
        for name in ("sent", "seconds", "possible", "seen", "waits", "probes"):
            setattr(self, name, getattr(self, name) + getattr(other, name))

    def row(self) -> dict:
        counts = {kind: self.seen[kind] for kind in ("answered", "refused", "lost", "wrong")}
        return {"minutes": round(self.seconds / 60, 2), "sent": self.sent, **counts,
                "answered_per_second": round(self.seen["answered"] / self.seconds, 1),
                "capacity_per_second": round(self.possible / self.seconds, 1),
                "goodput": round(self.seen["answered"] / self.possible, 3),
                "accepted_wait_p50_ms": _quantile(self.waits, 0.5), "accepted_wait_p99_ms": _quantile(self.waits, 0.99),
                "healthz_p99_ms": _quantile(self.probes, 0.99)}


def flood(port: int, histories: list[list[str]], wanted: list[dict], can: float, seconds: float) -> Flood:
    """2 * `can` requests a second at fixed times, and looks at /healthz beside them."""
    rate = 2 * can
    count = min(MOST_REQUESTS, round(rate * seconds))
    turn, begin, requests = itertools.count(), time.monotonic(), [request_of(history, port) for history in histories]
    found, lock, bodies = Flood(sent=count), threading.Lock(), []

    def work(_: int) -> None:
        caller = LeanCaller(port)
        while (number := next(turn)) < count:
            time.sleep(max(0.0, begin + number / rate - time.monotonic()))
            which, start = number % len(histories), time.monotonic()
            status, body = caller.ask(requests[which])
            took = time.monotonic() - start
            kind = {200: "answered", 429: "refused", 503: "refused"}.get(status, "lost")
            with lock:
                found.seen[kind] += 1
                if kind == "answered":
                    found.waits.append(took)
                    bodies.append((which, body))

    with probed(port) as found.probes:
        in_threads(CALLERS, work)
        found.seconds = time.monotonic() - begin
    found.possible = can * found.seconds
    # Afterwards, so that the looking takes nothing from the server.
    found.seen["wrong"] = sum(not same(json.loads(body), wanted[which]) for which, body in bodies)
    return found


@contextmanager
def probed(port: int) -> Iterator[list[float]]:
    """Seconds that each look at /healthz took; filled at the end. A process of its own looks: in this one it would wait
    for the callers' threads too."""
    spawning, seconds = multiprocessing.get_context("spawn"), []
    here, there = spawning.Pipe()
    looking = spawning.Process(target=_probe, args=(port, there), daemon=True)
    looking.start()
    try:
        yield seconds
        here.send("over")
        seconds += here.recv()
    finally:
        looking.join(60)


def _probe(port: int, over: Connection) -> None:
    caller, seconds = Caller(port), []
    while not over.poll(_PROBE_SECONDS):
        start = time.monotonic()
        alive = caller.call("GET", "/healthz")[0] == 200
        seconds.append(time.monotonic() - start if alive else 30.0)
    over.send(seconds)


def _quantile(seconds: list[float], q: float) -> float | None:
    return round(1000 * float(np.quantile(seconds, q)), 1) if seconds else None


def rss_mib(process: int) -> float:
    """Resident memory of a process."""
    text = Path(f"/proc/{process}/status").read_text("utf-8")
    return round(int(re.search(r"VmRSS:\s+(\d+) kB", text)[1]) / 1024, 1)


def soak(model: Path, minutes: float, length: int, warm_seconds: float) -> dict:
    """The whole measurement."""
    ids, rng = pl.read_parquet(model / "items.parquet")["item_id"].to_list(), np.random.default_rng(0)
    histories = [[ids[row] for row in rng.integers(0, len(ids), length)] for _ in range(200)]
    with served(model) as (port, process):
        caller = Caller(port)
        answers = [caller.ask(history) for history in histories]
        if any(status != 200 for status, _ in answers):
            raise SystemExit(f"the server did not answer alone: {Counter(status for status, _ in answers)}")
        start, total = rss_mib(process), Flood()
        while total.seconds < 60 * minutes:
            can = max(capacity(port, histories, callers, warm_seconds / 2) for callers in (16, 32))
            left = 60 * minutes - total.seconds
            total.add(flood(port, histories, [answer for _, answer in answers], can, min(_ROUND_SECONDS, left)))
            print(json.dumps(total.row()), file=sys.stderr, flush=True)
        return {**total.row(), "rss_start_mib": start, "rss_end_mib": rss_mib(process)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--minutes", type=float, default=30.0, help="at most 120")
    parser.add_argument("--history", type=int, default=10, help="items of each history")
    parser.add_argument("--warm-seconds", type=float, default=16.0, help="for measuring the capacity, each round")
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    if not 0 < given.minutes <= 120:
        parser.error("--minutes must be above 0 and at most 120")
    row = soak(given.model, given.minutes, given.history, given.warm_seconds)
    print(json.dumps(row, indent=2))
    if given.out is not None:
        write_json(given.out, row)


if __name__ == "__main__":
    main()
