"""Answers and streamed chunks in OpenAI's shapes, for chats and for completions.

What is ours, beyond OpenAI's: `tool` in a delta and `tools` in a message, which show calculator calls (`content` stays
what the reader sees).

Log-probabilities have an entry for each token that the model chose: also for those of calculator calls, which are not
text, and for the mark that ends its turn.
"""

from collections.abc import Sequence
from typing import Any, Literal, Protocol

from pydantic import BaseModel

from nanochat_ray.engine.reply import ChatTokenizer, FinishReason, Piece, ToolCall
from nanochat_ray.engine.sampler import TokenLogprob
from nanochat_ray.serve.logprobs import (
    ChatLogprobs,
    CompletionLogprobs,
    CompletionLogprobsMaker,
    chat_logprobs,
)

OpenAIFinish = Literal["stop", "length"]


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
    refusal: None = None
    tools: list[Tool] = []


class Choice(BaseModel):
    index: int = 0
    message: ReplyMessage
    finish_reason: OpenAIFinish
    logprobs: ChatLogprobs | None = None


class ChatResponse(BaseModel):
    """Answer to a chat request without `stream`."""

    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: int
    model: str
    choices: list[Choice]
    usage: Usage


class CompletionChoice(BaseModel):
    index: int
    text: str
    finish_reason: OpenAIFinish
    logprobs: CompletionLogprobs | None = None
    tools: list[Tool] = []


class CompletionResponse(BaseModel):
    """Answer to a completion request without `stream`."""

    id: str
    object: Literal["text_completion"] = "text_completion"
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: Usage


class Model(BaseModel):
    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "nanochat_ray"


class ModelList(BaseModel):
    object: Literal["list"] = "list"
    data: list[Model]


class Shape(Protocol):
    """How the parts of one answer look: in chunks, as JSON objects, and whole."""

    def first(self, index: int) -> dict[str, Any] | None:
        """What precedes a choice's content."""
        ...

    def skip(self, index: int, sampled: Sequence[int]) -> None:
        """These tokens of a choice were sent earlier."""
        ...

    def text(self, index: int, text: str, logprobs: Sequence[TokenLogprob] = ()) -> dict[str, Any]: ...
    def tool(self, index: int, call: ToolCall) -> dict[str, Any]: ...
    def last(self, index: int, finish: FinishReason) -> dict[str, Any]: ...
    def usage(self, usage: Usage) -> dict[str, Any]: ...
    def whole(self, choices: Sequence[Sequence[Piece]], usage: Usage) -> BaseModel: ...


class _Answer:
    """The part that chats and completions share.

    Args:
        reply_id: of the answer, without prefix.
        created: seconds since 1970.
        with_usage: chunks have a `usage`, which is null in all but the last.
    """

    prefix = ""
    kind = ""

    def __init__(
        self, reply_id: str, created: int, model: str, tokenizer: ChatTokenizer, with_usage: bool = False
    ) -> None:
        self._tokenizer = tokenizer
        self._base: dict[str, Any] = {"id": f"{self.prefix}-{reply_id}", "created": created, "model": model}
        self._head = {**self._base, "object": self.kind}
        self._tail = {"usage": None} if with_usage else {}

    def usage(self, usage: Usage) -> dict[str, Any]:
        return {**self._head, "choices": [], "usage": usage.model_dump()}

    def _chunk(self, index: int, finish: FinishReason | None = None, **content: Any) -> dict[str, Any]:
        choice = {"index": index, **content, "finish_reason": finish and openai_finish(finish)}
        return {**self._head, "choices": [choice], **self._tail}


