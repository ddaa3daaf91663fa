"""The bodies of requests, with their limits: OpenAI's, and what is ours beyond it. And OpenAI's shape of errors.

What is ours: `top_k`, `min_p` and `repetition_penalty`; parts of type `python` and `python_output` in an assistant
message, so that a client can send an earlier calculator call back in its place.
"""

import secrets
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, model_validator

from nanochat_ray.engine.sampler import MAX_LOGPROBS, MAX_STOP_CHARS, MAX_STOPS, SamplingParams

MAX_BODY_BYTES = 1 << 20
MAX_MESSAGES = 500
MAX_TEXT_CHARS = 100_000
MAX_CHOICES = 8  # of a request in all: one client must not fill a server with two requests
DEFAULT_MAX_TOKENS = 512
_SEED_LIMIT = 1 << 63

# Fields of OpenAI's that change nothing here, whatever their value.
_HARMLESS = (
    "metadata",
    "parallel_tool_calls",
    "prompt_cache_key",
    "prompt_cache_retention",
    "safety_identifier",
    "service_tier",
    "store",
    "user",
)

_Text = Annotated[str, StringConstraints(max_length=MAX_TEXT_CHARS)]
_Stop = Annotated[str, StringConstraints(min_length=1, max_length=MAX_STOP_CHARS)]
# fail_fast: an error for each of a hundred thousand wrong items would take seconds to describe.
_TokenIds = Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=1, max_length=MAX_TEXT_CHARS, fail_fast=True)]


class Part(BaseModel):
    """A piece of a message. `python` and `python_output` are calculator calls of earlier assistant messages."""

    model_config = ConfigDict(extra="forbid", strict=True)

    type: Literal["text", "python", "python_output"]
    text: _Text


class ChatMessage(BaseModel):
    """One message. Text is text: the written form of a special token in it stays plain characters.

    A reply of ours may be sent back as it came: `tools`, `name` and fields that are null are ignored. `developer` is
    OpenAI's newer word for `system`.
    """

    model_config = ConfigDict(strict=True)

    role: Literal["system", "developer", "user", "assistant"]
    content: _Text | Annotated[list[Part], Field(max_length=MAX_MESSAGES, fail_fast=True)]

    @model_validator(mode="before")
    @classmethod
    def _refuse_what_would_be_lost(cls, message: Any) -> Any:
        if isinstance(message, dict):
            lost = [name for name in ("tool_calls", "function_call", "audio") if message.get(name)]
            if lost:
                raise ValueError(f"{lost[0]} in a message is not supported; calculator calls are parts of the content")
        return message


class StreamOptions(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    include_usage: bool | None = None
    include_obfuscation: bool | None = None  # accepted; there is none


class SamplingRequest(BaseModel):
    """What both kinds of requests have in common."""

    # Strict: "0.7" is not a number and true is not 1. NaN and infinity are not JSON.
    model_config = ConfigDict(strict=True, allow_inf_nan=False, extra="forbid")

    # Fields of OpenAI's that would change the answer: with any value but these they are refused rather than ignored.
    neutral: ClassVar[dict[str, tuple[Any, ...]]] = {}

    model: str | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    n: int | None = Field(None, ge=1, le=MAX_CHOICES)
    max_tokens: int | None = Field(None, ge=1)
    temperature: float | None = Field(None, ge=0, le=10)
    top_p: float | None = Field(None, gt=0, le=1)
    top_k: int | None = Field(None, ge=1)
    min_p: float | None = Field(None, ge=0, le=1)
    repetition_penalty: float | None = Field(None, ge=0.1, le=10)
    presence_penalty: float | None = Field(None, ge=-2, le=2)
    frequency_penalty: float | None = Field(None, ge=-2, le=2)
    seed: int | None = Field(None, ge=-_SEED_LIMIT, le=_SEED_LIMIT - 1)
    stop: _Stop | Annotated[list[_Stop], Field(max_length=MAX_STOPS)] | None = None

    @model_validator(mode="before")
    @classmethod
    def _refuse_unsupported(cls, body: Any) -> Any:
        if not isinstance(body, dict):
            return body
        for name, allowed in cls.neutral.items():
            if name in body and not any(body[name] == value and type(body[name]) is type(value) for value in allowed):
                raise ValueError(f"{name} is not supported; leave it out")
        return {name: value for name, value in body.items() if name not in _HARMLESS and name not in cls.neutral}

    @model_validator(mode="after")
    def _refuse_options_without_stream(self) -> "SamplingRequest":
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options has a meaning only with stream: true")
        return self

    @property
    def include_usage(self) -> bool:
        return bool(self.stream_options and self.stream_options.include_usage)

    def _sampling(self, seed: int | None, max_tokens: int | None, logprobs: int | None) -> SamplingParams:
        names = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty", "presence_penalty")
        wished: dict[str, Any] = {name: getattr(self, name) for name in (*names, "frequency_penalty")}
        wished["max_tokens"] = max_tokens or DEFAULT_MAX_TOKENS
        wished["stop"] = (self.stop,) if isinstance(self.stop, str) else self.stop and tuple(self.stop)
        wished["logprobs"] = logprobs
        given = {name: value for name, value in wished.items() if value is not None}
        if self.seed is not None:
            seed = self.seed
        return SamplingParams(**given, seed=secrets.randbits(63) if seed is None else seed)


def _with_ignored_fields(neutral: dict[str, tuple[Any, ...]]) -> ConfigDict:
    """The published schema names what the validator takes out before the fields are looked at."""
    ignored: dict[str, Any] = {name: {} for name in _HARMLESS}
    ignored |= {name: {"enum": list(values)} for name, values in neutral.items()}

    def add(schema: dict[str, Any]) -> None:
        schema["properties"] |= ignored

    return ConfigDict(json_schema_extra=add)


_CHAT_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "logit_bias": (None, {}),
    "tools": (None, []),
    "tool_choice": (None, "none", "auto"),
    "functions": (None, []),
    "function_call": (None, "none", "auto"),
    "response_format": (None, {"type": "text"}),
    "modalities": (None, ["text"]),
    "audio": (None,),
    "prediction": (None,),
    "reasoning_effort": (None,),
    "verbosity": (None,),
    "web_search_options": (None,),
}
_COMPLETION_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "best_of": (None, 1),
    "echo": (None, False),
    "suffix": (None, ""),
    "logit_bias": (None, {}),
}


