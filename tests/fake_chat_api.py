"""A chat server that keeps to the HTTP contract and misbehaves on command: what the page is tested against. No model.

What it does with a request is a script, found by the last user message: `api.scripts[text]`. A script is a list of
steps; `say`, `call` and friends below make them. A reply is resumed as the contract says: by Idempotency-Key and
Last-Event-ID. Steps that break something happen once per key, so that the next attempt gets further.

By hand: `python -m tests.fake_chat_api 8123`, then open the address; the names of the scripts are the messages.
"""

import asyncio
import json
import sys
import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from tests.fake_chat_scripts import SCRIPTS, Step
from tests.serving import ROOT, free_port

PAGE = ROOT / "nanochat_ray" / "serve" / "page"
CSP = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src 'self' data:; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'; "
    "require-trusted-types-for 'script'; trusted-types dompurify"
)
TYPES = {
    ".js": "text/javascript; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".html": "text/html; charset=utf-8",
}
FINGERPRINT = "m1"


class Dropped(Exception):
    """Makes the server break the connection in the middle of a reply."""


def page_files() -> dict[str, bytes]:
    """The page's files by their path in its folder, read once."""
    return {path.relative_to(PAGE).as_posix(): path.read_bytes() for path in PAGE.rglob("*") if path.suffix in TYPES}


@dataclass
class Asked:
    """One POST as it came."""

    body: dict[str, Any]
    headers: dict[str, str]
    gone: bool = False  # the client closed the connection before the end

    @property
    def key(self) -> str:
        return self.headers["idempotency-key"]

    @property
    def last_id(self) -> str | None:
        return self.headers.get("last-event-id")


@dataclass
class FakeChatApi:
    """The server's behaviour and what it has seen. Tests change and read it directly: it runs in their process."""

    scripts: dict[str, list[Step]] = field(default_factory=lambda: dict(SCRIPTS))
    health: tuple[int, dict[str, str]] = (200, {"status": "ok", "model": "tiny-d4"})
    asked: list[Asked] = field(default_factory=list)
    happened: set[tuple[str, int]] = field(default_factory=set)  # (key, place) of steps that happen once
    gates: dict[str, threading.Event] = field(default_factory=dict)
    files: dict[str, bytes] = field(default_factory=page_files)
    url: str = ""

    def reset(self) -> None:
        for gate in self.gates.values():
            gate.set()  # no stream of an earlier test waits for ever
        fresh = FakeChatApi(files=self.files)
        self.scripts, self.health, self.asked, self.gates = fresh.scripts, fresh.health, fresh.asked, fresh.gates

    def gate(self, name: str) -> threading.Event:
        """Opened with `.set()`: lets streams go on that wait for it."""
        return self.gates.setdefault(name, threading.Event())

    def app(self) -> Starlette:
        return Starlette(
            routes=[
                Route("/", self._page),
                Route("/page/{name:path}", self._file),
                Route("/health", self._health),
                Route("/v1/chat/completions", self._reply, methods=["POST"]),
            ]
        )

    async def _page(self, request: Request) -> Response:
        return self._static("index.html")

    async def _file(self, request: Request) -> Response:
        return self._static(request.path_params["name"])

    def _static(self, name: str) -> Response:
        if name not in self.files:
            return Response(status_code=404)
        headers = {"x-content-type-options": "nosniff", "content-security-policy": CSP}
        return Response(self.files[name], media_type=TYPES[Path(name).suffix], headers=headers)

    async def _health(self, request: Request) -> Response:
        status, body = self.health
        return JSONResponse(body, status)

    async def _reply(self, request: Request) -> Response:
        asked = Asked(await request.json(), dict(request.headers))
        self.asked.append(asked)
        text = asked.body["messages"][-1]["content"]
        script = self.scripts.get(text) or self.scripts[""]
        for place, step in enumerate(script):
            if step.kind == "drop" and (asked.key, place * 1000) not in self.happened:
                break  # what stands after a broken connection is for who comes back
            if step.kind == "refuse" and self._first_time(asked.key, place, step):
                return JSONResponse({"error": step.value["error"]}, step.value["status"], step.value["headers"])
        return StreamingResponse(self._stream(asked, script, request), media_type="text/event-stream")

    def _first_time(self, key: str, place: int, step: Step) -> bool:
        """A step that breaks something does so `times` times for one reply."""
        for time in range(step.times):
            if (key, place * 1000 + time) not in self.happened:
                self.happened.add((key, place * 1000 + time))
                return True
        return False

    async def _stream(self, asked: Asked, script: list[Step], request: Request) -> AsyncIterator[bytes]:
        position, sent = 0, int(asked.last_id.partition(".")[2]) if asked.last_id else 0
        yield _data({"role": "assistant", "content": ""})
        finish = "stop"
        try:
            for place, step in enumerate(script):
                if step.kind == "delta":
                    position += 1
                    if position > sent:
                        yield f"id: {FINGERPRINT}.{position}\n".encode() + _data(step.value)
                elif step.kind == "wait":
                    await asyncio.sleep(step.value)
                elif step.kind == "gate":
                    gate = self.gate(step.value)
                    while not gate.is_set():
                        if await request.is_disconnected():
                            raise asyncio.CancelledError
                        await asyncio.sleep(0.01)
                elif step.kind == "state":
                    yield f": state {json.dumps(step.value)}\n\n".encode()
                elif step.kind == "raw":
                    yield step.value
                elif step.kind == "finish":
                    finish = step.value
                elif step.kind == "drop" and self._first_time(asked.key, place, step):
                    raise Dropped
                elif step.kind == "error" and self._first_time(asked.key, place, step):
                    yield b"data: " + json.dumps({"error": step.value}).encode() + b"\n\n"
                    return
        except (asyncio.CancelledError, GeneratorExit):
            asked.gone = True
            raise
        yield _data({}, finish)
        if asked.body.get("stream_options", {}).get("include_usage"):
            usage = {"prompt_tokens": 12, "completion_tokens": position, "total_tokens": 12 + position}
            yield b"data: " + json.dumps({"choices": [], "usage": usage}).encode() + b"\n\n"
        yield b"data: [DONE]\n\n"


def _data(delta: dict[str, Any], finish: str | None = None) -> bytes:
    chunk = {"id": "c", "model": "tiny-d4", "choices": [{"index": 0, "delta": delta, "finish_reason": finish}]}
    return b"data: " + json.dumps(chunk, ensure_ascii=False).encode() + b"\n\n"


@contextmanager
def running_fake(port: int | None = None) -> Iterator[FakeChatApi]:
    """The server in a thread of this process."""
    api = FakeChatApi()
    port = port or free_port()
    config = uvicorn.Config(api.app(), host="127.0.0.1", port=port, log_level="critical", lifespan="off")
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        thread.join(0.01)
        assert thread.is_alive(), "the fake server did not start"
    api.url = f"http://127.0.0.1:{port}/"
    yield api
    api.reset()
    server.should_exit = server.force_exit = True
    thread.join(10)


def main(port: int) -> None:
    with running_fake(port) as api:
        print(api.url, "messages:", ", ".join(sorted(filter(None, api.scripts))))
        threading.Event().wait()


if __name__ == "__main__":
    main(int(sys.argv[1]))
