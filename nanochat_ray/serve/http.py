"""What surrounds every request and reply on HTTP: who may call, how much they may send, and security headers. No Ray.

The server is for the person at this machine, unless it was told other names to answer to. Loopback alone does not
ensure that: a web page from anywhere can make that person's browser send requests to 127.0.0.1, directly (stopped by
the Origin check, and by sending no CORS headers) or under a name of its own that resolves to 127.0.0.1 (stopped by the
Host check).
"""

import asyncio
import logging
import traceback
from collections.abc import Awaitable, Callable, Collection, MutableMapping
from contextlib import suppress
from typing import Any
from urllib.parse import urlsplit

from nanochat_ray.serve.keys import ApiKeys
from nanochat_ray.serve.refusals import Refusal
from nanochat_ray.serve.schema import MAX_BODY_BYTES

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
Application = Callable[[Scope, Receive, Send], Awaitable[None]]

LOOPBACK_NAMES = frozenset({"127.0.0.1", "localhost", "::1"})
ANY_HOST = "*"
BODY_TIMEOUT_S = 20.0
OWNER = "nanochat_ray.owner"  # in a request's scope: the name of the API key it came with

_HEADERS = [
    (b"x-content-type-options", b"nosniff"),
    (b"x-frame-options", b"DENY"),
    (b"referrer-policy", b"no-referrer"),
    (b"cross-origin-resource-policy", b"same-origin"),
    (b"cross-origin-opener-policy", b"same-origin"),
    (b"cache-control", b"no-store"),
]

_log = logging.getLogger(__name__)


class Guard:
    """ASGI middleware that refuses foreign hosts, foreign origins, unknown keys and bodies over the limit or too slow.

    Adds the security headers, and answers what nobody else caught without its message, which may be a user's text.

    Args:
        allowed_hosts: names to answer to beside loopback's; `*` for all, which only a server with keys should be told.
        keys: without them nothing asks for one.
    """

    def __init__(
        self,
        app: Application,
        allowed_hosts: Collection[str] = (),
        keys: ApiKeys | None = None,
        body_timeout_s: float = BODY_TIMEOUT_S,
    ) -> None:
        self._app = app
        self._hosts = LOOPBACK_NAMES | {name.lower() for name in allowed_hosts}
        self._keys = keys
        self._body_timeout_s = body_timeout_s

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        body = _Body(receive, self._body_timeout_s)
        started = False

        async def send_with_headers(message: Message) -> None:
            nonlocal started
            if body.refusal and not started:
                return  # the app takes a body that ends in an error for a malformed one; the refusal says it better
            await send_unconditionally(message)

        async def send_unconditionally(message: Message) -> None:
            nonlocal started
            if message["type"] == "http.response.start":
                started = True
                present = {name for name, _ in message["headers"]}
                added = [header for header in _HEADERS if header[0] not in present]
                message = {**message, "headers": [*message["headers"], *added]}
            await send(message)

        refusal: Refusal | None = None
        try:
            self._check(scope)
            with suppress(_BodyRefused):
                await self._app(scope, body, send_with_headers)
            refusal = body.refusal
        except Refusal as found:
            refusal = found
        except Exception as error:
            _log_without_message(error)
            refusal = Refusal(500, "the server failed on this request", "server_error")
        if refusal is not None and not started:
            await refusal.response()(scope, receive, send_unconditionally)

    def _check(self, scope: Scope) -> None:
        headers = dict(scope["headers"])
        host = headers.get(b"host", b"").decode("latin-1")
        origin = headers.get(b"origin", b"").decode("latin-1")
        try:
            name, from_host = urlsplit(f"//{host}").hostname, urlsplit(origin).netloc
        except ValueError:
            raise Refusal(403, "the Host or Origin header is not a valid address") from None
        if name not in self._hosts and ANY_HOST not in self._hosts:
            raise Refusal(403, "this server answers only to the names localhost, 127.0.0.1 and those it was told")
        if origin and from_host != host:
            raise Refusal(403, "requests from pages of other sites are refused")
        if self._keys is not None and not _is_public(scope):
            # Before the body: who may not ask need not send it.
            authorization = headers.get(b"authorization", b"").decode("latin-1")
            scope[OWNER] = self._keys.check(authorization, counts=scope["method"] == "POST")
        length = headers.get(b"content-length", b"0")
        if length.isdigit() and (len(length) > 15 or int(length) > MAX_BODY_BYTES):  # no number is too long to read
            raise _too_large()


def _is_public(scope: Scope) -> bool:
    """The page, which asks its user for a key, what describes the API, and whether it is alive."""
    path = scope.get("path", "").removeprefix(scope.get("root_path", ""))  # behind the prefix of its application
    return path in ("", "/", "/health", "/openapi.json") or path.startswith("/page/")


def _too_large() -> Refusal:
    return Refusal(413, f"the body is larger than {MAX_BODY_BYTES} bytes")


class _BodyRefused(Exception):
    pass


class _Body:
    """Receives a body, as long as it is neither too large (it may come without Content-Length) nor too slow."""

    def __init__(self, receive: Receive, timeout_s: float) -> None:
        self._receive = receive
        self._timeout_s = timeout_s
        self._deadline: float | None = None
        self._received = 0
        self._complete = False
        self.refusal: Refusal | None = None

    async def __call__(self) -> Message:
        if self._complete:
            return await self._receive()
        now = asyncio.get_running_loop().time()
        self._deadline = self._deadline or now + self._timeout_s
        try:
            async with asyncio.timeout_at(self._deadline):
                message = await self._receive()
        except TimeoutError:
            self.refusal = Refusal(408, f"the body took longer than {self._timeout_s:g} seconds to arrive")
            raise _BodyRefused from None
        self._complete = not message.get("more_body", False)
        self._received += len(message.get("body", b""))
        if self._received > MAX_BODY_BYTES:
            self.refusal = _too_large()
            raise _BodyRefused
        return message


def _log_without_message(error: Exception) -> None:
    places = [f"{frame.filename}:{frame.lineno} {frame.name}" for frame in traceback.extract_tb(error.__traceback__)]
    _log.error("a request failed with %s at %s", type(error).__name__, " < ".join(reversed(places[-8:])))
