"""RAY SHELL: the chat server as a Ray Serve application, one deployment with a FastAPI ingress.

    POST /v1/chat/completions   OpenAI's chat completions, streamed over SSE or whole
    GET  /v1/models  /health  /stats  /openapi.json
    GET  /                      the chat page

The model runs on the engine's own thread, so that health checks and other requests never wait for a decode step.
Nothing a user wrote is logged.

`serve.ingress` pickles `api` with its routes when it decorates the class, so what they use must be defined above it.
"""

import functools
import logging
import os
import signal
import socket
import threading
import time
import uuid
from collections.abc import AsyncIterator, Callable
from contextlib import suppress
from typing import Any, Literal, cast

import ray
import torch
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse, StreamingResponse
from pydantic import BaseModel, ConfigDict, Field
from ray import serve
from starlette.exceptions import HTTPException

from nanochat_ray import chat
from nanochat_ray.cluster import STOP_SIGNALS, connect
from nanochat_ray.engine.load import ChatModel, load_chat_model, require_trained
from nanochat_ray.engine.worker import Busy, EngineThread, Ticket
from nanochat_ray.errors import UserError
from nanochat_ray.serve import schema, sse
from nanochat_ray.serve.http import Guard, page
from nanochat_ray.serve.inbox import GenerationFailed, Inbox

APP_NAME = "chat"
HOST = "127.0.0.1"
MAX_REPLIES = 8  # written at the same time; each holds a KV cache
GRACEFUL_SHUTDOWN_S = 5.0
RETRY_AFTER_S = 2

api = FastAPI(title="nanochat_ray", docs_url=None, redoc_url=None)  # those pages load scripts from other sites
api.add_middleware(Guard)


@api.exception_handler(RequestValidationError)
async def _invalid(_: Request, error: RequestValidationError) -> JSONResponse:
    message, param = schema.describe_invalid(list(error.errors()))
    return JSONResponse(schema.error_body(message, "invalid_request_error", param=param), status_code=400)


@api.exception_handler(UserError)
async def _refused(_: Request, error: UserError) -> JSONResponse:
    return JSONResponse(schema.error_body(str(error), "invalid_request_error"), status_code=400)


@api.exception_handler(Busy)
async def _busy(_: Request, error: Busy) -> JSONResponse:
    body = schema.error_body(f"{error}; try again soon", "overloaded_error", code="overloaded")
    return JSONResponse(body, status_code=503, headers={"Retry-After": str(RETRY_AFTER_S)})


@api.exception_handler(HTTPException)
async def _http(_: Request, error: HTTPException) -> JSONResponse:
    body = schema.error_body(str(error.detail), "invalid_request_error")
    return JSONResponse(body, status_code=error.status_code, headers=error.headers)


def _completion_id() -> str:
    return f"chatcmpl-{uuid.uuid4().hex}"


def _usage(ticket: Ticket) -> schema.Usage:
    generation = ticket.generation
    return schema.Usage.of(generation.prompt_tokens, len(generation.ids) - generation.prompt_tokens)


