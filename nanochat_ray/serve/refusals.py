"""Why a request is not answered as it wished: every refusal with its status and OpenAI's shape, and their handlers."""

from collections.abc import Awaitable, Callable
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from nanochat_ray.errors import UserError
from nanochat_ray.serve.backend import Backend, Busy, GenerationFailed
from nanochat_ray.serve.schema import describe_invalid, error_body
from nanochat_ray.serve.writing import Closed, Diverged, Superseded

INVALID = "invalid_request_error"
CLIENT_GONE = 499  # nobody reads it; tells a reader of metrics what happened


class Refusal(HTTPException):
    """An answer that is an error.

    Args:
        kind: OpenAI's `type`.
        retry_after_s: when to try again, if that may help.
    """

    def __init__(
        self,
        status: int,
        message: str,
        kind: str = INVALID,
        *,
        code: str | None = None,
        param: str | None = None,
        retry_after_s: int | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:
        retry = {} if retry_after_s is None else {"Retry-After": str(retry_after_s)}
        super().__init__(status, message, {**(headers or {}), **retry})
        self.body = error_body(message, kind, code, param)

    def response(self) -> JSONResponse:
        return JSONResponse(self.body, self.status_code, self.headers)


def refusal_of(error: Exception) -> Refusal:
    """The refusal that an exception from writing a reply means."""
    match error:
        case Refusal():
            return error
        case UserError():
            return Refusal(400, str(error))
        case Busy():
            message = f"{error}; try again soon"
            return Refusal(503, message, "overloaded_error", code="overloaded", retry_after_s=error.retry_after_s)
        case Superseded():
            message = "another request with this Idempotency-Key has taken over the reply"
            return Refusal(409, message, code="idempotency_conflict")
        case Diverged():
            return Refusal(409, "the reply cannot be continued: the model has changed", code="model_changed")
        case GenerationFailed():
            return Refusal(500, str(error), "server_error")
        case Closed():
            return Refusal(CLIENT_GONE, "the client has gone")
        case _:
            return Refusal(500, "the model failed while it wrote this reply", "server_error")


def install(api: FastAPI, backend: Backend) -> None:
    """Answer every error of the routes in OpenAI's shape."""

    async def invalid(_: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, RequestValidationError)
        message, param = describe_invalid(list(error.errors()))
        return Refusal(400, message, param=param).response()

    async def http(_: Request, error: Exception) -> JSONResponse:
        if isinstance(error, Refusal):
            return error.response()
        assert isinstance(error, HTTPException)
        return JSONResponse(error_body(str(error.detail), INVALID), error.status_code, error.headers)

    async def refused(_: Request, error: Exception) -> JSONResponse:
        return refusal_of(error).response()

    async def busy(_: Request, error: Exception) -> JSONResponse:
        refusal = refusal_of(error)
        ready, state = await backend.ready()
        if not ready:
            message = f"the server is not ready: {state}; try again soon"
            refusal.body = error_body(message, "overloaded_error", code="starting")
        return refusal.response()

    handlers: dict[type[Exception], Callable[[Request, Exception], Awaitable[Any]]] = {
        RequestValidationError: invalid,
        HTTPException: http,
        Busy: busy,
        **dict.fromkeys((UserError, GenerationFailed, Superseded, Diverged, Closed), refused),
    }
    for kind, handler in handlers.items():
        api.add_exception_handler(kind, handler)  # type: ignore[arg-type]
