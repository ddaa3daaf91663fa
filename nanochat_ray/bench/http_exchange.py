"""One HTTP/1.1 POST and the moment at which each portion of its answer arrived. Made to cost next to nothing.

A load generator shares its cores with the server that it measures. CPU per streamed event, 32 streams, two cores:

    httpx                     86–99 µs
    aiohttp                   29–34 µs
    asyncio streams           20–33 µs
    asyncio protocol (this)   16–18 µs, nearly all of it the event loop and the kernel

So while a reply streams, its bytes are only kept with their time; `Exchange.response` reads them afterwards. A
connection serves one request: the server closes it, and that is the end of the answer.
"""

import asyncio
import re
import time
from dataclasses import dataclass, field
from typing import Literal, cast
from urllib.parse import urlsplit

from nanochat_ray.errors import UsageError

End = Literal["closed", "left", "silence", "no connection"]
Portions = list[tuple[float, bytes]]
_SIZE_LINE = re.compile(rb"([0-9A-Fa-f]+)[^\r\n]*\r\n")


@dataclass(frozen=True)
class Address:
    """Where requests go; `prefix` is what stands before /v1 in the URL's path."""

    host: str
    port: int
    tls: bool
    prefix: str

    @staticmethod
    def of(url: str) -> "Address":
        """Raises:
        UsageError: not an http or https URL.
        """
        try:
            parts = urlsplit(url)
            port = parts.port
        except ValueError:
            parts, port = urlsplit(""), None
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise UsageError(f"--url {url!r} is no address of a server, for example http://127.0.0.1:8000")
        tls = parts.scheme == "https"
        path = parts.path.rstrip("/").removesuffix("/v1")
        return Address(parts.hostname, port or (443 if tls else 80), tls, path)

    def post(self, path: str, body: bytes) -> bytes:
        """The bytes of a request with a JSON body."""
        head = (
            f"POST {self.prefix}{path} HTTP/1.1\r\nHost: {self.host}:{self.port}\r\nConnection: close\r\n"
            f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
        )
        return head.encode() + body


@dataclass(frozen=True)
class Response:
    """An answer as read from an exchange.

    first_byte   when it began; seconds of time.monotonic, as all times here
    body         portions without the transfer coding, each with its arrival
    whole        the end that HTTP promised was reached
    """

    status: int
    first_byte: float
    body: Portions
    whole: bool


@dataclass
class Exchange:
    """A request and what came back.

    sent    when the request was written; None: there was no connection
    ended   when the connection was closed
    end     closed: by the server; left: by us, as asked; silence: by us, because nothing came for too long
    """

    sent: float | None = None
    portions: Portions = field(default_factory=list)
    ended: float = 0.0
    end: End = "closed"

    def response(self) -> Response | None:
        """What the portions say; None if they hold no complete head of an HTTP answer."""
        head = b""
        for index, (at, portion) in enumerate(self.portions):
            head += portion
            end = head.find(b"\r\n\r\n")
            if end >= 0:
                rest = [(at, head[end + 4 :]), *self.portions[index + 1 :]]
                return _response(head[:end], self.portions[0][0], rest)
        return None


def _response(head: bytes, first_byte: float, rest: Portions) -> Response | None:
    first, *lines = head.split(b"\r\n")
    words = first.split(b" ")
    if len(words) < 2 or not first.startswith(b"HTTP/1.") or not words[1].isdigit():
        return None
    headers = {name.strip().lower(): value.strip() for name, _, value in (line.partition(b":") for line in lines)}
    status = int(words[1])
    if b"chunked" in headers.get(b"transfer-encoding", b"").lower():
        body, whole = _without_chunks(rest)
        return Response(status, first_byte, body, whole)
    length = headers.get(b"content-length", b"")
    size = sum(len(portion) for _, portion in rest)
    return Response(status, first_byte, rest, not length.isdigit() or size >= int(length))


def _without_chunks(coded: Portions) -> tuple[Portions, bool]:
    """The body of a chunked answer, every piece with the time at which its last byte came; and whether it ended."""
    body: Portions = []
    buffer, left = b"", 0  # bytes not understood yet; bytes of the current chunk still to come, its line end included
    for at, portion in coded:
        buffer += portion
        piece = b""
        while buffer:
            if left > 2:
                taken = buffer[: left - 2]
                piece += taken
                buffer, left = buffer[len(taken) :], left - len(taken)
            elif left:
                skipped = min(left, len(buffer))
                buffer, left = buffer[skipped:], left - skipped
            elif line := _SIZE_LINE.match(buffer):
                size = int(line[1], 16)
                if size == 0:
                    return ([*body, (at, piece)] if piece else body), True
                buffer, left = buffer[line.end() :], size + 2
            else:
                break
        if piece:
            body.append((at, piece))
    return body, False


async def run_exchange(
    kept: Exchange, address: Address, request: bytes, silence_s: float = 120.0, leave_after_s: float | None = None
) -> None:
    """Send a request over a new connection and keep what comes until the connection closes.

    Args:
        kept: a new one, filled meanwhile.
        silence_s: give up after so long without a byte.
        leave_after_s: break the connection after so long, as a person does who closes the page.
    """
    loop = asyncio.get_running_loop()
    try:
        connecting = loop.create_connection(
            lambda: _Keeper(kept, request), address.host, address.port, ssl=address.tls or None
        )
        _, made = await asyncio.wait_for(connecting, silence_s)
    except OSError:  # with TimeoutError
        kept.end, kept.ended = "no connection", time.monotonic()
        return
    keeper = cast(_Keeper, made)
    leaving = loop.call_later(leave_after_s, keeper.give_up, "left") if leave_after_s is not None else None
    watching = loop.create_task(keeper.give_up_after(silence_s))
    try:
        await keeper.gone
    finally:
        watching.cancel()
        if leaving is not None:
            leaving.cancel()
        keeper.give_up("left")  # if this task was cancelled


class _Keeper(asyncio.Protocol):
    """Writes the request and keeps what comes."""

    def __init__(self, kept: Exchange, request: bytes) -> None:
        self._kept = kept
        self._request = request
        self._portions = kept.portions
        self.gone: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        self._transport.write(self._request)
        self._kept.sent = time.monotonic()

    def data_received(self, data: bytes) -> None:
        self._portions.append((time.monotonic(), data))

    def connection_lost(self, error: Exception | None) -> None:
        self._kept.ended = time.monotonic()
        if not self.gone.done():
            self.gone.set_result(None)

    def give_up(self, end: End) -> None:
        if not self.gone.done():
            self._kept.end, self._kept.ended = end, time.monotonic()
            self._transport.abort()
            self.gone.set_result(None)

    async def give_up_after(self, silence_s: float) -> None:
        heard = self._kept.sent or 0.0
        while (left := heard + silence_s - time.monotonic()) > 0:
            await asyncio.sleep(left)
            heard = self._portions[-1][0] if self._portions else heard
        self.give_up("silence")
