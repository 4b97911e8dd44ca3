"""ASGI middleware: the host, the token, whether there is room, the body's size, and counting."""

from __future__ import annotations

import asyncio
import hmac
import time
from collections.abc import Mapping, Sequence

from fastapi import HTTPException
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from laserrec.server.metrics import ServerMetrics
from laserrec.server.service import Service
from laserrec.server.settings import MAX_MESSAGE
from laserrec.server.worker import OverloadedError

_PASSED = "laserrec.host"
_METHODS = frozenset(("GET", "HEAD", "POST", "DELETE", "OPTIONS", "PUT", "PATCH"))


def problem(status: int, detail: str, headers: Mapping[str, str] | None = None) -> JSONResponse:
    """An error's answer: schema.Problem, cut to MAX_MESSAGE characters, of what UTF-8 can hold."""
    if len(detail) > MAX_MESSAGE:
        detail = detail[: MAX_MESSAGE - 3] + "..."
    return JSONResponse({"detail": detail.encode("utf-8", "backslashreplace").decode()}, status, headers)


class HostGuard:
    """400 for a Host header of another name than the server's own, so that a web page can't reach a server on its
    reader's machine under a name of its own (DNS rebinding). Probes of whether the server lives ask by address."""

    def __init__(self, app: ASGIApp, allowed_hosts: Sequence[str]):
        self.app, self._allowed = app, TrustedHostMiddleware(_passed, allowed_hosts, www_redirect=False)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["path"] not in ("/healthz", "/readyz"):
            asked = dict(scope)
            await self._allowed(asked, receive, _unsent)  # its own refusal is plain text
            if _PASSED not in asked:
                return await problem(400, "the Host header is another server's name; ask under this server's own, or "
                                          "start it with --allowed-hosts NAME")(scope, receive, send)
        return await self.app(scope, receive, send)


async def _passed(scope: Scope, receive: Receive, send: Send) -> None:
    scope[_PASSED] = True


async def _unsent(message: Message) -> None:
    pass


class TokenGuard:
    """401 without the token where there is one. Parameters: `token`: None lets everybody in."""

    protected = ("/v1/", "/metrics")
    """What paths begin with that need the token."""

    def __init__(self, app: ASGIApp, token: str | None):
        self.app, self._expected = app, None if token is None else f"Bearer {token}".encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        guarded = scope["type"] == "http" and scope["path"].startswith(self.protected)
        if self._expected is not None and guarded:
            given = dict(scope["headers"]).get(b"authorization", b"")
            if not hmac.compare_digest(given, self._expected):
                return await problem(401, "give the API token: Authorization: Bearer TOKEN",
                                     {"WWW-Authenticate": "Bearer"})(scope, receive, send)
        return await self.app(scope, receive, send)


class Shedding:
    """429 for work that the model can't do in time, before its body is read: under load, reading what is turned away
    takes the time of what is answered. The refusal is held back for a moment, since callers who try again at once would
    take that time too."""

    hold_seconds = 0.1

    def __init__(self, app: ASGIApp, service: Service, metrics: ServerMetrics):
        self.app, self._service, self._metrics = app, service, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and (scope["path"] == "/v1/recommend" or scope["path"].endswith("/similar")):
            try:
                self._service.worker.check_room()
            except OverloadedError as error:
                self._metrics.shed.inc()
                answer = problem(429, str(error), {"Retry-After": str(error.retry_after)})
                await asyncio.sleep(self.hold_seconds)
                return await answer(scope, receive, send)
        return await self.app(scope, receive, send)


class BodyGuard:
    """413 for a body of more bytes than `limit`, whether its head says so or not."""

    def __init__(self, app: ASGIApp, limit: int):
        self.app, self._limit = app, limit

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        detail, left = f"the body has more than {self._limit:,} bytes; send less at once", self._limit
        said = dict(scope["headers"]).get(b"content-length", b"")
        if said.isdigit() and int(said) > left:
            return await problem(413, detail)(scope, receive, send)

        async def counted() -> Message:
            nonlocal left
            message = await receive()
            left -= len(message.get("body", b""))
            if left < 0:
                raise HTTPException(413, detail)
            return message

        return await self.app(scope, counted, send)


class Counting:
    """Requests and their seconds, by route and not by path, so that callers can't make labels."""

    def __init__(self, app: ASGIApp, metrics: ServerMetrics):
        self.app, self.metrics = app, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        start, status = time.perf_counter(), 500

        async def watched(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            return await self.app(scope, receive, watched)
        finally:
            route = getattr(scope.get("route"), "path", "other")
            method = scope["method"] if scope["method"] in _METHODS else "other"
            self.metrics.requests.labels(route, method, str(status)).inc()
            self.metrics.seconds.labels(route).observe(time.perf_counter() - start)
