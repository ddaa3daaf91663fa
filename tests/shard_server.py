"""A shard server on the loopback that misbehaves in the ways a test asks for."""

import hashlib
import io
import random
import threading
from collections import defaultdict
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pyarrow as pa
from pyarrow import parquet as pq

from nanochat_ray.data.download import PublicSet

SET = PublicSet("someone/texts", 3)


def parquet_bytes(seed: int, size: int = 100_000) -> bytes:
    noise = random.Random(seed).randbytes(size // 2).hex()
    buffer = io.BytesIO()
    pq.write_table(pa.table({"text": [f"document of seed {seed}", noise]}), buffer, compression="none")
    return buffer.getvalue()


SHARD = parquet_bytes(0)


@dataclass
class Answer:
    """How one request for a file is answered; the defaults are a good server."""

    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)
    send: int | None = None  # only so many bytes of the body, then the connection is cut
    stall: bool = False  # … or stays open and silent
    announce: int = 0  # added to the true Content-Length
    ranges: bool = True
    content: bytes | None = None


class Hub:
    """Serves `files` by name, with one scripted Answer after the other, then good ones; remembers the requests."""

    def __init__(self, redirect: bool = False, etags: bool = True):
        self.files = dict.fromkeys(SET.shard_names(), SHARD)
        self.script: dict[str, list[Answer]] = defaultdict(list)
        self.always: Answer | None = None
        self.requests: list[tuple[str, str | None]] = []
        self.redirect, self.etags = redirect, etags
        self.linked: dict[str, str] = {}
        self.closing = threading.Event()
        hub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                hub.answer(self)

            def log_message(self, *_: object) -> None: ...

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"
        self.thread = threading.Thread(target=self.server.serve_forever, args=(0.01,), daemon=True)
        self.thread.start()

    def close(self) -> None:
        self.closing.set()
        self.server.shutdown()
        self.server.server_close()
        self.thread.join()

    def ranges_asked(self, name: str) -> list[str | None]:
        return [asked for path, asked in self.requests if path == name]

    def answer(self, handler: BaseHTTPRequestHandler) -> None:
        name = handler.path.rpartition("/")[2]
        if self.redirect and not handler.path.startswith("/store/"):
            handler.send_response(302)
            for header, value in {"Location": f"/store/{name}", "Content-Length": "0", **self.linked}.items():
                handler.send_header(header, value)
            handler.end_headers()
            return
        asked = handler.headers.get("Range")
        self.requests.append((name, asked))
        answer = self.always or (self.script[name].pop(0) if self.script[name] else Answer())
        if name not in self.files:
            answer = Answer(status=404)
        if answer.status != 200:
            handler.send_response(answer.status)
            for header, value in {"Content-Length": "0", **answer.headers}.items():
                handler.send_header(header, value)
            handler.end_headers()
            return
        content = answer.content or self.files[name]
        start = int(asked.removeprefix("bytes=").removesuffix("-")) if asked and answer.ranges else 0
        if start >= len(content):
            handler.send_response(416)
            handler.send_header("Content-Length", "0")
            handler.end_headers()
            return
        body = content[start:]
        handler.send_response(206 if start else 200)
        if start:
            handler.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        if self.etags:
            handler.send_header("ETag", f'"{hashlib.md5(content).hexdigest()}"')
        length = len(body) + answer.announce
        handler.send_header("Content-Length", str(length))
        handler.end_headers()
        # A server whose Content-Length is too small would break HTTP by sending more: it stops there.
        handler.wfile.write(body[: min(length, len(body) if answer.send is None else answer.send)])
        handler.wfile.flush()
        if answer.stall:
            self.closing.wait(5)
        if answer.send is not None or answer.announce:
            handler.close_connection = True
