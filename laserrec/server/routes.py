"""The routes. Everything that may take long happens in other threads."""

from __future__ import annotations

from importlib import resources
from pathlib import Path as FilePath
from typing import Annotated, Any

from fastapi import APIRouter, Path, Query
from fastapi.responses import HTMLResponse, JSONResponse, Response
from pydantic import AfterValidator

from laserrec import __version__
from laserrec.server import schema
from laserrec.server.changes import Change, Finished
from laserrec.server.guards import problem
from laserrec.server.listing import NewItem, item_of
from laserrec.server.metrics import ServerMetrics
from laserrec.server.served import Answer, Served, Similar
from laserrec.server.service import Service, wait
from laserrec.server.settings import MAX_K, MAX_PAGE
from laserrec.server.texts import clean_id

_PAGE_POLICY = ("default-src 'none'; script-src 'self' 'unsafe-inline'; style-src 'self' 'unsafe-inline'; "
                "connect-src 'self'; img-src 'self' data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'")
_ItemPath = Annotated[str, Path(min_length=1, description="An item's id."), AfterValidator(clean_id)]
_K = Annotated[int, Query(ge=1, le=MAX_K)]
_Query = Annotated[str, Query(max_length=200)]


def _problems(*statuses: int) -> dict[int | str, dict[str, Any]]:
    told = {400: "Not JSON, or another Host than the server's.", 401: "The API token is missing.",
            403: "Only a server with an API token loads another model.",
            404: "There is no such item or change.", 409: "An item of this id has other texts or another vector.",
            413: "The body is too large.", 422: "The request is not understood.",
            429: "Too much work waits: see Retry-After.", 503: "No answer in time, or shutting down."}
    return {status: {"model": schema.Problem, "description": told[status]} for status in (400, 401, *statuses)}


def recommendations(service: Service, metrics: ServerMetrics) -> APIRouter:
    """Routes that recommend items and find similar ones."""
    router = APIRouter(prefix="/v1", tags=["recommendations"])

    @router.post("/recommend", responses=_problems(413, 422, 429, 503))
    async def recommend(request: schema.RecommendRequest) -> schema.RecommendAnswer:
        """The best next items of a history."""
        served = service.served  # to the end, even if a newer model takes its place meanwhile
        ask, unknown = served.ask(request.history, request.k, request.exclude_seen, request.candidates,
                                  request.exclude)
        answer = served.cached(ask)
        metrics.cache.labels("no" if answer is None else "yes").inc()
        if answer is None:
            answer = await wait(service.submit(served, ask), service.limits.timeout_seconds)
        items = _scored(served, answer, request.explain)
        return schema.RecommendAnswer(items=items, expert=answer.ranked.expert, unknown=unknown)

    @router.get("/items/{item_id:path}/similar", response_model=schema.SimilarAnswer,
                responses=_problems(404, 422, 429, 503))
    async def similar(item_id: _ItemPath, k: _K = 10) -> schema.SimilarAnswer | JSONResponse:
        """The items whose embeddings are nearest to an item's."""
        served = service.served
        if (row := served.listing.row(item_id)) is None:
            return _not_found(item_id)
        ranked = await wait(service.submit(served, Similar(row, k)), service.limits.timeout_seconds)
        return schema.SimilarAnswer(items=_scored(served, Answer(ranked, ()), explain=False))

    return router


def _scored(served: Served, answer: Answer, explain: bool) -> list[schema.Scored]:
    found: list[schema.Scored] = []
    for place, (row, score) in enumerate(zip(answer.ranked.items.tolist(), answer.ranked.scores.tolist(), strict=True)):
        near = None
        if explain and answer.near:
            other, similarity = answer.near[place]
            item = served.listing[other]
            near = schema.Near(item_id=item["item_id"], title=item["title"], similarity=similarity)
        found.append(schema.Scored(**served.listing[row], rank=place + 1, score=score, nearest_history_item=near))
    return found


def catalogue(service: Service) -> APIRouter:
    """Routes that list, add and remove items."""
    router = APIRouter(prefix="/v1", tags=["catalogue"])
    accepted = {202: {"model": schema.ChangeStatus, "description": "Accepted and under way: ask at status_url."}}

    @router.get("/items", responses=_problems(422, 503))
    async def items(query: _Query = "", limit: Annotated[int, Query(ge=1, le=MAX_PAGE)] = 20,
                    offset: Annotated[int, Query(ge=0, le=2**53)] = 0) -> schema.ItemsPage:
        """Items with all words of `query` in title, brand or category."""
        found, total = await service.search(query, limit, offset)
        return schema.ItemsPage(items=[schema.ItemText(**item) for item in found], total=total)

    @router.post("/items", status_code=201, response_model=schema.Changed,
                 responses={**accepted, **_problems(409, 413, 422, 429, 503)})
    async def add(new: schema.NewItems) -> schema.Changed | JSONResponse:
        """Add items to the catalogue. Nothing is retrained. 201: all are encoded, searchable and on disk. 202: that
        takes longer and goes on; ask at `status_url`. The same request may be sent again at any time."""
        return await _outcome(service, service.add([new_item(item) for item in new.items]))

    @router.delete("/items/{item_id:path}", response_model=schema.Changed,
                   responses={**accepted, **_problems(404, 422, 429, 503)})
    async def remove(item_id: _ItemPath) -> schema.Changed | JSONResponse:
        """Take an item out of the catalogue: never recommended again, and unknown in histories."""
        if service.listing.row(item_id) is None:
            return _not_found(item_id)
        return await _outcome(service, service.remove(item_id))

    @router.get("/changes/{change_id}", response_model=schema.ChangeStatus, responses=_problems(404, 422))
    async def change(change_id: str) -> schema.ChangeStatus | JSONResponse:
        """How far a change of the catalogue is that was answered with 202."""
        if (found := service.changes.get(change_id)) is None:
            return problem(404, "no such change; it was long ago or before a restart: look at the items themselves, "
                                "or send the change again, which does no harm")
        return _status(found)

    @router.get("/items/{item_id:path}", response_model=schema.ItemText, responses=_problems(404, 422))
    async def item(item_id: _ItemPath) -> schema.ItemText | JSONResponse:
        """One item's texts."""
        row = service.listing.row(item_id)
        return _not_found(item_id) if row is None else schema.ItemText(**service.listing[row])

    return router


