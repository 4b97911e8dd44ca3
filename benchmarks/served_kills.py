"""A server killed while callers add and remove items: what it acknowledged must be there after a restart."""

from __future__ import annotations

import contextlib
import itertools
import json
import random
import re
import shutil
import threading
import time
from http.client import HTTPConnection, HTTPException
from pathlib import Path

from forked import command, started


def served_rows(model: Path, folder: Path, kills: int) -> list[dict]:
    """One row: kills after which all acknowledged changes were there, and how many changes that were."""
    folder.mkdir(parents=True, exist_ok=True)
    state, errors, draw = folder / "state", folder / "errors", random.Random(0)
    shutil.rmtree(state, ignore_errors=True)
    there: dict[str, bool] = {}
    acknowledged = lost = survived = 0
    for number in range(kills):
        with started(_serve(model, state), errors):
            port = _port(errors)
            now = _missing(port, there)
            lost, survived = lost + now, survived + (number > 0 and now == 0)
            writer = Writer(port, number)
            writer.start()
            time.sleep(draw.uniform(0.0, 0.4))
        writer.join()
        acknowledged += writer.acknowledged
        there = writer.there  # earlier ones were looked at after the last kill
        there.pop(writer.unsure, None)
    with started(_serve(model, state), errors):
        now = _missing(_port(errors), there)
        lost, survived = lost + now, survived + (now == 0)
    return [{"what": "served changes", "kills": kills, "survived": survived,
             "acknowledged": acknowledged, "lost": lost}]


def _serve(model: Path, state: Path):
    return command("serve", model, "--port", 0, "--state", state, "--device", "cpu", "--threads", 1)


def _port(errors: Path) -> int:
    until = time.monotonic() + 60
    while time.monotonic() < until:
        text = errors.read_text("utf-8") if errors.exists() else ""
        if found := re.search(r"ready at http://127\.0\.0\.1:(\d+)", text):
            return int(found[1])
        if "error" in text:
            break
        time.sleep(0.01)
    raise SystemExit(f"the server did not start: {text}")


def _call(port: int, method: str, path: str, body: dict | None = None) -> int:
    connection = HTTPConnection("127.0.0.1", port, timeout=20)
    try:
        connection.request(method, path, body and json.dumps(body), {"Content-Type": "application/json"})
        return connection.getresponse().status
    finally:
        connection.close()


def _missing(port: int, there: dict[str, bool]) -> int:
    return sum((_call(port, "GET", f"/v1/items/{name}") == 200) != kept for name, kept in there.items())


class Writer(threading.Thread):
    """Adds items, and removes some of them, until the server is gone."""

    def __init__(self, port: int, number: int):
        super().__init__(daemon=True)
        self._port, self._number = port, number
        self.there: dict[str, bool] = {}
        """By id: added, or removed; only what was acknowledged."""
        self.acknowledged = 0
        self.unsure: str | None = None
        """The id that was under way."""

    def run(self) -> None:
        with contextlib.suppress(OSError, HTTPException):
            for step in itertools.count():
                name = f"n{self._number}x{step}"
                self._do(name, "POST", "/v1/items", {"items": [{"item_id": name, "title": f"saw {step}"}]})
                if step % 3 == 0:
                    self._do(name, "DELETE", f"/v1/items/{name}")

    def _do(self, name: str, method: str, path: str, body: dict | None = None) -> None:
        self.unsure = name
        if _call(self._port, method, path, body) not in (200, 201):
            raise HTTPException("not acknowledged")
        self.there[name], self.unsure = method == "POST", None
        self.acknowledged += 1
