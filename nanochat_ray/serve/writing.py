"""One request being answered: its choices are written side by side, and read as one sequence of updates. No HTTP.

What a choice said before (in the journal) is not written again. What a client received of it, but the journal does not
know because the process that wrote it is gone, is written again first, unseen; then it goes on from there.
"""

import asyncio
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import replace
from functools import partial
from itertools import groupby
from typing import Protocol, cast

from nanochat_ray.engine.reply import Piece
from nanochat_ray.serve.answers import merge
from nanochat_ray.serve.backend import Backend, Busy, GenerationFailed, ReplyRequest, Update, Waiting
from nanochat_ray.serve.journal import Skipped, Written, replay
from nanochat_ray.serve.position import Sent

PATIENCE_S = 60.0  # for a stream that has begun and finds no room to go on


class Closed(Exception):
    """This request is not answered any more: its client has gone."""


class Superseded(Exception):
    """A newer request goes on with this reply."""


class Diverged(Exception):
    """Written again, the reply is not the one that the client has a part of."""


class Meter(Protocol):
    """Told of what the backend does, when it does it."""

    def update(self, index: int, update: Update) -> None: ...


Happening = tuple[int, Update | Skipped]  # the choice's index, and what happened to it


class Writing:
    """The choices of one request. Begins at once; `close` stops all work, in whatever phase it is.

    Args:
        requests: one per choice, without `said`.
        written: what the choices said already; grows as they are written.
        sent: how much of each the client has.
    """

    def __init__(
        self,
        backend: Backend,
        requests: Sequence[ReplyRequest],
        written: Sequence[Written],
        sent: Sequence[Sent],
        meter: Meter,
    ) -> None:
        self._backend = backend
        self._requests = requests
        self._written = written
        self._sent = sent
        self._meter = meter
        self._arrived = asyncio.Event()
        self._pending: list[Happening] = []
        self._begun = [False] * len(requests)
        self._opened = False
        self._failure: Exception | None = None
        self._tasks = [asyncio.create_task(self._write(index)) for index in range(len(requests))]
        self._left = len(self._tasks)
        for index, task in enumerate(self._tasks):
            task.add_done_callback(partial(self._ended, index))

    async def opened(self, timeout_s: float | None) -> None:
        """Wait until every choice has begun, so that a refusal can still be the answer; at most `timeout_s`.

        Raises:
            UserError, Busy: the backend refused a choice. No other choice is kept.
            GenerationFailed, Diverged, Superseded, Closed: as their names say.
        """
        deadline = None if timeout_s is None else asyncio.get_running_loop().time() + timeout_s
        while not all(self._begun) and self._failure is None:
            self._arrived.clear()
            try:
                async with asyncio.timeout_at(deadline):
                    await self._arrived.wait()
            except TimeoutError:
                break
        if self._failure is not None:
            raise self._failure
        self._opened = True

    async def take(self, timeout_s: float | None = None) -> list[Happening] | None:
        """Everything that happened since the last call, text of neighbouring pieces joined; None after the end.

        Waits until something happened; an empty list when nothing did for `timeout_s`.

        Raises:
            as `opened`.
        """
        while True:
            if self._pending:
                happened, self._pending = self._pending, []
                return _joined(happened)
            if self._failure is not None:
                raise self._failure
            if self._left == 0:
                return None
            self._arrived.clear()
            try:
                async with asyncio.timeout(timeout_s):
                    await self._arrived.wait()
            except TimeoutError:
                return []

    def close(self) -> None:
        """Stop the work; whoever waits in `opened` or `take` gets Closed. Does nothing after the end."""
        self._stop(Closed())

    def supersede(self) -> None:
        """The same, for a newer request that goes on with the same choices."""
        self._stop(Superseded())

    def _stop(self, reason: Exception) -> None:
        if self._failure is None and self._left:
            self._failure = reason
        for task in self._tasks:
            task.cancel()
        self._arrived.set()

    def _ended(self, index: int, task: asyncio.Task[None]) -> None:
        error = Closed() if task.cancelled() else task.exception()
        if isinstance(error, Exception):
            self._stop(error)
        self._left -= 1
        self._begun[index] = True
        self._arrived.set()

    def _post(self, index: int, happening: Update | Skipped) -> None:
        self._begun[index] = True
        self._pending.append((index, happening))
        self._arrived.set()

    async def _write(self, index: int) -> None:
        request, written, sent = self._requests[index], self._written[index], self._sent[index]
        if sent.tokens > len(written.tokens):
            self._post(index, Waiting("moved"))
            await self._generate(index, unseen_to=sent.tokens)
        if written.finish is None and self._is_full(index):
            written.finish = "length"
        same = Sent().after(written.tokens[: sent.tokens], sent.step) == sent
        if not same or (sent.step == "e" and written.finish is None):
            raise Diverged
        tokenizer, stops = self._backend.model.tokenizer, request.params.stop
        for part in replay(tokenizer, stops, written, sent):
            self._post(index, part)
        if written.finish is None:
            await self._generate(index)

    async def _generate(self, index: int, unseen_to: int | None = None) -> None:
        """Write on, to the end, or without posting pieces until there are `unseen_to` tokens."""
        request, written = self._requests[index], self._written[index]
        if unseen_to is not None:
            request = replace(request, params=replace(request.params, max_tokens=unseen_to))
        give_up_at = asyncio.get_running_loop().time() + PATIENCE_S
        while True:
            try:
                request = replace(request, said=tuple(written.tokens))
                updates = cast(AsyncGenerator[Update, None], self._backend.generate(request))
                async with aclosing(updates):
                    async for update in updates:
                        self._meter.update(index, update)
                        if isinstance(update, Piece):
                            written.add(update)
                            give_up_at = asyncio.get_running_loop().time() + PATIENCE_S
                        if isinstance(update, Waiting) or unseen_to is None:
                            self._post(index, update)
                break
            except Busy as busy:
                refusable = not (self._opened or self._begun[index])
                if refusable or asyncio.get_running_loop().time() + busy.retry_after_s > give_up_at:
                    raise
                self._post(index, Waiting("queued"))
                await asyncio.sleep(busy.retry_after_s)
        if written.finish is None:
            raise GenerationFailed("the reply stopped without an end")
        if unseen_to is not None and written.finish == "length" and not self._is_full(index):
            written.finish = None  # that was our limit

    def _is_full(self, index: int) -> bool:
        """Whether there is room for no other token."""
        request, count = self._requests[index], len(self._written[index].tokens)
        room = min(request.params.max_tokens, self._backend.model.context - len(request.prompt))
        return 0 < count >= room


def _joined(happened: Sequence[Happening]) -> list[Happening]:
    """In order per choice, the choices one after the other, neighbouring pieces of text as one."""
    joined: list[Happening] = []
    for index, group in groupby(sorted(happened, key=lambda pair: pair[0]), key=lambda pair: pair[0]):
        run: list[Piece] = []
        for _, happening in group:
            if isinstance(happening, Piece):
                run.append(happening)
                continue
            joined += [(index, piece) for piece in merge(run)]
            joined.append((index, happening))
            run = []
        joined += [(index, piece) for piece in merge(run)]
    return joined
