"""A server in a process of its own."""

import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from socket import socket

_START_SECONDS = 300.0


@contextmanager
def running(model: Path, *flags: str) -> Iterator[int]:
    """Its port on loopback; its state is fresh. Raises RuntimeError with what it said if it ends early."""
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
    until = time.monotonic() + _START_SECONDS
    while time.monotonic() < until:
        if process.poll() is not None:
            raise RuntimeError(f"the server ended at once: {process.stderr.read().strip()}")
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/readyz", timeout=5):
                return
        except (urllib.error.URLError, OSError):
            time.sleep(0.2)
    raise RuntimeError(f"the server was not ready after {_START_SECONDS:.0f} s")
