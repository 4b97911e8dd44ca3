"""Driving a server under load."""

import json
from http.server import BaseHTTPRequestHandler

import pytest
import serve

from laserrec.util.errors import UserError


@pytest.fixture
def port(listen):
    """A server that refuses unknown items, and sheds every request of a history of one item."""

    class Answers(BaseHTTPRequestHandler):
        def do_POST(self):
            history = json.loads(self.rfile.read(int(self.headers["Content-Length"])))["history"]
            self.send_response(422 if "nope" in history else 503 if len(history) == 1 else 200)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, *_):
            pass

    return listen(Answers)


def test_requests_are_counted_and_timed(port):
    histories = serve.random_histories(["a", "b"], 30, 5, 0)
    row = serve.drive(port, [*histories, ["a"]], callers=3, seconds=30)
    assert row["requests"] == 30 and row["shed"] == 1 and 0 < row["p50_ms"] <= row["p99_ms"]
    assert row["requests_per_second"] > 0


def test_an_error_of_the_server_is_told(port):
    with pytest.raises(RuntimeError, match="answered 422"):
        serve.drive(port, [["nope", "a"]], 1, 5)
    with pytest.raises(UserError, match="no request was answered"):
        serve.drive(port, [["a"]], 1, 5)


def test_random_histories_are_fixed_by_their_seed():
    names = [f"i{j}" for j in range(50)]
    one, two = serve.random_histories(names, 5, 10, 1), serve.random_histories(names, 5, 10, 2)
    assert one == serve.random_histories(names, 5, 10, 1) and one != two
    assert all(len(history) == 10 for history in one) and json.dumps(one)
