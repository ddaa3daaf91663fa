"""A client of our own server, or of any that speaks OpenAI's streamed chat completions. No Ray.

A broken connection is not the end of a reply: the same request is sent again, with the key of the reply and the id of
the last event, and the server sends what comes after it.
"""

import json
import os
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import httpx

from nanochat_ray.engine.sampler import SamplingParams
from nanochat_ray.errors import UserError
from nanochat_ray.serve.sse import Comment, Event, Parser

CONNECT_TIMEOUT_S = 10.0
SILENCE_TIMEOUT_S = 60.0  # our server says something every 10 s; others read a long prompt first
GIVE_UP_S = 120.0  # without any event
FIRST_DELAY_S = 0.5
LONGEST_DELAY_S = 8.0
KEY_VARIABLE = "NANOCHAT_API_KEY"
_NOTHING_THERE = (httpx.ConnectError, httpx.ConnectTimeout, httpx.UnsupportedProtocol)
_TRY_AGAIN = (408, 429, 502, 503, 504)
_PASSING = ("overloaded", "starting")  # codes of errors in a stream

State = dict[str, Any]


def ask(
    url: str,
    messages: list[dict[str, Any]],
    params: SamplingParams,
    *,
    on_state: Callable[[State], None] = lambda state: None,
    known: bool = False,
    transport: httpx.BaseTransport | None = None,
    sleep: Callable[[float], None] = time.sleep,
) -> Iterator[dict[str, Any]]:
    """The deltas of one streamed reply, each once, however often the connection breaks.

    Args:
        url: of the server, without a path.
        on_state: called with what the server says about a reply that waits ({"state": "queued", "ahead": 3}), and with
            {"state": "reconnecting", "attempt": 1} before each new attempt.
        known: there was a server at this address a moment ago; if none listens there now, it will be back.

    Raises:
        UserError: the server cannot be reached, refuses the request (with its own words), or broke off and does not
            come back.
    """
    reply = _Reply(url, _body(messages, params), _headers(), on_state, known)
    timeout = httpx.Timeout(SILENCE_TIMEOUT_S, connect=CONNECT_TIMEOUT_S)
    attempt, waited_s = 0, 0.0
    with httpx.Client(timeout=timeout, transport=transport) as http:
        while True:
            before = reply.events
            try:
                yield from reply.receive(http)
            except httpx.InvalidURL as error:
                raise UserError(f"{url} is not an address ({error})") from error
            except (httpx.HTTPError, _TryAgain) as error:
                if reply.events > before:
                    attempt, waited_s = 0, 0.0
                delay_s = _delay(error, attempt)
                if not reply.may_go_on(error) or waited_s + delay_s > GIVE_UP_S:
                    raise reply.failure(error) from error
                attempt, waited_s = attempt + 1, waited_s + delay_s
                on_state({"state": "reconnecting", "attempt": attempt})
                sleep(delay_s)
            else:
                return


class _TryAgain(Exception):
    """The server asked for patience (then `answered` is true), or closed the connection before the end."""

    def __init__(self, message: str, retry_after_s: float | None = None, answered: bool = False) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s
        self.answered = answered


@dataclass
class _Reply:
    """What has been received of a reply."""

    url: str
    body: dict[str, Any]
    headers: dict[str, str]
    on_state: Callable[[State], None]
    known: bool
    events: int = 0
    deltas_without_id: bool = field(default=False)

    def receive(self, http: httpx.Client) -> Iterator[dict[str, Any]]:
        """One attempt, from behind the last event."""
        address = f"{self.url.rstrip('/')}/v1/chat/completions"
        with http.stream("POST", address, json=self.body, headers=self.headers) as response:
            if response.status_code in _TRY_AGAIN:
                raise _TryAgain(_message(response.read()), _retry_after(response), answered=True)
            if response.status_code != 200:
                hint = f"; put it into the variable {KEY_VARIABLE}" if response.status_code == 401 else ""
                raise UserError(f"{self.url} answered {response.status_code}: {_message(response.read())}{hint}")
            parser = Parser()
            for portion in response.iter_bytes():
                for item in parser.push(portion):
                    if isinstance(item, Comment):
                        if item.state is not None:
                            self.on_state(item.state)
                    elif item.data == "[DONE]":
                        return
                    else:
                        yield from self._deltas(item)
        raise _TryAgain("the connection was closed in the middle of the reply")

    def _deltas(self, event: Event) -> Iterator[dict[str, Any]]:
        value = json.loads(event.data)
        if "error" in value:
            if value["error"].get("code") in _PASSING:
                raise _TryAgain(value["error"]["message"], answered=True)
            raise UserError(f"{self.url} broke off: {value['error']['message']}")
        self.events += 1
        if event.last_id:
            self.headers["Last-Event-ID"] = event.last_id
        for choice in value["choices"]:
            delta = choice["delta"]
            self.deltas_without_id |= not event.last_id and bool(delta.get("content") or delta.get("tool"))
            yield delta

    def may_go_on(self, error: Exception) -> bool:
        """Not when nothing listens there; nor when the server gives no ids, as then the reply would begin again."""
        if self.deltas_without_id:
            return False
        return self.known or self.events > 0 or not isinstance(error, _NOTHING_THERE)

    def failure(self, error: Exception) -> UserError:
        if isinstance(error, _TryAgain) and error.answered:
            return UserError(f"{self.url} has no room now: {error}")
        if self.events:
            return UserError(f"{self.url} closed the connection in the middle of the reply and does not come back")
        return UserError(f"no reply from {self.url} ({error}); is the server running? `python -m jobs.serve`")


def _body(messages: list[dict[str, Any]], params: SamplingParams) -> dict[str, Any]:
    """Other servers know only OpenAI's parameters: of ours, those that change something are sent."""
    body = {
        "messages": messages,
        "stream": True,
        "temperature": params.temperature,
        "top_k": params.top_k,
        "top_p": params.top_p,
        "seed": params.seed,
        "max_tokens": params.max_tokens,
    }
    plain = SamplingParams()
    for name in ("min_p", "repetition_penalty", "presence_penalty", "frequency_penalty"):
        if getattr(params, name) != getattr(plain, name):
            body[name] = getattr(params, name)
    if params.stop:
        body["stop"] = list(params.stop)
    return body


def _headers() -> dict[str, str]:
    headers = {"Idempotency-Key": str(uuid.uuid4())}
    if key := os.environ.get(KEY_VARIABLE):
        headers["Authorization"] = f"Bearer {key}"
    return headers


def _delay(error: Exception, attempt: int) -> float:
    if isinstance(error, _TryAgain) and error.retry_after_s is not None:
        return max(FIRST_DELAY_S, error.retry_after_s)
    return min(LONGEST_DELAY_S, FIRST_DELAY_S * 2**attempt)


def _retry_after(response: httpx.Response) -> float | None:
    try:
        return max(0.0, float(response.headers["retry-after"]))
    except (KeyError, ValueError):  # none, or a date
        return None


def _message(body: bytes) -> str:
    try:
        return str(json.loads(body)["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return body[:200].decode(errors="replace")
