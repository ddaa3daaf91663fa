"""From the engine's thread to the event loop: what is delivered for one request, waiting to be sent. No Ray."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import suppress

from nanochat_ray.engine.reply import Piece
from nanochat_ray.serve.schema import merge


class GenerationFailed(Exception):
    """The engine gave up this reply; the cause was its own exception."""


class Inbox:
    """What the engine's thread delivers, for one request of the event loop it was made in."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._queue: asyncio.Queue[list[Piece] | Exception] = asyncio.Queue()

    def put(self, outcome: list[Piece] | Exception) -> None:
        """Called on the engine's thread."""
        with suppress(RuntimeError):  # the loop has closed: the server is going down and nobody waits any more
            self._loop.call_soon_threadsafe(self._queue.put_nowait, outcome)

    async def pieces(self) -> AsyncIterator[Piece]:
        """Pieces up to the one with `finish`; all that have arrived meanwhile are merged.

        Raises:
            GenerationFailed: the engine delivered an error.
        """
        while True:
            outcomes = [await self._queue.get()]
            while not self._queue.empty():
                outcomes.append(self._queue.get_nowait())
            arrived: list[Piece] = []
            failure: Exception | None = None
            for outcome in outcomes:
                if isinstance(outcome, Exception):
                    failure = outcome
                else:
                    arrived += outcome
            for piece in merge(arrived):
                yield piece
                if piece.finish:
                    return
            if failure is not None:
                raise GenerationFailed from failure
