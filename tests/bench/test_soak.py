"""Counting what a server under load answers, refuses, loses and gets wrong."""

import itertools
import json
from http.server import BaseHTTPRequestHandler

import pytest
import soak

ANSWER = {"items": [{"item_id": "a", "score": 0.5}, {"item_id": "b", "score": 0.25}]}
WRONG = {"items": [{"item_id": "b", "score": 0.5}, {"item_id": "a", "score": 0.25}]}


@pytest.fixture
def port(listen):
    """Of four requests to recommend it answers one rightly and one wrongly, refuses one and breaks off one."""
    turn = itertools.count()

    class Answers(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def _send(self, status, body):
            text = json.dumps(body).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(text)))
            self.end_headers()
            self.wfile.write(text)

        def do_GET(self):
            self._send(200, {})

        def do_POST(self):
            self.rfile.read(int(self.headers["Content-Length"]))
            kind = next(turn) % 4
            if kind == 3:
                return self._send(500, {})
            return self._send(429 if kind == 2 else 200, WRONG if kind == 1 else ANSWER)

        def log_message(self, *_):
            pass

    return listen(Answers)


def test_every_request_is_counted_once(port):
    total = soak.Flood()
    for can, seconds in ((50.0, 0.4), (5.0, 4.0)):  # the second is long enough for looks at /healthz
        total.add(soak.flood(port, [["a"], ["b"]], [ANSWER, ANSWER], can, seconds))
    row = total.row()
    assert row["sent"] == 80 and row["answered"] == 40 and row["wrong"] == 20
    assert row["refused"] == 20 and row["lost"] == 20
    assert row["minutes"] >= 0.07 and 5 < row["capacity_per_second"] < 50
    assert row["goodput"] == pytest.approx(row["answered_per_second"] / row["capacity_per_second"], abs=0.02)
    assert 0 < row["accepted_wait_p50_ms"] <= row["accepted_wait_p99_ms"] and row["healthz_p99_ms"] > 0


def test_level_items_may_change_places():
    level = {"items": [{"item_id": "a", "score": 0.5}, {"item_id": "b", "score": 0.5}]}
    assert soak.same({"items": level["items"][::-1]}, level)
    assert not soak.same(WRONG, ANSWER) and not soak.same({"items": ANSWER["items"][:1]}, ANSWER)
