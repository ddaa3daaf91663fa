"""The HTTP API in front of any `Backend`: the routes and what surrounds them. No Ray.

    POST /v1/chat/completions  /v1/completions    OpenAI's, streamed as server-sent events or whole
    GET  /v1/models  /health  /stats  /metrics  /openapi.json
    GET  /  /page/…                               the chat page

Nothing a user wrote is logged.
"""

import asyncio
import time
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastapi import APIRouter, FastAPI, Request
from fastapi.responses import JSONResponse
from pydantic import BaseModel
from starlette.responses import Response

from nanochat_ray.serve.answers import ChatResponse, CompletionResponse, Model, ModelList
from nanochat_ray.serve.backend import Backend
from nanochat_ray.serve.body import StrictRoute
from nanochat_ray.serve.http import BODY_TIMEOUT_S, OWNER, Guard, Scope
from nanochat_ray.serve.keys import ApiKeys
from nanochat_ray.serve.metrics import Metrics
from nanochat_ray.serve.openapi import describe, failures, health_responses, reply_responses, text_response
from nanochat_ray.serve.page import PAGE_FOLDER, page_files
from nanochat_ray.serve.refusals import Refusal, install
from nanochat_ray.serve.replies import Replies, caller_of, require_model
from nanochat_ray.serve.schema import ChatRequest, CompletionRequest
from nanochat_ray.serve.streaming import Answer, Departure, EventStream, whole

METRICS_TYPE = "text/plain; version=0.0.4; charset=utf-8"
READY_TIMEOUT_S = 5.0
RETRY_AFTER_S = 2


@dataclass(frozen=True)
class Times:
    """How long things may take, in seconds.

    body           for a request to arrive
    first_update   until a stream begins though the backend has not said anything yet
    keep_alive     of silence, until a stream says that it is still there
    """

    body: float = BODY_TIMEOUT_S
    first_update: float = 5.0
    keep_alive: float = 10.0


class Health(BaseModel):
    status: str
    model: str


def api_of(
    backend: Backend,
    *,
    keys: ApiKeys | None = None,
    allowed_hosts: Collection[str] = (),
    page: Path = PAGE_FOLDER,
    times: Times = Times(),
    clock: Callable[[], float] = time.monotonic,
) -> FastAPI:
    """The application, and in `state.replies` its `Replies`. Holds what requests share, so it is made where it runs.

    Args:
        keys: without them nobody needs one.
        allowed_hosts: names to answer to beside loopback's; see `Guard`.
        page: folder with the chat page's files.
        clock: of the journal; seconds, never going back.
    """
    metrics = Metrics()
    api = FastAPI(title="nanochat_ray", docs_url=None, redoc_url=None)  # those pages load scripts from other sites
    install(api, backend)
    api.state.replies = replies = Replies(backend, metrics, clock)
    api.include_router(_reply_routes(replies, metrics, times))
    api.include_router(_fact_routes(backend, metrics))
    api.include_router(_page_routes(page))
    describe(api)
    api.add_middleware(Guard, allowed_hosts=allowed_hosts, keys=keys, body_timeout_s=times.body)
    api.add_middleware(metrics.counted, route_of=_route_of)  # type: ignore[arg-type]
    return api


def _reply_routes(replies: Replies, metrics: Metrics, times: Times) -> APIRouter:
    router = APIRouter(route_class=StrictRoute)

    @router.post("/v1/chat/completions", responses=reply_responses(ChatResponse))
    async def chat_completions(body: ChatRequest, request: Request) -> Response:
        """A reply to a conversation."""
        caller = caller_of(request.headers, request.scope.get(OWNER, ""))
        return await respond(await replies.chat(body, caller), request, bool(body.stream))

    @router.post("/v1/completions", responses=reply_responses(CompletionResponse))
    async def completions(body: CompletionRequest, request: Request) -> Response:
        """The continuation of texts."""
        caller = caller_of(request.headers, request.scope.get(OWNER, ""))
        return await respond(await replies.completion(body, caller), request, bool(body.stream))

    async def respond(answer: Answer, request: Request, stream: bool) -> Response:
        departure = Departure(request.receive, answer.writing.close)
        try:
            await answer.writing.opened(times.first_update if stream else None)
            metrics.prompt_tokens.inc(answer.prompt_tokens)
            if stream:
                return EventStream(answer, departure, times.keep_alive)  # ends both
            made = await whole(answer)
        except BaseException as error:
            departure.stop()
            answer.over(error)
            raise
        departure.stop()
        answer.over(None)
        return Response(made.model_dump_json(), media_type="application/json")

    return router


def _fact_routes(backend: Backend, metrics: Metrics) -> APIRouter:
    router = APIRouter()
    started = time.time()

    def model() -> Model:
        return Model(id=backend.model.name, created=int(started))

    @router.get("/health", responses=health_responses(Health))
    async def health() -> Response:
        """200 while a reply could begin."""
        try:
            async with asyncio.timeout(READY_TIMEOUT_S):
                ready, state = await backend.ready()
        except TimeoutError:
            ready, state = False, "not answering"
        body = Health(status="ok" if ready else state, model=backend.model.name).model_dump()
        headers = None if ready else {"Retry-After": str(RETRY_AFTER_S)}
        return JSONResponse(body, 200 if ready else 503, headers)

    @router.get("/stats", responses=failures(401, 403))
    async def stats() -> dict[str, Any]:
        """What the server is, and its totals since the start."""
        return {
            "model": {"id": backend.model.name, **backend.model.about},
            "uptime_s": round(time.time() - started, 1),
            "replicas": await backend.stats(),
            "requests": vars(metrics.requests),
        }

    @router.get("/metrics", responses={**text_response(METRICS_TYPE), **failures(401, 403)})
    async def prometheus() -> Response:
        """The same and more, for Prometheus."""
        return Response(metrics.text(await backend.stats()), media_type=METRICS_TYPE)

    @router.get("/v1/models", responses=failures(401, 403))
    async def models() -> ModelList:
        """The model that is served."""
        return ModelList(data=[model()])

    @router.get("/v1/models/{model_id:path}", responses=failures(401, 403, 404))
    async def one_model(model_id: str) -> Model:
        """The model, by its id."""
        require_model(model_id, backend.model.name)
        return model()

    return router


def _page_routes(folder: Path) -> APIRouter:
    router = APIRouter(include_in_schema=False)
    files = page_files(folder)

    def answer(name: str, request: Request) -> Response:
        if name not in files:
            raise Refusal(404, "there is no such file")
        return files[name].answer(request.headers.get("if-none-match", ""))

    @router.get("/")
    async def index(request: Request) -> Response:
        return answer("index.html", request)

    @router.get("/page/{name:path}")
    async def page_file(name: str, request: Request) -> Response:
        return answer(name, request)

    return router


_KNOWN = frozenset({"/v1/chat/completions", "/v1/completions", "/v1/models", "/health", "/stats", "/metrics", "/"})


def _route_of(scope: Scope) -> str:
    """A label for metrics: the route's pattern, or "other" for what has none."""
    route = getattr(scope.get("route"), "path", None)
    if route is not None:
        return str(route)
    return scope["path"] if scope["path"] in _KNOWN else "other"
