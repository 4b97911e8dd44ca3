"""The HTTP application: its parts put together, and errors as answers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.openapi.utils import get_openapi
from fastapi.responses import JSONResponse
from fastapi_offline import FastAPIOffline
from starlette.exceptions import HTTPException

from laserrec import __version__
from laserrec.server.guards import BodyGuard, Counting, HostGuard, Shedding, TokenGuard, problem
from laserrec.server.metrics import ServerMetrics
from laserrec.server.routes import catalogue, operations, recommendations
from laserrec.server.service import ConflictError, Service, StorageError
from laserrec.server.worker import ClosedError, OverloadedError
from laserrec.util.errors import UserError

LOOPBACK = ("localhost", "127.0.0.1", "[::1]")
"""Host names under which nobody else's server can be meant."""
_ERRORS_TOLD = 3


def make_app(service: Service, token: str | None = None, allowed_hosts: Sequence[str] = LOOPBACK) -> FastAPI:
    """An ASGI application. `token`: asked of every caller of /v1 and /metrics, if given. `allowed_hosts`: values of the
    Host header that are answered, without port; "*" allows all, "*.example.org" all names of a domain."""
    app = FastAPIOffline(redoc_url=None, title="laserrec", version=__version__,
                         description="Recommendations for ordered histories. Item ids are your own.",
                         swagger_ui_parameters={"validatorUrl": None})
    metrics = ServerMetrics(service)
    for router in (recommendations(service, metrics), catalogue(service),
                   operations(service, metrics, guarded=token is not None)):
        app.include_router(router)
    app.openapi = lambda: _description(app, token is not None)
    _errors(app, metrics)
    app.add_middleware(BodyGuard, limit=service.limits.max_body)  # the last one is asked first
    app.add_middleware(Shedding, service=service, metrics=metrics)
    app.add_middleware(TokenGuard, token=token)
    app.add_middleware(HostGuard, allowed_hosts=list(allowed_hosts))
    app.add_middleware(Counting, metrics=metrics)
    return app


def _description(app: FastAPI, guarded: bool) -> dict[str, Any]:
    """The OpenAPI document. It names the token's scheme, and asks for it where the server does."""
    if app.openapi_schema is None:
        found = get_openapi(title=app.title, version=app.version, description=app.description, routes=app.routes)
        scheme = {"type": "http", "scheme": "bearer", "description": "The API token that the server asks for, if any."}
        found["components"]["securitySchemes"] = {"token": scheme}
        for path, operations_ in found["paths"].items() if guarded else ():
            for operation in operations_.values() if path.startswith(TokenGuard.protected) else ():
                operation["security"] = [{"token": []}]
        app.openapi_schema = found
    return app.openapi_schema


def _errors(app: FastAPI, metrics: ServerMetrics) -> None:
    """Each error as an answer of the one shape that schema.Problem describes."""

    def answered(kind: type[Exception], status: int, shed: bool = False, text: str | None = None) -> None:
        async def handle(_: Any, error: Exception) -> JSONResponse:
            if shed:
                metrics.shed.inc()
            headers = {} if status < 503 and status != 429 else {"Retry-After": str(getattr(error, "retry_after", 5))}
            return problem(status, text or str(error), headers)

        app.add_exception_handler(kind, handle)

    answered(UserError, 422)
    answered(ConflictError, 409)
    answered(OverloadedError, 429, shed=True)
    answered(TimeoutError, 503, shed=True, text="no answer in time; try again later")
    answered(ClosedError, 503)
    answered(StorageError, 500)
    answered(Exception, 500, text="an internal error; the server's log has it")

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> JSONResponse:
        if isinstance(error.body, bytes):  # it was not read as JSON, which its head does not call it
            kind = request.headers.get("content-type", "")
            return problem(422, "give the header Content-Type: application/json; the body came "
                                + (f"as {kind[:80]}" if kind else "without one"))
        # Without the input, which FastAPI would send back: it may be large, or nothing that JSON can hold.
        return problem(422, _told(error.errors()))

    @app.exception_handler(HTTPException)
    async def http(_: Any, error: HTTPException) -> JSONResponse:
        return problem(error.status_code, str(error.detail), error.headers)


def _told(errors: Sequence[Mapping[str, Any]]) -> str:
    texts = [f"{'.'.join(str(part)[:40] for part in error['loc'])}: {error['msg'].removeprefix('Value error, ')}"
             for error in errors[:_ERRORS_TOLD]]
    return "; ".join(texts) + (f"; and {len(errors) - _ERRORS_TOLD} more" if len(errors) > _ERRORS_TOLD else "")
