"""A reply on its way to the client: as server-sent events while it is written, or whole. Stops when the client goes."""

import asyncio
import time
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel
from starlette.responses import Response

from nanochat_ray.engine.reply import Piece
from nanochat_ray.serve import sse
from nanochat_ray.serve.answers import Shape, Usage
from nanochat_ray.serve.backend import Waiting
from nanochat_ray.serve.http import Receive, Scope, Send
from nanochat_ray.serve.journal import Skipped, Written
from nanochat_ray.serve.position import Position
from nanochat_ray.serve.refusals import refusal_of
from nanochat_ray.serve.writing import Closed, Happening, Writing


@dataclass
class Answer:
    """A request that is being answered.

    begun     the client came back: it has the beginning
    on_over   called once, when it is over: with its error, or None
    """

    writing: Writing
    shape: Shape
    written: Sequence[Written]
    prompt_tokens: int
    position: Position
    begun: bool
    include_usage: bool
    on_over: Callable[[BaseException | None], None] | None

    def over(self, error: BaseException | None) -> None:
        """Stop the work, if there still is any; only the first call counts."""
        self.writing.close()
        if self.on_over is not None:
            self.on_over(error)
            self.on_over = None

    @property
    def usage(self) -> Usage:
        return Usage.of(self.prompt_tokens, sum(len(choice.tokens) for choice in self.written))


async def whole(answer: Answer) -> BaseModel:
    """The answer once all choices are complete.

    Raises:
        as `Writing.take`.
    """
    pieces: list[list[Piece]] = [[] for _ in answer.written]
    while (happened := await answer.writing.take()) is not None:
        for index, happening in happened:
            if isinstance(happening, Piece):
                pieces[index].append(happening)
    return answer.shape.whole(pieces, answer.usage)


async def events(answer: Answer, keep_alive_s: float) -> AsyncGenerator[bytes, None]:
    """The answer as a stream, in portions: all that has happened by the time the client took the portion before."""
    frames = _Frames(answer)
    sent_at = time.monotonic()
    try:
        if data := frames.first():
            yield data
        while (happened := await answer.writing.take(keep_alive_s)) is not None:
            data = frames.of(happened)
            if not data and time.monotonic() - sent_at >= keep_alive_s:
                data = sse.KEEP_ALIVE
            if data:
                yield data
                sent_at = time.monotonic()
        yield frames.end()
    except Closed:
        raise
    except Exception as error:  # the status was sent long ago
        yield sse.frame(refusal_of(error).body)
        raise


class _Frames:
    """Makes frames of what happens, and keeps the position."""

    def __init__(self, answer: Answer) -> None:
        self._answer = answer
        self._shape = answer.shape
        self._sent = list(answer.position.choices)
        self._waiting: list[Waiting | None] = [None] * len(self._sent)
        self._state: dict[str, Any] | None = None  # the last that was sent; None before any, and while writing

    def first(self) -> bytes:
        if self._answer.begun:
            return b""
        chunks = [self._shape.first(index) for index in range(len(self._sent))]
        return b"".join(sse.frame(chunk) for chunk in chunks if chunk)

    def of(self, happened: Sequence[Happening]) -> bytes:
        return b"".join(self._one(index, happening) for index, happening in happened)

    def end(self) -> bytes:
        usage = sse.frame(self._shape.usage(self._answer.usage)) if self._answer.include_usage else b""
        return usage + sse.DONE

    def _one(self, index: int, happening: Piece | Waiting | Skipped) -> bytes:
        if isinstance(happening, Skipped):
            self._shape.skip(index, happening.sampled)
            return b""
        if isinstance(happening, Waiting):
            self._waiting[index] = happening
            return self._state_now()
        self._waiting[index] = None
        return self._state_now() + self._piece(index, happening)

    def _piece(self, index: int, piece: Piece) -> bytes:
        before, data = self._sent[index], b""
        if piece.text or piece.logprobs:
            more_follows = piece.tool is not None or piece.finish is not None
            self._sent[index] = before.after(piece.tokens, "t" if more_follows else "")
            data += self._framed(self._shape.text(index, piece.text, piece.logprobs))
        if piece.tool is not None:
            self._sent[index] = before.after(piece.tokens, "")
            data += self._framed(self._shape.tool(index, piece.tool))
        if piece.finish is not None:
            self._sent[index] = before.after(piece.tokens, "e")
            data += self._framed(self._shape.last(index, piece.finish))
        self._sent[index] = before.after(piece.tokens, self._sent[index].step)
        return data

    def _framed(self, chunk: dict[str, Any]) -> bytes:
        position = self._answer.position
        return sse.frame(chunk, str(Position(position.model, position.request, tuple(self._sent))))

    def _state_now(self) -> bytes:
        """The state of the whole reply, if it is another one than the client knows: it waits when no choice goes on."""
        open_choices = [w for w, sent in zip(self._waiting, self._sent, strict=True) if sent.step != "e"]
        first = open_choices[0] if open_choices and all(open_choices) else None
        state = None
        if first is not None:
            state = {"state": first.state} | ({} if first.ahead is None else {"ahead": first.ahead})
        if state == self._state:
            return b""
        self._state = state
        return sse.state_comment(state or {"state": "writing"})


class Departure:
    """Watches a client whose request was read completely, and calls when it goes.

    Its own task: the one that answers may be waiting for the model.
    """

    def __init__(self, receive: Receive, on_gone: Callable[[], None]) -> None:
        self._task = asyncio.create_task(self._watch(receive, on_gone))

    async def _watch(self, receive: Receive, on_gone: Callable[[], None]) -> None:
        while (await receive())["type"] != "http.disconnect":
            pass
        on_gone()

    def stop(self) -> None:
        self._task.cancel()


class EventStream(Response):
    """Sends an answer's events; then, or whatever else happens, the answer is over."""

    media_type = "text/event-stream"

    def __init__(self, answer: Answer, departure: Departure, keep_alive_s: float) -> None:
        self.status_code = 200
        self.background = None
        self.init_headers({"X-Accel-Buffering": "no"})  # proxies must not collect what is meant to arrive at once
        self._answer = answer
        self._departure = departure
        self._keep_alive_s = keep_alive_s

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        failure: Exception | None = Closed()  # unless it comes to its end
        try:
            await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
            async with aclosing(events(self._answer, self._keep_alive_s)) as portions:
                try:
                    async for data in portions:
                        await send({"type": "http.response.body", "body": data, "more_body": True})
                    failure = None
                except (OSError, Closed):  # the client has gone
                    return
                except Exception as error:
                    failure = error
            await send({"type": "http.response.body", "body": b"", "more_body": False})
        finally:
            self._departure.stop()
            self._answer.over(failure)