class ChatShape(_Answer):
    """chat.completion and chat.completion.chunk."""

    prefix = "chatcmpl"
    kind = "chat.completion.chunk"

    def first(self, index: int) -> dict[str, Any] | None:
        return self._chunk(index, delta={"role": "assistant", "content": ""})

    def skip(self, index: int, sampled: Sequence[int]) -> None:
        """Nothing in a chat's chunk depends on the ones before."""

    def text(self, index: int, text: str, logprobs: Sequence[TokenLogprob] = ()) -> dict[str, Any]:
        if not logprobs:
            return self._chunk(index, delta={"content": text})
        made = chat_logprobs(self._tokenizer, logprobs).model_dump()
        return self._chunk(index, delta={"content": text}, logprobs=made)

    def tool(self, index: int, call: ToolCall) -> dict[str, Any]:
        return self._chunk(index, delta={"tool": Tool.of(call).model_dump()})

    def last(self, index: int, finish: FinishReason) -> dict[str, Any]:
        return self._chunk(index, finish, delta={})

    def whole(self, choices: Sequence[Sequence[Piece]], usage: Usage) -> ChatResponse:
        made = []
        for index, pieces in enumerate(choices):
            text, finish, tools, logprobs = _joined(pieces)
            made.append(
                Choice(
                    index=index,
                    message=ReplyMessage(content=text, tools=tools),
                    finish_reason=openai_finish(finish),
                    logprobs=chat_logprobs(self._tokenizer, logprobs) if logprobs else None,
                )
            )
        return ChatResponse(**self._base, choices=made, usage=usage)


class CompletionShape(_Answer):
    """text_completion, which chunks and whole answers are called alike."""

    prefix = "cmpl"
    kind = "text_completion"

    def __init__(
        self, reply_id: str, created: int, model: str, tokenizer: ChatTokenizer, with_usage: bool = False
    ) -> None:
        super().__init__(reply_id, created, model, tokenizer, with_usage)
        self._logprobs: dict[int, CompletionLogprobsMaker] = {}

    def first(self, index: int) -> dict[str, Any] | None:
        return None

    def skip(self, index: int, sampled: Sequence[int]) -> None:
        self._maker(index).skip(sampled)

    def text(self, index: int, text: str, logprobs: Sequence[TokenLogprob] = ()) -> dict[str, Any]:
        made = self._maker(index).make(logprobs).model_dump() if logprobs else None
        return self._chunk(index, text=text, logprobs=made)

    def tool(self, index: int, call: ToolCall) -> dict[str, Any]:
        return self._chunk(index, text="", tool=Tool.of(call).model_dump())

    def last(self, index: int, finish: FinishReason) -> dict[str, Any]:
        return self._chunk(index, finish, text="", logprobs=None)

    def whole(self, choices: Sequence[Sequence[Piece]], usage: Usage) -> CompletionResponse:
        made = []
        for index, pieces in enumerate(choices):
            text, finish, tools, logprobs = _joined(pieces)
            made.append(
                CompletionChoice(
                    index=index,
                    text=text,
                    finish_reason=openai_finish(finish),
                    logprobs=self._maker(index).make(logprobs) if logprobs else None,
                    tools=tools,
                )
            )
        return CompletionResponse(**self._base, choices=made, usage=usage)

    def _maker(self, index: int) -> CompletionLogprobsMaker:
        return self._logprobs.setdefault(index, CompletionLogprobsMaker(self._tokenizer))


def _joined(pieces: Sequence[Piece]) -> tuple[str, FinishReason, list[Tool], list[TokenLogprob]]:
    """Text, end, complete calculator calls and log-probabilities of a whole reply."""
    finish = pieces[-1].finish
    assert finish is not None
    tools = [Tool.of(piece.tool) for piece in pieces if piece.tool and piece.tool.result is not None]
    logprobs = [one for piece in pieces for one in piece.logprobs]
    return "".join(piece.text for piece in pieces), finish, tools, logprobs


def openai_finish(finish: FinishReason) -> OpenAIFinish:
    """OpenAI has no word for too many tool calls; as with `length`, the reply is incomplete."""
    return "stop" if finish == "stop" else "length"


def merge(pieces: Sequence[Piece]) -> list[Piece]:
    """The same pieces with neighbouring text joined, for a reader that lags behind the model."""
    merged: list[list[Piece]] = []
    for piece in pieces:
        last = merged[-1][-1] if merged else None
        if last and last.tool is None and piece.tool is None and last.finish is None:
            merged[-1].append(piece)
        else:
            merged.append([piece])
    return [_join(run) for run in merged]


def _join(run: list[Piece]) -> Piece:
    """Pieces of which only the last may have a tool call (then it is alone) or an end."""
    if len(run) == 1:
        return run[0]
    return Piece(
        tuple(token for piece in run for token in piece.tokens),
        "".join(piece.text for piece in run),
        finish=run[-1].finish,
        logprobs=tuple(one for piece in run for one in piece.logprobs),
    )