def new_item(given: schema.NewItem) -> NewItem:
    """As the service takes it; what is not given is left out."""
    item = NewItem(**item_of(given.model_dump(include=set(schema.ItemText.model_fields))))
    if given.columns:
        item["columns"] = given.columns
    if given.vector is not None:
        item["vector"] = given.vector
    return item


async def _outcome(service: Service, change: Change) -> schema.Changed | JSONResponse:
    try:
        changed = await wait(change.future, service.limits.timeout_seconds)
    except TimeoutError:
        status = _status(change)
        return JSONResponse(status.model_dump(), 202, {"Location": status.status_url, "Retry-After": "5"})
    return schema.Changed(changed=changed, n_items=len(service.listing))


def _status(change: Change | Finished) -> schema.ChangeStatus:
    return schema.ChangeStatus(id=change.id, state=change.state, done=change.done, total=change.total,
                               detail=change.detail, status_url=f"/v1/changes/{change.id}")


def _not_found(item_id: str) -> JSONResponse:
    return problem(404, f"no item {item_id!r} in the catalogue")


def operations(service: Service, metrics: ServerMetrics, guarded: bool) -> APIRouter:
    """Routes for health checks, metrics, the model itself, and the page to try it. guarded: an API token is asked."""
    router = APIRouter(tags=["operations"])

    @router.get("/healthz")
    async def health() -> dict[str, str]:
        """The process lives."""
        return {"status": "ok"}

    @router.get("/readyz", response_model=dict[str, str], responses={503: {"model": schema.Problem}})
    async def ready() -> dict[str, str] | JSONResponse:
        """It takes requests: 200, else 503."""
        if not service.worker.open:
            return problem(503, "shutting down", {"Retry-After": "5"})
        return {"status": "ready"}

    @router.get("/metrics", response_class=Response, responses={
        200: {"content": {"text/plain": {}}, "description": "Prometheus' text format."}, **_problems()})
    async def read_metrics() -> Response:
        """For Prometheus."""
        return Response(metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    @router.get("/v1/model", responses=_problems())
    async def model() -> schema.ModelFacts:
        """What is served."""
        return _facts(service)

    @router.post("/v1/model", response_model=schema.ModelFacts, responses={
        202: {"model": schema.ChangeStatus, "description": "Accepted and under way: ask at status_url."},
        **_problems(403, 413, 422, 429, 503)})
    async def load(asked: schema.LoadModel) -> schema.ModelFacts | JSONResponse:
        """Serve another model folder of this machine, without a restart. Requests that came before are answered by the
        model that served then; if the other can't be loaded it goes on serving. Added and removed items stay so. 202:
        loading takes longer and goes on; ask at `status_url`."""
        if not guarded:
            return problem(403, "only a server with an API token loads another model; start it with one, or send its "
                                "process SIGHUP, which loads the folder that it serves anew")
        folder, index = (None if name is None else FilePath(name) for name in (asked.folder, asked.index))
        answer = await _outcome(service, service.swap(folder, index))
        return answer if isinstance(answer, JSONResponse) else _facts(service)

    @router.get("/", response_class=HTMLResponse, include_in_schema=False)
    async def page() -> HTMLResponse:
        text = resources.files("laserrec.server").joinpath("static/index.html").read_text("utf-8")
        return HTMLResponse(text, headers={"Content-Security-Policy": _PAGE_POLICY, "X-Content-Type-Options": "nosniff",
                                           "Referrer-Policy": "no-referrer"})

    return router


def _facts(service: Service) -> schema.ModelFacts:
    served = service.served
    model, (added, removed) = served.model, served.counts
    reads = model.fitted.backbone is not None
    prefix = getattr(getattr(model.model, "reader", None), "mformer", None)
    routed = prefix is not None and prefix.router is not None
    return schema.ModelFacts(
        name=served.name, version=__version__, method=model.method, n_items=len(served.listing),
        backbone=model.config.backbone.name if reads else None, experts=len(prefix.experts) if routed else None,
        max_items=model.config.prompt.max_items if reads else None, added=added, removed=removed)
