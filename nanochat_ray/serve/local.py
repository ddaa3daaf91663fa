"""A `Backend` around an engine in this process: its thread on one side, the event loop's requests on the other. No Ray.

What has arrived for a reply is handed over in bundles. All but the first and the last are held back for a moment, which
is longer when many replies are written: what a bundle costs on its way to the client is paid for several tokens.
"""

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextlib import aclosing, suppress
from typing import Any

from nanochat_ray.engine.engine import Outcome
from nanochat_ray.engine.load import ChatModel
from nanochat_ray.engine.reply import Piece
from nanochat_ray.engine.worker import Ended, EngineThread, Full, Ticket
from nanochat_ray.errors import UserError
from nanochat_ray.serve.backend import Busy, EngineDied, GenerationFailed, ReplyRequest, ServedModel, Update, Waiting

QUEUE_NEWS_S = 0.5  # how often one who waits hears how many are before it
SIGN_OF_LIFE_S = 2.0  # so often there is at least an empty bundle, so that silence means that this process is gone
HOLD_BACK_S, MORE_FOR_EACH_S = 0.03, 0.006  # with one reply, and for each other that is being written
LONGEST_HOLD_BACK_S = 0.12  # eight times a second still reads as if it were written steadily


class LocalBackend:
    """One engine. Must be made and used on one event loop.

    Args:
        max_waiting: replies that may wait for their turn.
    """

    def __init__(self, chat: ChatModel, max_waiting: int) -> None:
        self.model = ServedModel.of(chat)
        self.thread = EngineThread(chat.engine, self._deliver, max_waiting)
        self._facts = {"startup": chat.startup, "about": chat.about}
        self._loop = asyncio.get_running_loop()
        self._inboxes: dict[Ticket, _Inbox] = {}
        self._leaving = False

    async def generate(self, request: ReplyRequest) -> AsyncIterator[Update]:
        """See `Backend.generate`."""
        async with aclosing(self.bundles(request)) as bundles:
            async for bundle in bundles:
                for update in bundle:
                    yield update

    async def bundles(self, request: ReplyRequest) -> AsyncGenerator[list[Update], None]:
        """As `generate`: what arrived meanwhile is one bundle, empty as a sign of life.

        Ends early, maybe at once, when replies are handed over.
        """
        if self._leaving:
            return
        try:
            ticket = self.thread.submit(request.prompt, request.params, request.said)
        except Full as full:
            raise Busy(str(full)) from full
        inbox = self._inboxes[ticket] = _Inbox()
        try:
            async for bundle in self._queued(ticket, inbox):
                yield bundle
            finished = False
            while not (finished or self._leaving):
                while not await inbox.filled(SIGN_OF_LIFE_S):
                    yield []
                pieces = inbox.take()
                finished = bool(pieces and pieces[-1].finish)
                if pieces:
                    yield list(pieces)
                if not (finished or self._leaving):
                    await inbox.complete(self._hold_back_s())
        finally:  # also when nobody listens any more
            self._inboxes.pop(ticket, None)
            self.thread.cancel(ticket)

    def hand_over(self) -> None:
        """End all replies where they are, for another backend to go on with, and take no more."""
        self._leaving = True
        for inbox in self._inboxes.values():
            inbox.wake()

    async def ready(self) -> tuple[bool, str]:
        """See `Backend.ready`."""
        if self._leaving:
            return False, "its machine is about to be taken"
        healthy = self.thread.healthy()
        return healthy, "ok" if healthy else "the engine is stuck"

    async def stats(self) -> list[dict[str, Any]]:
        """See `Backend.stats`."""
        return [{"replica": "local", **self.thread.stats(), **self._facts}]

    @property
    def kv_use(self) -> float:
        """Part of the cache's blocks that replies hold."""
        blocks = self.thread.engine.scheduler.blocks
        return blocks.held / blocks.total

    def close(self) -> None:
        """Stop the engine's thread; replies in progress are dropped."""
        self.thread.close()

    async def _queued(self, ticket: Ticket, inbox: "_Inbox") -> AsyncIterator[list[Update]]:
        """How many are before a reply, each time that changes, until it begins."""
        told = 0
        while not (inbox.outcomes or self._leaving) and (ahead := self.thread.ahead(ticket)):
            yield [] if ahead == told else [Waiting("queued", ahead)]
            told = ahead
            await inbox.filled(QUEUE_NEWS_S)

    def _hold_back_s(self) -> float:
        return min(LONGEST_HOLD_BACK_S, HOLD_BACK_S + MORE_FOR_EACH_S * (self.thread.active - 1))

    def _deliver(self, outcomes: Sequence[tuple[Ticket, Outcome]]) -> None:
        """Called on the engine's thread, once per step."""
        with suppress(RuntimeError):  # the loop has closed: the server is going down and nobody waits any more
            self._loop.call_soon_threadsafe(self._sort_in, outcomes)

    def _sort_in(self, outcomes: Sequence[tuple[Ticket, Outcome]]) -> None:
        for ticket, outcome in outcomes:
            if ticket in self._inboxes:
                self._inboxes[ticket].put(outcome)


class _Inbox:
    """What has arrived for one reply and is not yet taken."""

    def __init__(self) -> None:
        self.outcomes: list[Outcome] = []
        self._something = asyncio.Event()
        self._everything = asyncio.Event()

    def put(self, outcome: Outcome) -> None:
        self.outcomes.append(outcome)
        self._something.set()
        if isinstance(outcome, Exception) or (outcome and outcome[-1].finish):
            self._everything.set()

    def wake(self) -> None:
        """Let whoever waits look, though nothing came."""
        self._something.set()
        self._everything.set()

    async def filled(self, timeout_s: float) -> bool:
        """Wait until something is there; False when the time is over."""
        return await _within(timeout_s, self._something)

    async def complete(self, timeout_s: float) -> bool:
        """Wait until nothing more will come; False when the time is over."""
        return await _within(timeout_s, self._everything)

    def take(self) -> list[Piece]:
        """The pieces that are there. Those before a failure come first, the failure with the next call.

        Raises:
            GenerationFailed: the engine gave the reply up.
            EngineDied: the engine gave all of them up.
        """
        pieces: list[Piece] = []
        while self.outcomes:
            outcome = self.outcomes[0]
            if isinstance(outcome, Exception):
                if pieces:
                    return pieces
                if isinstance(outcome, Ended):
                    raise EngineDied(f"the engine has ended ({outcome})") from outcome
                if isinstance(outcome, UserError):  # the model's fault all the same; it says what is wrong with it
                    raise GenerationFailed(str(outcome)) from outcome
                kind = type(outcome).__name__
                raise GenerationFailed(f"the model failed while it wrote this reply ({kind})") from outcome
            pieces += outcome
            del self.outcomes[0]
        self._something.clear()
        return pieces


async def _within(timeout_s: float, event: asyncio.Event) -> bool:
    if not event.is_set():
        with suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                await event.wait()
    return event.is_set()
