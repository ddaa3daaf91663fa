"""What surrounds every request and reply on HTTP: who may call, how much they may send, and security headers. No Ray.

The server is for the person at this machine. Loopback alone does not ensure that: a web page from anywhere can make
that person's browser send requests to 127.0.0.1, directly (stopped by the Origin check, and by sending no CORS
headers) or under a name of its own that resolves to 127.0.0.1 (stopped by the Host check).
"""

import base64
import hashlib
import json
import re
from collections.abc import Awaitable, Callable, MutableMapping
from contextlib import suppress
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from nanochat_ray.serve.schema import MAX_BODY_BYTES, error_body

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]

LOOPBACK_NAMES = frozenset({"127.0.0.1", "localhost", "::1"})

_HEADERS = [
    (b"x-content-type-options", b"nosniff"),
    (b"x-frame-options", b"DENY"),
    (b"referrer-policy", b"no-referrer"),
    (b"cross-origin-resource-policy", b"same-origin"),
    (b"cross-origin-opener-policy", b"same-origin"),
    (b"cache-control", b"no-store"),
]


def page() -> tuple[str, str]:
    """The chat page and its Content-Security-Policy, which allows exactly the page's own script and style."""
    html = Path(__file__).with_name("ui.html").read_text(encoding="utf-8")
    policy = (
        f"default-src 'none'; script-src {_hashes(html, 'script')}; style-src {_hashes(html, 'style')}; "
        "connect-src 'self'; img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )
    return html, policy


def _hashes(html: str, element: str) -> str:
    contents = re.findall(rf"<{element}>(.*?)</{element}>", html, re.DOTALL)
    digests = [base64.b64encode(hashlib.sha256(content.encode()).digest()).decode() for content in contents]
    return " ".join(f"'sha256-{digest}'" for digest in digests)


class Guard:
    """ASGI middleware that refuses foreign hosts, foreign origins and bodies over the limit, and adds the headers."""

    def __init__(self, app: Callable[[Scope, Receive, Send], Awaitable[None]]) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return

        limit = _Limit(receive)

        async def send_with_headers(message: MutableMapping[str, Any]) -> None:
            if message["type"] == "http.response.start":
                present = {name for name, _ in message["headers"]}
                added = [header for header in _HEADERS if header[0] not in present]
                message = {**message, "headers": [*message["headers"], *added]}
            await send(message)

        async def send_unless_refused(message: MutableMapping[str, Any]) -> None:
            if not limit.exceeded:  # the app takes a body that ends in an error for a malformed one
                await send_with_headers(message)

        refusal = _refusal(dict(scope["headers"]))
        if refusal is None:
            with suppress(_BodyTooLarge):
                await self._app(scope, limit, send_unless_refused)
            if not limit.exceeded:
                return
            refusal = 413, f"the body is larger than {MAX_BODY_BYTES} bytes"
        await _refuse(send_with_headers, *refusal)


class _BodyTooLarge(Exception):
    pass


def _refusal(headers: dict[bytes, bytes]) -> tuple[int, str] | None:
    host = headers.get(b"host", b"").decode("latin-1")
    origin = headers.get(b"origin", b"").decode("latin-1")
    try:
        name, from_host = urlsplit(f"//{host}").hostname, urlsplit(origin).netloc
    except ValueError:
        return 403, "the Host or Origin header is not a valid address"
    if name not in LOOPBACK_NAMES:
        return 403, "this server answers only to the names localhost and 127.0.0.1"
    if origin and from_host != host:
        return 403, "requests from pages of other sites are refused"
    length = headers.get(b"content-length", b"0")
    if length.isdigit() and int(length) > MAX_BODY_BYTES:
        return 413, f"the body is larger than {MAX_BODY_BYTES} bytes"
    return None


class _Limit:
    """Receives a body, as long as it is not too large; it may come without Content-Length."""

    def __init__(self, receive: Receive) -> None:
        self._receive = receive
        self._received = 0
        self.exceeded = False

    async def __call__(self) -> MutableMapping[str, Any]:
        message = await self._receive()
        self._received += len(message.get("body", b""))
        if self._received > MAX_BODY_BYTES:
            self.exceeded = True
            raise _BodyTooLarge
        return message


async def _refuse(send: Send, status: int, message: str) -> None:
    body = json.dumps(error_body(message, "invalid_request_error")).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
