"""The socket and the connections: bound before the model is loaded, limited in number and in time."""

from __future__ import annotations

import asyncio
import errno
import logging
import os
import socket
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import h11
import uvicorn
from fastapi import FastAPI
from uvicorn.protocols.http.h11_impl import H11Protocol

from laserrec.server.settings import Limits
from laserrec.util.errors import UserError

_MOST_CONNECTIONS = 4_096
_BACKLOG = 64
"""Connections that the system holds for the server; also how many it may accept before it can close any."""
_RESERVE = 96
"""File descriptors kept for files and for connections that are about to be closed."""
_EXHAUSTED = (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM)
_log = logging.getLogger("uvicorn.error")


def bind(host: str, port: int) -> socket.socket:
    """A socket with an address, not listening yet. Raises UserError if the name is unknown or the address is taken."""
    found = None
    try:
        family, kind, number, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM,
                                                              flags=socket.AI_PASSIVE)[0]
        found = socket.socket(family, kind, number)
        found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # at once again after a restart
        found.bind(address)
        return found
    except OSError as error:
        if found is not None:
            found.close()
        hint = "is another server running? Give another port" if error.errno == errno.EADDRINUSE else \
            "give an address of this machine and a port that you may use"
        raise UserError(f"can't listen on port {port} of {host}: {error.strerror}; {hint}") from None


def run(app: FastAPI, listener: socket.socket, limits: Limits, ready: Callable[[], None]) -> None:
    """Serve until a signal comes, then answer what waits. `ready` is called as soon as connections are taken."""
    protocol = partial(BoundedProtocol, read_seconds=limits.read_seconds, most=_connections_allowed())
    config = uvicorn.Config(app, http=protocol,  # ty: ignore[invalid-argument-type]  # uvicorn calls it like a class
                            ws="none", log_level="error", access_log=False, backlog=_BACKLOG, server_header=False,
                            timeout_graceful_shutdown=max(1, round(limits.timeout_seconds)))
    _Server(config, ready).run(sockets=[listener])


class _Server(uvicorn.Server):
    def __init__(self, config: uvicorn.Config, ready: Callable[[], None]):
        super().__init__(config)
        self._ready = ready

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        asyncio.get_running_loop().set_exception_handler(_QuietHandler())
        await super().startup(sockets)
        self._ready()


class _QuietHandler:
    """asyncio reports each connection that it can't accept, thousands a second: one line a minute will do."""

    def __init__(self) -> None:
        self._last = -60.0

    def __call__(self, loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        error = context.get("exception")
        if not isinstance(error, OSError) or error.errno not in _EXHAUSTED:
            loop.default_exception_handler(context)
        elif time.monotonic() - self._last >= 60:
            self._last = time.monotonic()
            _log.error("connections are refused: %s; raise the limit (ulimit -n)", error.strerror)


class BoundedProtocol(H11Protocol):
    """HTTP/1.1 whose connections are closed when there are too many of them, when a request is not whole in time, or
    when an answer is not read in time. Parameters: `most`: connections at once."""

    def __init__(self, *args: Any, read_seconds: float, most: int, **more: Any):
        super().__init__(*args, **more)
        self._read_seconds, self._most = read_seconds, most
        self._clock: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:
        super().connection_made(transport)
        if len(self.connections) > self._most:
            transport.abort()
        else:
            self._watch()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._watch()

    def connection_lost(self, exc: Exception | None) -> None:
        self._watch(over=True)
        super().connection_lost(exc)

    def pause_writing(self) -> None:
        super().pause_writing()
        self._watch(stuck=True)

    def resume_writing(self) -> None:
        super().resume_writing()
        self._watch()

    def _watch(self, stuck: bool = False, over: bool = False) -> None:
        """The clock runs from the first moment that the peer is waited for until it isn't any more."""
        waited_for = not over and (stuck or self.conn.their_state in (h11.IDLE, h11.SEND_BODY))
        if waited_for and self._clock is None:
            self._clock = self.loop.call_later(self._read_seconds, self._give_up)
        elif not waited_for and self._clock is not None:
            self._clock.cancel()
            self._clock = None

    def _give_up(self) -> None:
        self._clock = None
        if self.cycle is None or self.cycle.response_complete:
            self.transport.write(b"HTTP/1.1 408 Request Timeout\r\nConnection: close\r\nContent-Length: 0\r\n\r\n")
            self.transport.close()
        self.loop.call_later(1, self.transport.abort)


def _connections_allowed() -> int:
    """As many as the process has file descriptors for, after raising its own limit where it may."""
    try:
        import resource
    except ImportError:  # not on Windows
        return _MOST_CONNECTIONS
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = _MOST_CONNECTIONS + 4 * _RESERVE
    wanted = wanted if hard == resource.RLIM_INFINITY else min(hard, wanted)
    if 0 <= soft < wanted:  # it may be RLIM_INFINITY, which is negative
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
        soft = wanted
    free = (soft if soft >= 0 else wanted) - len(os.listdir("/dev/fd"))
    return max(8, min(_MOST_CONNECTIONS, free - min(_RESERVE, free // 2)))
