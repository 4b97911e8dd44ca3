"""The HTTP side: routes, errors, headers."""

from __future__ import annotations

from importlib import resources
from typing import Annotated, Any

from fastapi import APIRouter, FastAPI, Path, Query
from fastapi.responses import HTMLResponse, JSONResponse, Response

from laserrec import __version__
from laserrec.server import schema
from laserrec.server.guards import BodyLimit, Counting, TokenGuard
from laserrec.server.metrics import ServerMetrics
from laserrec.server.service import Answer, Service, wait
from laserrec.server.settings import MAX_ID, MAX_K, MAX_PAGE
from laserrec.server.worker import ClosedError, OverloadedError
from laserrec.util.errors import UserError

_PAGE_POLICY = ("default-src 'none'; script-src 'self' 'unsafe-inline'; style-src 'self' 'unsafe-inline'; "
                "connect-src 'self'; img-src 'self' data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'")
_ItemPath = Annotated[str, Path(min_length=1, max_length=MAX_ID)]
_K = Annotated[int, Query(ge=1, le=MAX_K)]


def make_app(service: Service, token: str | None = None) -> FastAPI:
    """An ASGI application. `token`: asked of every caller of /v1 and /metrics, if given."""
    app = FastAPI(title="laserrec", version=__version__,
                  description="Recommendations for ordered histories. Item ids are your own.")
    metrics = ServerMetrics(service)
    app.include_router(_recommendations(service, metrics))
    app.include_router(_catalogue(service))
    app.include_router(_operations(service, metrics))
    _errors(app, metrics)
    app.add_middleware(BodyLimit, max_body=service.limits.max_body)
    app.add_middleware(TokenGuard, token=token)
    app.add_middleware(Counting, metrics=metrics)
    return app


def _recommendations(service: Service, metrics: ServerMetrics) -> APIRouter:
    router = APIRouter(prefix="/v1", tags=["recommendations"])

    @router.post("/recommend")
    async def recommend(request: schema.RecommendRequest) -> schema.RecommendAnswer:
        """The best next items of a history."""
        ask, unknown = service.ask(request.history, request.k, request.exclude_seen, request.candidates)
        answer = service.cached(ask)
        metrics.cache.labels("no" if answer is None else "yes").inc()
        if answer is None:
            answer = await wait(service.submit(ask), service.limits.timeout)
        return _recommended(service, answer, request.explain, unknown)

    @router.get("/items/{item_id:path}/similar")
    async def similar(item_id: _ItemPath, k: _K = 10) -> schema.SimilarAnswer:
        """The items whose embeddings are nearest to an item's."""
        if service.model.unknown_items([item_id]):
            return _not_found(item_id)
        ranked = await wait(service.similar(item_id, k), service.limits.timeout)
        return schema.SimilarAnswer(items=_scored(service, Answer(ranked, ()), explain=False))

    return router


def _recommended(service: Service, answer: Answer, explain: bool, unknown: list[str]) -> schema.RecommendAnswer:
    return schema.RecommendAnswer(items=_scored(service, answer, explain), expert=answer.ranked.expert, unknown=unknown)


def _scored(service: Service, answer: Answer, explain: bool) -> list[schema.Scored]:
    rows = []
    for place, (dense, score) in enumerate(zip(answer.ranked.items.tolist(), answer.ranked.scores.tolist(),
                                               strict=True)):
        near = None
        if explain:
            other, similarity = answer.near[place]
            item = service.listing[other]
            near = schema.Near(item_id=item["item_id"], title=item["title"], similarity=similarity)
        rows.append(schema.Scored(**service.listing[dense], rank=place + 1, score=score, nearest_history_item=near))
    return rows


