"""The real command on real sockets: half-sent requests, too many connections, taken ports, signals."""

import contextlib
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.request

import pytest

from laserrec.server import listening
from laserrec.util.errors import UserError


def start(model_folder, state, *flags, before=None):
    command = [sys.executable, "-m", "laserrec", "serve", str(model_folder), "--port", "0", "--state", str(state)]
    return subprocess.Popen([*command, "--threads", "1", *flags], stderr=subprocess.PIPE, text=True, preexec_fn=before)


@contextlib.contextmanager
def running(model_folder, state, *flags, before=None):
    """The process and its port, taken from the line that says that it is ready."""
    process = start(model_folder, state, *flags, before=before)
    try:
        line = process.stderr.readline()
        yield process, int(re.search(r"ready at http://127\.0\.0\.1:(\d+)", line)[1])
    finally:
        process.kill()
        process.communicate()


def healthy(port):
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/healthz", timeout=10) as answer:
        return answer.status == 200


def closed_after(connection, seconds):
    """What came before the other side closed, and when that was."""
    connection.settimeout(seconds)
    begin, parts = time.monotonic(), []
    with contextlib.suppress(ConnectionResetError):
        while part := connection.recv(4096):
            parts.append(part)
    return b"".join(parts), time.monotonic() - begin


def test_ready_means_listening_and_the_signal_to_end_is_no_failure(model_folder, tmp_path):
    with running(model_folder, tmp_path) as (process, port):
        assert healthy(port)  # the first try, right after the line
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 0
    process = start(model_folder, tmp_path)
    time.sleep(1.5)  # while it loads
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) in (0, -signal.SIGTERM)  # the latter before Python has begun


def test_a_port_that_is_taken_is_said_before_the_model_is_loaded(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        with pytest.raises(UserError, match=f"can't listen on port {port} of 127.0.0.1: .*another server"):
            listening.bind("127.0.0.1", port)
    for host in ("no-such-host.invalid", "203.0.113.7"):
        with pytest.raises(UserError, match=f"can't listen on port 0 of {host}"):
            listening.bind(host, 0)


def test_half_sent_requests_are_closed(model_folder, tmp_path):
    body = b'{"history": ["i1"]}'
    head = b"POST /v1/recommend HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    sent = {"nothing": b"", "part of the head": b"GET /healthz HT", "a head without end": head,
            "a body without end": head + b"Content-Length: 50\r\n\r\n" + body,
            "chunks without end": head + b"Transfer-Encoding: chunked\r\n\r\n5\r\n{\"his"}
    with running(model_folder, tmp_path, "--read-timeout", "1") as (_, port), contextlib.ExitStack() as stack:
        open_ = [stack.enter_context(socket.create_connection(("127.0.0.1", port))) for _ in sent]
        for connection, data in zip(open_, sent.values(), strict=True):
            connection.sendall(data)
        for what, connection in zip(sent, open_, strict=True):
            answer, seconds = closed_after(connection, 20)
            assert seconds < 15, what
            assert not answer or answer.startswith(b"HTTP/1.1 4"), what
        slow = stack.enter_context(socket.create_connection(("127.0.0.1", port)))
        slow.sendall(head + f"Content-Length: {len(body)}\r\nConnection: close\r\n\r\n".encode())
        for at in range(0, len(body), 7):  # not at once, but in time
            time.sleep(0.1)
            slow.sendall(body[at : at + 7])
        assert closed_after(slow, 20)[0].startswith(b"HTTP/1.1 200")


def test_more_connections_than_descriptors_neither_stop_the_server_nor_fill_the_log(model_folder, tmp_path):
    import resource

    def few():
        resource.setrlimit(resource.RLIMIT_NOFILE, (128, 128))

    with running(model_folder, tmp_path, "--read-timeout", "2", before=few) as (process, port):
        with contextlib.ExitStack() as stack:
            for _ in range(200):
                connection = stack.enter_context(socket.create_connection(("127.0.0.1", port)))
                with contextlib.suppress(ConnectionError):
                    connection.sendall(b"GET /healthz HTTP/1.1\r\nHost: x\r\n")
            time.sleep(4)
            assert healthy(port)  # the half-sent ones were closed, though nobody let go of them
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 0
        assert len(process.stderr.read()) < 2_000


def test_the_log_tells_of_refused_connections_once_a_minute(caplog):
    handler = listening._QuietHandler()
    told = []

    class Loop:
        def default_exception_handler(self, context):
            told.append(context)

    for _ in range(50):
        handler(Loop(), {"exception": OSError(24, "Too many open files")})
    handler(Loop(), {"exception": ValueError("other")})
    assert len(caplog.records) == 1 and len(told) == 1 and "ulimit" in caplog.text
