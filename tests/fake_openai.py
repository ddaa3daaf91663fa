"""A server that speaks OpenAI's streamed chat completions and does what a test says, in a thread of this process."""

import asyncio
import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Behaviour:
    """How one request is answered.

    texts       of the chunks
    pause_s     before each chunk
    events      raw server-sent events between the chunks and the end
    usage       None: the server does not count
    done        whether the stream ends with [DONE]
    raw         the whole answer, instead of all above
    """

    texts: tuple[str, ...] = ()
    pause_s: float = 0.0
    status: int = 200
    events: tuple[bytes, ...] = ()
    usage: dict[str, int] | None = None
    finish: str = "length"
    done: bool = True
    raw: bytes | None = None


Behave = Callable[[dict[str, Any]], Behaviour]


def obedient(pause_s: float = 0.0) -> Behave:
    """Replies of `max_tokens` words that depend on the request alone; a token is a word."""

    def behave(body: dict[str, Any]) -> Behaviour:
        words = sum(len(message["content"].split()) for message in body["messages"])
        count = body["max_tokens"]
        texts = tuple(f" {(body['seed'] + n) % 1000}" for n in range(count))
        return Behaviour(texts, pause_s, usage={"prompt_tokens": words + 4, "completion_tokens": count})

    return behave


def event(value: dict[str, Any]) -> bytes:
    return b"data: " + json.dumps(value).encode() + b"\n\n"


def text_event(text: str, finish: str | None = None) -> bytes:
    return event({"choices": [{"index": 0, "delta": {"content": text}, "finish_reason": finish}]})


@contextmanager
def fake_openai(behave: Behave, stats: Callable[[int], dict[str, Any]] | None = None) -> Iterator[str]:
    """The URL of the server.

    Args:
        behave: from the body of a request to how it is answered; called as it arrives.
        stats: from the number of requests that are being answered to what GET /stats says; None: 404.
    """
    active = 0

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal active
        with suppress(ConnectionError, asyncio.IncompleteReadError, asyncio.CancelledError):
            head = (await reader.readuntil(b"\r\n\r\n")).decode()
            length = [line.split(":")[1] for line in head.splitlines() if line.lower().startswith("content-length")]
            body = await reader.readexactly(int(length[0]) if length else 0)
            if head.startswith("GET /stats"):
                await _write_json(writer, stats(active) if stats else None)
            else:
                active += 1
                try:
                    await _reply(writer, behave(json.loads(body)))
                finally:
                    active -= 1
        writer.close()

    loop, listening = asyncio.new_event_loop(), threading.Event()
    port, over = 0, asyncio.Event()

    async def serve() -> None:
        nonlocal port
        async with await asyncio.start_server(answer, "127.0.0.1", 0) as server:
            port = server.sockets[0].getsockname()[1]
            listening.set()
            await over.wait()
            for task in asyncio.all_tasks() - {asyncio.current_task()}:
                task.cancel()

    def run() -> None:
        loop.run_until_complete(serve())
        loop.close()

    thread = threading.Thread(target=run)
    thread.start()
    listening.wait()
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        loop.call_soon_threadsafe(over.set)
        thread.join()


async def _write_json(writer: asyncio.StreamWriter, value: dict[str, Any] | None) -> None:
    body = json.dumps(value).encode()
    status = "404 Not Found" if value is None else "200 OK"
    writer.write(f"HTTP/1.1 {status}\r\nContent-Length: {len(body)}\r\nConnection: close\r\n\r\n".encode() + body)
    await writer.drain()


async def _reply(writer: asyncio.StreamWriter, how: Behaviour) -> None:
    if how.raw is not None:
        writer.write(how.raw)
        await writer.drain()
        return
    writer.write(f"HTTP/1.1 {how.status} X\r\nContent-Type: text/event-stream\r\n".encode())
    writer.write(b"Transfer-Encoding: chunked\r\n\r\n")
    events = [text_event(text) for text in how.texts]
    ending = [*how.events, event({"choices": [{"index": 0, "delta": {}, "finish_reason": how.finish}]})]
    ending += [event({"choices": [], "usage": how.usage})] if how.usage else []
    ending += [b"data: [DONE]\n\n"] if how.done else []
    for data in events:
        await asyncio.sleep(how.pause_s)
        writer.write(b"%x\r\n%b\r\n" % (len(data), data))
        await writer.drain()
    writer.write(b"".join(b"%x\r\n%b\r\n" % (len(data), data) for data in ending) + b"0\r\n\r\n")
    await writer.drain()
