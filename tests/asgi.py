"""An HTTP client of an application in the same process and event loop, which can read slowly and go away."""

import asyncio
import json
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

from nanochat_ray.serve import sse

CHAT = "/v1/chat/completions"
COMPLETIONS = "/v1/completions"


def user(text: str) -> list[dict[str, Any]]:
    return [{"role": "user", "content": text}]


@dataclass
class Answer:
    status: int
    headers: dict[str, str]
    content: bytes

    def json(self) -> Any:
        return json.loads(self.content)

    @property
    def error(self) -> dict[str, Any]:
        return self.json()["error"]


@dataclass
class Stream:
    """An answer that is being received. `leave` closes the connection."""

    status: int
    headers: dict[str, str]
    _portions: asyncio.Queue = field(repr=False)
    _gone: asyncio.Event = field(repr=False)
    _task: asyncio.Task = field(repr=False)

    async def portions(self) -> AsyncIterator[bytes]:
        while portion := await self._portions.get():
            yield portion

    async def items(self) -> AsyncIterator[sse.Event | sse.Comment]:
        parser = sse.Parser()
        async for portion in self.portions():
            for item in parser.push(portion):
                yield item

    async def read(self) -> bytes:
        return b"".join([portion async for portion in self.portions()])

    async def leave(self) -> None:
        """The application is told; returns when it has ended."""
        self._gone.set()
        await asyncio.wait_for(self._task, 5)


LOCAL = {"host": "127.0.0.1:8000"}


class Client:
    """Calls an ASGI application; `headers` come with every request."""

    def __init__(self, app: Any, headers: dict[str, str] | None = LOCAL) -> None:
        self._app = app
        self._headers = headers or {}
        self._open: dict[asyncio.Task, asyncio.Event] = {}

    def leave_all(self) -> None:
        """Close every connection, also those that have no answer yet."""
        for gone in self._open.values():
            gone.set()

    def cancel_all(self) -> None:
        """Cancel what answers, as a server may that knows of its own that the client has gone."""
        for task in self._open:
            task.cancel()

    @asynccontextmanager
    async def stream(
        self,
        path: str,
        body: Any = None,
        *,
        method: str | None = None,
        headers: dict[str, str] | None = None,
        portions: Sequence[bytes] | None = None,
        seconds_between: float = 0.0,
    ) -> AsyncIterator[Stream]:
        """An answer as soon as it begins; at the end of the block the client goes away.

        Args:
            body: sent as JSON; or `portions`, as they are.
        """
        raw = {**self._headers, **{name.lower(): value for name, value in (headers or {}).items()}}
        if body is not None:
            portions = [json.dumps(body).encode()]
            raw.setdefault("content-type", "application/json")
        left = list(portions or [b""])
        received: asyncio.Queue = asyncio.Queue()
        started: asyncio.Future = asyncio.get_running_loop().create_future()
        gone = asyncio.Event()

        async def receive() -> dict[str, Any]:
            if left:
                await asyncio.sleep(seconds_between)
                return {"type": "http.request", "body": left.pop(0), "more_body": bool(left)}
            await gone.wait()
            return {"type": "http.disconnect"}

        async def send(message: Any) -> None:
            if message["type"] == "http.response.start":
                names = {name.decode(): value.decode() for name, value in message["headers"]}
                started.set_result((message["status"], names))
            elif not gone.is_set():
                if message.get("body"):
                    received.put_nowait(message["body"])
                if not message.get("more_body"):
                    received.put_nowait(b"")

        path, _, query = path.partition("?")
        scope = {
            "type": "http",
            "asgi": {"version": "3.0"},
            "http_version": "1.1",
            "method": method or ("GET" if body is None and portions is None else "POST"),
            "scheme": "http",
            "path": path,
            "raw_path": path.encode(),
            "query_string": query.encode(),
            "root_path": "",
            "headers": [(name.encode(), value.encode("latin-1")) for name, value in raw.items()],
            "client": ("127.0.0.1", 1),
            "server": ("127.0.0.1", 8000),
        }
        task = asyncio.create_task(self._app(scope, receive, send))
        self._open[task] = gone
        task.add_done_callback(lambda _: (self._open.pop(task), received.put_nowait(b"")))
        await asyncio.wait({task, started}, return_when=asyncio.FIRST_COMPLETED)
        if not started.done():
            await task
            raise AssertionError("the application ended without an answer")
        status, names = await started
        answer = Stream(status, names, received, gone, task)
        try:
            yield answer
        finally:
            gone.set()
            await asyncio.wait_for(task, 5)

    async def ask(self, path: str, body: Any = None, **options: Any) -> Answer:
        """A whole answer."""
        async with self.stream(path, body, **options) as answer:
            return Answer(answer.status, answer.headers, await answer.read())
