"""What /openapi.json says beyond the routes themselves: every answer that can come, with its shape and headers."""

from http import HTTPStatus
from typing import Any

from fastapi import FastAPI
from pydantic import BaseModel

from nanochat_ray.serve.schema import ErrorBody

_RETRY_AFTER = {"Retry-After": {"description": "seconds to wait", "schema": {"type": "integer"}, "required": True}}
_EVENT = {
    "type": "object",
    "description": "one server-sent event",
    "required": ["data"],
    "properties": {
        "data": {"type": "string", "description": "a chunk or an error as JSON, or [DONE]"},
        "id": {"type": "string", "description": "what to send as Last-Event-ID after a lost connection"},
    },
}
_REPLY_HEADERS = [
    {
        "name": "Idempotency-Key",
        "in": "header",
        "required": False,
        "description": "names the reply, so that it can be asked for again after a lost connection",
        "schema": {"type": "string", "pattern": "^[A-Za-z0-9_-]{1,128}$"},
    },
    {
        "name": "Last-Event-ID",
        "in": "header",
        "required": False,
        "description": "the last id that was received of this reply; only what comes after it is sent",
        "schema": {"type": "string"},
    },
]

Responses = dict[int | str, dict[str, Any]]


def failures(*statuses: int) -> Responses:
    """Errors in OpenAI's shape."""
    found: Responses = {}
    for status in statuses:
        found[status] = {"model": ErrorBody, "description": HTTPStatus(status).phrase}
        if status in (429, 503):
            found[status]["headers"] = _RETRY_AFTER
    return found


def reply_responses(whole: type[BaseModel]) -> Responses:
    """Of a route that writes replies."""
    content = {"text/event-stream": {"schema": _EVENT}}
    answer = {"model": whole, "description": "the whole answer, or a stream of its chunks", "content": content}
    return {200: answer, **failures(400, 401, 403, 404, 408, 409, 413, 429, 500, 503)}


def health_responses(body: type[BaseModel]) -> Responses:
    """Of /health."""
    unready = {"model": body, "description": "no reply could begin now", "headers": _RETRY_AFTER}
    return {200: {"model": body}, **failures(403), 503: unready}


def text_response(media_type: str) -> Responses:
    """Of a route that answers with text."""
    return {200: {"description": "text", "content": {media_type: {"schema": {"type": "string"}}}}}


def describe(api: FastAPI) -> None:
    """Complete the description: what FastAPI says about invalid bodies is not what we answer."""
    made = api.openapi

    def openapi() -> dict[str, Any]:
        if api.openapi_schema is None:
            schema = made()
            for path in schema["paths"].values():
                for operation in path.values():
                    operation["responses"].pop("422", None)
                    if "requestBody" in operation:
                        operation["parameters"] = _REPLY_HEADERS
            for name in ("HTTPValidationError", "ValidationError"):
                schema["components"]["schemas"].pop(name, None)
            api.openapi_schema = schema
        return api.openapi_schema

    api.openapi = openapi  # type: ignore[method-assign]