@serve.deployment(
    # The engine refuses what it cannot take with an error that says so; Ray's own queue must not fill up before.
    max_ongoing_requests=256,
    graceful_shutdown_timeout_s=GRACEFUL_SHUTDOWN_S,
    health_check_period_s=5,
)
@serve.ingress(api)
class ChatServer:
    """One replica: a model, its engine thread, and the HTTP routes.

    Args:
        load: makes the model; called in the replica.
        max_replies: how many replies are written at the same time.
        threads: of the model on a CPU; None takes all cores. (Ray would tell torch to use one.)
    """

    def __init__(self, load: Callable[[], ChatModel], max_replies: int, threads: int | None) -> None:
        torch.set_num_threads(threads or os.cpu_count() or 1)
        self.chat = load()
        self.engine = EngineThread(self.chat.engine, max_replies)
        self.started = time.time()
        self.html, self.policy = page()

    def check_health(self) -> None:
        """Called by Serve, which replaces the replica when this raises."""
        if not self.engine.healthy():
            raise RuntimeError("the engine is stuck or has stopped")

    @api.get("/", include_in_schema=False)
    async def index(self) -> HTMLResponse:
        return HTMLResponse(self.html, headers={"Content-Security-Policy": self.policy})

    @api.get("/health")
    async def health(self) -> JSONResponse:
        """200 while the replica can generate."""
        healthy = self.engine.healthy()
        body = {"status": "ok" if healthy else "engine stuck", "model": self.chat.name}
        return JSONResponse(body, status_code=200 if healthy else 503)

    @api.get("/stats")
    async def stats(self) -> dict[str, Any]:
        """Totals since the start."""
        counters = self.engine.counters
        return {
            "model": {"id": self.chat.name, **self.chat.about},
            "uptime_s": round(time.time() - self.started, 1),
            "replies": {
                "active": self.engine.active,
                "limit": self.engine.max_replies,
                "completed": counters.completed,
                "cancelled": counters.cancelled,
                "failed": counters.failed,
                "refused": counters.refused,
            },
            "tokens": counters.tokens,
            "tokens_per_busy_second": round(counters.tokens / counters.busy_s, 1) if counters.busy_s else 0.0,
        }

    @api.get("/v1/models")
    async def models(self) -> dict[str, Any]:
        model = {"id": self.chat.name, "object": "model", "created": int(self.started), "owned_by": "nanochat_ray"}
        return {"object": "list", "data": [model]}

    @api.post("/v1/chat/completions", response_model=schema.ChatResponse)
    async def chat_completions(self, request: schema.ChatRequest) -> Any:
        if request.model not in (None, self.chat.name):
            message = f"there is no model {request.model!r} here, only {self.chat.name!r}"
            body = schema.error_body(message, "invalid_request_error", code="model_not_found", param="model")
            return JSONResponse(body, status_code=404)
        params = request.sampling()
        prompt_ids = chat.render_prompt(self.chat.engine.tokenizer, request.conversation())  # type: ignore[arg-type]
        # Admitted (or refused) here, before the first byte of the answer, so that the status can still say so.
        inbox = Inbox()
        ticket = self.engine.submit(prompt_ids, params, inbox.put)
        if request.stream:
            include_usage = bool(request.stream_options and request.stream_options.include_usage)
            return StreamingResponse(self._events(ticket, inbox, include_usage), media_type="text/event-stream")
        return await self._whole(ticket, inbox)

    async def _events(self, ticket: Ticket, inbox: Inbox, include_usage: bool) -> AsyncIterator[bytes]:
        chunks = schema.ChunkMaker(_completion_id(), int(time.time()), self.chat.name)
        try:
            yield sse.frame(chunks.first())
            async for piece in inbox.pieces():
                if piece.text:
                    yield sse.frame(chunks.text(piece.text))
                if piece.tool:
                    yield sse.frame(chunks.tool(piece.tool))
                if piece.finish:
                    yield sse.frame(chunks.last(piece.finish))
            if include_usage:
                yield sse.frame(chunks.usage(_usage(ticket)))
            yield sse.DONE
        except GenerationFailed:
            yield sse.frame(schema.error_body("the model failed while it wrote this reply", "server_error"))
        finally:  # also when the client has gone: then the exception is CancelledError or GeneratorExit
            self.engine.cancel(ticket)

    async def _whole(self, ticket: Ticket, inbox: Inbox) -> Any:
        try:
            pieces = [piece async for piece in inbox.pieces()]
        except GenerationFailed:
            body = schema.error_body("the model failed while it wrote this reply", "server_error")
            return JSONResponse(body, status_code=500)
        finally:
            self.engine.cancel(ticket)
        finish = pieces[-1].finish
        assert finish is not None
        message = schema.ReplyMessage(
            content="".join(piece.text for piece in pieces),
            tools=[schema.Tool.of(piece.tool) for piece in pieces if piece.tool and piece.tool.result is not None],
        )
        return schema.ChatResponse(
            id=_completion_id(),
            created=int(time.time()),
            model=self.chat.name,
            choices=[schema.Choice(message=message, finish_reason=schema.openai_finish(finish))],
            usage=_usage(ticket),
        )


