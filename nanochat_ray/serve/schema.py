"""The OpenAI chat-completions protocol as we speak it: requests with their limits, responses, chunks and errors.

What is ours, beyond OpenAI's: `top_k` in a request; `tool` in a delta and `tools` in a message, which show calculator
calls (`content` stays what the reader sees); and parts of type `python` and `python_output` in an assistant message,
so that a client can send an earlier call back in its place.
"""

import secrets
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from nanochat_ray.engine.reply import FinishReason, Piece, ToolCall
from nanochat_ray.engine.sampler import SamplingParams

MAX_BODY_BYTES = 1 << 20
MAX_MESSAGES = 500
MAX_TEXT_CHARS = 100_000
DEFAULT_MAX_TOKENS = 512

# Fields of OpenAI's that would change the answer. Any value but these is refused rather than ignored.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "n": (None, 1),
    "logprobs": (None, False),
    "top_logprobs": (None, 0),
    "presence_penalty": (None, 0),
    "frequency_penalty": (None, 0),
    "logit_bias": (None, {}),
    "tools": (None, []),
    "functions": (None, []),
    "response_format": (None, {"type": "text"}),
}

OpenAIFinish = Literal["stop", "length"]


class Part(BaseModel):
    """A piece of a message. `python` and `python_output` are calculator calls of earlier assistant messages."""

    type: Literal["text", "python", "python_output"]
    text: str = Field(max_length=MAX_TEXT_CHARS)


class ChatMessage(BaseModel):
    """One message. Text is text: the written form of a special token in it stays plain characters."""

    role: Literal["system", "user", "assistant"]
    content: str | list[Part]

    @model_validator(mode="after")
    def _limit_text(self) -> "ChatMessage":
        if isinstance(self.content, str) and len(self.content) > MAX_TEXT_CHARS:
            raise ValueError(f"the content has {len(self.content)} characters; at most {MAX_TEXT_CHARS} are allowed")
        return self


class StreamOptions(BaseModel):
    include_usage: bool = False


class ChatRequest(BaseModel):
    """Body of POST /v1/chat/completions."""

    # Strict: "0.7" is not a number and true is not 1. NaN and infinity are not JSON.
    model_config = ConfigDict(strict=True, allow_inf_nan=False)

    model: str | None = None
    messages: list[ChatMessage] = Field(min_length=1, max_length=MAX_MESSAGES)
    stream: bool = False
    stream_options: StreamOptions | None = None
    max_tokens: int | None = None
    max_completion_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    seed: int | None = None
    stop: str | list[str] | None = None

    @model_validator(mode="before")
    @classmethod
    def _refuse_unsupported(cls, body: Any) -> Any:
        if isinstance(body, dict):
            for name, neutral in _NEUTRAL.items():
                if name in body and body[name] not in neutral:
                    raise ValueError(f"{name} is not supported; leave it out")
        return body

    def sampling(self) -> SamplingParams:
        """The sampling parameters; a request without a seed gets a random one.

        Raises:
            UserError: a value is out of range.
        """
        wished: dict[str, Any] = {
            "temperature": self.temperature,
            "top_p": self.top_p,
            "top_k": self.top_k,
            "max_tokens": self.max_completion_tokens if self.max_completion_tokens is not None else self.max_tokens,
            "stop": (self.stop,) if isinstance(self.stop, str) else self.stop and tuple(self.stop),
        }
        given = {name: value for name, value in wished.items() if value is not None}
        seed = secrets.randbits(63) if self.seed is None else self.seed
        return SamplingParams(**{"max_tokens": DEFAULT_MAX_TOKENS, **given, "seed": seed})

    def conversation(self) -> list[dict[str, Any]]:
        """The messages as `nanochat_ray.chat` takes them."""
        return [message.model_dump() for message in self.messages]


class Tool(BaseModel):
    """A calculator call; `result` is null while the model is still writing the expression."""

    expression: str
    result: str | None

    @staticmethod
    def of(call: ToolCall) -> "Tool":
        return Tool(expression=call.expression, result=call.result)


class Usage(BaseModel):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int

    @staticmethod
    def of(prompt_tokens: int, completion_tokens: int) -> "Usage":
        return Usage(
            prompt_tokens=prompt_tokens,
            completion_tokens=completion_tokens,
            total_tokens=prompt_tokens + completion_tokens,
        )


class ReplyMessage(BaseModel):
    role: Literal["assistant"] = "assistant"
    content: str
    tools: list[Tool] = []


class Choice(BaseModel):
    index: int = 0
    message: ReplyMessage
    finish_reason: OpenAIFinish
    logprobs: None = None


class ChatResponse(BaseModel):
    """Answer to a request without `stream`."""

    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: int
    model: str
    choices: list[Choice]
    usage: Usage


class ChunkMaker:
    """The chunks of one streamed answer, as JSON objects."""

    def __init__(self, completion_id: str, created: int, model: str) -> None:
        self._head = {"id": completion_id, "object": "chat.completion.chunk", "created": created, "model": model}

    def first(self) -> dict[str, Any]:
        return self._chunk({"role": "assistant", "content": ""})

    def text(self, text: str) -> dict[str, Any]:
        return self._chunk({"content": text})

    def tool(self, call: ToolCall) -> dict[str, Any]:
        return self._chunk({"tool": Tool.of(call).model_dump()})

    def last(self, finish: FinishReason) -> dict[str, Any]:
        return self._chunk({}, openai_finish(finish))

    def usage(self, usage: Usage) -> dict[str, Any]:
        return {**self._head, "choices": [], "usage": usage.model_dump()}

    def _chunk(self, delta: dict[str, Any], finish: OpenAIFinish | None = None) -> dict[str, Any]:
        return {**self._head, "choices": [{"index": 0, "delta": delta, "finish_reason": finish}]}


def openai_finish(finish: FinishReason) -> OpenAIFinish:
    """OpenAI has no word for too many tool calls; as with `length`, the reply is incomplete."""
    return "stop" if finish == "stop" else "length"


def merge(pieces: list[Piece]) -> list[Piece]:
    """The same pieces with neighbouring text joined, for a reader that lags behind the model."""
    merged: list[Piece] = []
    for piece in pieces:
        last = merged[-1] if merged else None
        if last and last.tool is None and piece.tool is None and last.finish is None:
            merged[-1] = Piece(last.tokens + piece.tokens, last.text + piece.text, finish=piece.finish)
        else:
            merged.append(piece)
    return merged


def error_body(message: str, kind: str, code: str | None = None, param: str | None = None) -> dict[str, Any]:
    """OpenAI's error shape. `kind` is its `type`: invalid_request_error, server_error, overloaded_error."""
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def describe_invalid(errors: list[Any]) -> tuple[str, str | None]:
    """(message, parameter) for the first of pydantic's errors. Never repeats the value, which may be a user's text."""
    first = errors[0]
    where = [str(part) for part in first["loc"] if part != "body"]
    if first["type"] == "json_invalid":
        return "the body is not valid JSON", None
    if first["type"] == "model_attributes_type" and not where:
        return "send the body as a JSON object with the header Content-Type: application/json", None
    # A union's errors name the branch that was tried; the field is what helps.
    param = ".".join(part for part in where if part not in ("str", "list[Part]", "list[str]")) or None
    message = str(first["msg"]).removeprefix("Value error, ")
    return (f"{param}: {message}" if param else message), param