class ChatRequest(SamplingRequest):
    """Body of POST /v1/chat/completions."""

    model_config = _with_ignored_fields(_CHAT_NEUTRAL)
    neutral = _CHAT_NEUTRAL

    messages: list[ChatMessage] = Field(min_length=1, max_length=MAX_MESSAGES, fail_fast=True)
    max_completion_tokens: int | None = Field(None, ge=1)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=MAX_LOGPROBS)

    @model_validator(mode="after")
    def _refuse_contradictions(self) -> "ChatRequest":
        limits = {self.max_tokens, self.max_completion_tokens} - {None}
        if len(limits) > 1:
            raise ValueError("max_tokens and max_completion_tokens differ; send one of them")
        if self.top_logprobs is not None and not self.logprobs:
            raise ValueError("top_logprobs has a meaning only with logprobs: true")
        return self

    def conversation(self) -> list[dict[str, Any]]:
        """The messages as `nanochat_ray.chat` takes them."""
        messages = [message.model_dump() for message in self.messages]
        return [{**message, "role": "system"} if message["role"] == "developer" else message for message in messages]

    def sampling(self, seed: int | None = None) -> SamplingParams:
        """The sampling parameters.

        Args:
            seed: for a request that names none; without it such a request gets a random one.

        Raises:
            UserError: a value is out of range.
        """
        logprobs = (self.top_logprobs or 0) if self.logprobs else None
        return self._sampling(seed, self.max_completion_tokens or self.max_tokens, logprobs)


class CompletionRequest(SamplingRequest):
    """Body of POST /v1/completions: text that is continued, for models that never learned to chat.

    A prompt of text follows the mark that begins every document; token ids are taken as they are.
    """

    model_config = _with_ignored_fields(_COMPLETION_NEUTRAL)
    neutral = _COMPLETION_NEUTRAL

    prompt: (
        _Text
        | Annotated[list[_Text], Field(min_length=1, max_length=MAX_CHOICES, fail_fast=True)]
        | _TokenIds
        | Annotated[list[_TokenIds], Field(min_length=1, max_length=MAX_CHOICES, fail_fast=True)]
    )
    logprobs: int | None = Field(None, ge=0, le=5)

    @model_validator(mode="after")
    def _refuse_too_many_choices(self) -> "CompletionRequest":
        if len(self.prompts()) * (self.n or 1) > MAX_CHOICES:
            raise ValueError(f"n for each prompt makes more than {MAX_CHOICES} choices; send several requests")
        return self

    def prompts(self) -> list[str | list[int]]:
        """The prompts one by one."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        if isinstance(self.prompt[0], int):
            return [[token for token in self.prompt if isinstance(token, int)]]
        return [prompt for prompt in self.prompt if not isinstance(prompt, int)]

    def sampling(self, seed: int | None = None) -> SamplingParams:
        """As `ChatRequest.sampling`."""
        return self._sampling(seed, self.max_tokens, self.logprobs)


class ErrorDetail(BaseModel):
    message: str
    type: str
    param: str | None
    code: str | None


class ErrorBody(BaseModel):
    """OpenAI's shape of an error."""

    error: ErrorDetail


def error_body(message: str, kind: str, code: str | None = None, param: str | None = None) -> dict[str, Any]:
    """OpenAI's error shape. `kind` is its `type`: invalid_request_error, server_error, overloaded_error, …"""
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def describe_invalid(errors: list[Any]) -> tuple[str, str | None]:
    """(message, parameter) for one of pydantic's errors. Never repeats the value, which may be a user's text."""
    # A value of several possible types has an error for each; one that does not complain of the type says most.
    field = _field(errors[0])
    same = [error for error in errors if _field(error) == field]
    chosen = max(same, key=lambda error: (not error["type"].endswith("_type"), len(error["loc"])))
    where = [str(part) for part in chosen["loc"] if part != "body"]
    if chosen["type"] == "json_invalid":
        return "the body is not valid JSON", None
    if chosen["type"] in ("missing", "model_attributes_type", "model_type") and not where:
        return "send the body as a JSON object with the header Content-Type: application/json", None
    # A union's errors name the branch that was tried; the field is what helps.
    param = ".".join(part for part in where if part.replace("_", "").isalnum()) or None
    message = str(chosen["msg"]).removeprefix("Value error, ")
    if chosen["type"] == "extra_forbidden":
        message = "this field is not known; leave it out"
        param = param and param[:64]
    return (f"{param}: {message}" if param else message), param


def _field(error: Any) -> Any:
    return next((part for part in error["loc"] if part != "body"), None)