class Served(BaseModel):
    """What to serve: a trained stage of a run. The `args` of an application in a Serve config are these fields."""

    model_config = ConfigDict(extra="forbid")

    storage: str
    run: str
    stage: Literal["sft", "base"] = "sft"
    device: Literal["cuda", "mps", "cpu"] | None = None  # the best that there is
    dtype: Literal["bf16", "fp32"] | None = None  # what suits the device
    max_replies: int = Field(MAX_REPLIES, ge=1)
    threads: int | None = Field(None, ge=1)  # of the model on a CPU; all cores


def build(args: Served) -> serve.Application:
    """The application for a trained stage of a run; `nanochat_ray.serve.app:build` is a Serve config's `import_path`.

    Raises:
        UserError: nothing is trained there; says which command trains it.
    """
    require_trained(args.storage, args.run, args.stage)
    load = functools.partial(load_chat_model, args.storage, args.run, args.stage, args.device, args.dtype)
    return app_of(load, args.max_replies, args.threads)


def app_of(
    load: Callable[[], ChatModel], max_replies: int = MAX_REPLIES, threads: int | None = None
) -> serve.Application:
    """The application around any model that `load`, called in the replica, returns.

    The replica takes a GPU where the cluster that this process is connected to has one.
    """
    gpus = 1 if ray.is_initialized() and ray.cluster_resources().get("GPU", 0) >= 1 else 0
    deployment = cast(serve.Deployment, ChatServer).options(ray_actor_options={"num_cpus": 1, "num_gpus": gpus})
    return deployment.bind(load, max_replies, threads)


def serve_until_interrupted(
    storage: str,
    run: str,
    stage: str = "sft",
    port: int = 8000,
    address: str | None = None,
    *,
    device: str | None = None,
    dtype: str | None = None,
    on_ready: Callable[[str], None] = print,
) -> None:
    """Serve a run's model on loopback until Ctrl-C or SIGTERM; then stop everything that was started.

    Args:
        on_ready: called with the URL once the model answers.

    Raises:
        UserError: nothing is trained there, the port is in use, or the model does not load.
    """
    require_trained(storage, run, stage)
    threads = os.environ.get("OMP_NUM_THREADS", "")  # the user's; in other processes Ray sets it
    chosen = {"storage": storage, "run": run, "stage": stage, "device": device, "dtype": dtype}
    served = Served.model_validate({**chosen, "threads": int(threads) if threads.isdigit() else None})
    serve_app_until_interrupted(functools.partial(build, served), port, address, on_ready)


def serve_app_until_interrupted(
    build: Callable[[], serve.Application], port: int, address: str | None, on_ready: Callable[[str], None]
) -> None:
    """As `serve_until_interrupted`, for the application that `build` makes once the cluster is there."""
    require_free_port(port)
    logging.getLogger("ray.serve").setLevel(logging.WARNING)
    with connect(address):
        serve.start(
            http_options={"host": HOST, "port": port},
            logging_config={"log_level": "WARNING", "enable_access_log": False},
        )
        try:
            try:
                serve.run(build(), name=APP_NAME, route_prefix="/")
            except RuntimeError as error:  # Ray's: the replica did not start, with its traceback as text
                raise UserError(f"the model could not be served: {_last_line(error)}") from error
            on_ready(f"http://{HOST}:{port}")
            with suppress(KeyboardInterrupt):
                threading.Event().wait()
        finally:
            for number in STOP_SIGNALS:  # a second Ctrl-C must not leave processes behind
                signal.signal(number, signal.SIG_IGN)
            serve.shutdown()


def _last_line(error: Exception) -> str:
    return [line.strip() for line in str(error).splitlines() if line.strip()][-1]


def require_free_port(port: int) -> None:
    """Raises:
    UserError: something listens on the port already, or it may not be opened.
    """
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((HOST, port))
        except (OSError, OverflowError) as error:
            raise UserError(f"port {port} on {HOST} cannot be opened ({error}); choose another with --port") from error