def _catalogue(service: Service) -> APIRouter:
    router = APIRouter(prefix="/v1", tags=["catalogue"])

    @router.get("/items")
    async def items(query: Annotated[str, Query(max_length=200)] = "", limit: Annotated[int, Query(ge=1, le=MAX_PAGE)]
                    = 20, offset: Annotated[int, Query(ge=0)] = 0) -> schema.ItemsPage:
        """Items with all words of `query` in title, brand or category."""
        found, total = service.listing.search(query, limit, offset)
        return schema.ItemsPage(items=[schema.ItemText(**item) for item in found], total=total)

    @router.get("/items/{item_id:path}")
    async def item(item_id: _ItemPath) -> schema.ItemText:
        """One item's texts."""
        if service.model.unknown_items([item_id]):
            return _not_found(item_id)
        return schema.ItemText(**service.listing[int(service.model.dense_items([item_id], "item")[0])])

    @router.post("/items", status_code=201)
    async def add(new: schema.NewItems) -> schema.Changed:
        """Add items to the catalogue: encoded, searchable and on disk when this returns. Nothing is retrained."""
        count = await wait(service.add([item.model_dump() for item in new.items]), 60 + service.limits.timeout)
        return schema.Changed(changed=count, n_items=len(service.listing))

    @router.delete("/items/{item_id:path}")
    async def remove(item_id: _ItemPath) -> schema.Changed:
        """Take an item out of the catalogue: never recommended again, and unknown in histories."""
        if service.model.unknown_items([item_id]):
            return _not_found(item_id)
        count = await wait(service.remove(item_id), 60 + service.limits.timeout)
        return schema.Changed(changed=count, n_items=len(service.listing))

    return router


def _operations(service: Service, metrics: ServerMetrics) -> APIRouter:
    router = APIRouter(tags=["operations"])

    @router.get("/healthz")
    async def health() -> dict[str, str]:
        """The process lives."""
        return {"status": "ok"}

    @router.get("/readyz")
    async def ready() -> dict[str, str]:
        """It takes requests: 200, else 503."""
        if not service.worker.open:
            return JSONResponse({"detail": "shutting down"}, 503, {"Retry-After": "5"})
        return {"status": "ready"}

    @router.get("/metrics", response_class=Response)
    async def read_metrics() -> Response:
        """For Prometheus."""
        return Response(metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    @router.get("/v1/model")
    async def model() -> schema.ModelFacts:
        """What is served."""
        config, changes = service.model.encoder.laser.config, service.changes
        router_there = service.model.encoder.laser.mformer is not None
        return schema.ModelFacts(
            name=service.name, version=__version__, n_items=len(service.listing), backbone=config.backbone.name,
            experts=config.mformer.experts if router_there else None, max_items=config.prompt.max_items,
            added=len(changes.added), removed=len(changes.removed))

    @router.get("/", response_class=HTMLResponse, include_in_schema=False)
    async def page() -> HTMLResponse:
        text = resources.files("laserrec.server").joinpath("static/index.html").read_text("utf-8")
        return HTMLResponse(text, headers={"Content-Security-Policy": _PAGE_POLICY, "X-Content-Type-Options": "nosniff",
                                           "Referrer-Policy": "no-referrer"})

    return router


def _not_found(item_id: str) -> Any:
    return JSONResponse({"detail": f"no item {item_id!r} in the catalogue"}, 404)


def _errors(app: FastAPI, metrics: ServerMetrics) -> None:
    @app.exception_handler(UserError)
    async def mistake(_: Any, error: UserError) -> JSONResponse:
        return JSONResponse({"detail": str(error)}, 422)

    @app.exception_handler(OverloadedError)
    async def overloaded(_: Any, error: OverloadedError) -> JSONResponse:
        metrics.shed.inc()
        return JSONResponse({"detail": str(error)}, 429, {"Retry-After": str(error.retry_after)})

    @app.exception_handler(TimeoutError)
    async def late(_: Any, error: TimeoutError) -> JSONResponse:
        metrics.shed.inc()
        return JSONResponse({"detail": "no answer in time; try again later"}, 503, {"Retry-After": "5"})

    @app.exception_handler(ClosedError)
    async def closed(_: Any, error: ClosedError) -> JSONResponse:
        return JSONResponse({"detail": str(error)}, 503, {"Retry-After": "5"})
