"""ASGI middleware: the size of bodies, the token, and counting. Plain ASGI, so that nothing is buffered twice."""

from __future__ import annotations

import hmac
import time
from collections.abc import Callable
from typing import Any

from starlette.responses import JSONResponse

from laserrec.server.metrics import ServerMetrics

_PROTECTED = ("/v1/", "/metrics")


class BodyLimit:
    """413 for a body that is larger than it may be, said or not."""

    def __init__(self, app: Any, max_body: int):
        self.app, self.max_body = app, max_body

    async def __call__(self, scope: dict, receive: Callable, send: Callable) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        said = dict(scope["headers"]).get(b"content-length", b"0")
        parts, size, more = [], 0, scope["method"] not in ("GET", "HEAD")
        too_large = said.isdigit() and int(said) > self.max_body
        while more and not too_large:
            message = await receive()
            if message["type"] == "http.disconnect":
                return None
            parts.append(message.get("body", b""))
            size, more = size + len(parts[-1]), message.get("more_body", False)
            too_large = size > self.max_body
        if too_large:
            return await JSONResponse({"detail": f"the body is larger than {self.max_body} bytes"}, 413)(
                scope, receive, send)
        whole = iter([{"type": "http.request", "body": b"".join(parts), "more_body": False}])

        async def replay() -> dict:
            message = next(whole, None)
            return await receive() if message is None else message

        return await self.app(scope, replay if parts else receive, send)


class TokenGuard:
    """401 without the token where there is one. Parameters: `token`: None lets everybody in."""

    def __init__(self, app: Any, token: str | None):
        self.app, self._expected = app, None if token is None else f"Bearer {token}".encode()

    async def __call__(self, scope: dict, receive: Callable, send: Callable) -> None:
        guarded = scope["type"] == "http" and scope["path"].startswith(_PROTECTED)
        if self._expected is not None and guarded:
            given = dict(scope["headers"]).get(b"authorization", b"")
            if not hmac.compare_digest(given, self._expected):
                return await JSONResponse({"detail": "give the API token: Authorization: Bearer TOKEN"}, 401,
                                          {"WWW-Authenticate": "Bearer"})(scope, receive, send)
        return await self.app(scope, receive, send)


class Counting:
    """Requests and their seconds, by route and not by path, so that ids don't become labels."""

    def __init__(self, app: Any, metrics: ServerMetrics):
        self.app, self.metrics = app, metrics

    async def __call__(self, scope: dict, receive: Callable, send: Callable) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        start, status = time.perf_counter(), 500

        async def watched(message: dict) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            return await self.app(scope, receive, watched)
        finally:
            route = scope["route"].path if scope.get("route") is not None else "other"
            self.metrics.requests.labels(route, scope["method"], str(status)).inc()
            self.metrics.seconds.labels(route).observe(time.perf_counter() - start)
