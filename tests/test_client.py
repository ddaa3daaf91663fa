"""The client that comes back: every delta once, however often the connection breaks, and clear words when it cannot."""

import asyncio
import json
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nanochat_ray.engine.sampler import SamplingParams
from nanochat_ray.errors import UserError
from nanochat_ray.serve.api import api_of
from nanochat_ray.serve.backend import Waiting
from nanochat_ray.serve.client import KEY_VARIABLE, ask
from tests.asgi import CHAT, Client, user
from tests.fake_backend import FakeBackend

URL = "http://127.0.0.1:8000"
PARAMS = SamplingParams(seed=5, max_tokens=50)


class Server:
    """The real API behind a connection that breaks after so many bytes; then after the next number of bytes; …

    remembers   whether it knows, when a client comes back, what it had sent
    """

    def __init__(self, backend: FakeBackend, cuts: list[int], remembers: bool = False) -> None:
        self.cuts = cuts
        self.requests: list[httpx.Request] = []
        self._api = api_of(backend, clock=lambda: 0.0 if remembers else 10_000.0 * len(self.requests))

    def __call__(self, request: httpx.Request) -> httpx.Response:
        self.requests.append(request)
        headers = {name: value for name, value in request.headers.items() if name != "content-length"}
        answer = asyncio.run(Client(self._api).ask(CHAT, portions=[request.content], headers=headers))
        cut = self.cuts.pop(0) if self.cuts else None
        if cut is None:
            return httpx.Response(answer.status, headers=answer.headers, content=answer.content)
        return httpx.Response(answer.status, headers=answer.headers, stream=Broken(answer.content[:cut]))


class Broken(httpx.SyncByteStream):
    def __init__(self, content: bytes) -> None:
        self.content = content

    def __iter__(self) -> Iterator[bytes]:
        yield self.content
        raise httpx.ReadError("the connection was lost")


def run(handler: Callable[[httpx.Request], httpx.Response], **options: Any) -> tuple[list[dict[str, Any]], list[float]]:
    """The deltas, and the times that were slept."""
    slept: list[float] = []
    options = {"sleep": slept.append, **options}
    deltas = ask(URL, user("sum"), PARAMS, transport=httpx.MockTransport(handler), **options)
    return list(deltas), slept


def failing(handler: Callable[[httpx.Request], httpx.Response]) -> tuple[str, list[float]]:
    slept: list[float] = []
    with pytest.raises(UserError) as caught:
        list(ask(URL, user("sum"), PARAMS, transport=httpx.MockTransport(handler), sleep=slept.append))
    return str(caught.value), slept


def said(deltas: list[dict[str, Any]]) -> tuple[str, list[Any]]:
    """Text and calls; how the text is cut into deltas is nobody's business."""
    return "".join(delta.get("content", "") for delta in deltas), [delta["tool"] for delta in deltas if "tool" in delta]


CALM = said(run(Server(FakeBackend(), []))[0])


@given(st.lists(st.integers(0, 10_000), max_size=6), st.booleans())
@settings(max_examples=15)
def test_a_connection_that_breaks_anywhere_loses_and_repeats_nothing(cuts, remembers):
    server = Server(FakeBackend(), list(cuts), remembers)
    assert said(run(server)[0]) == CALM
    assert len({request.headers["idempotency-key"] for request in server.requests}) == 1
    assert len({request.content for request in server.requests}) == 1


def test_what_is_sent_and_what_is_told_about_waiting(monkeypatch):
    monkeypatch.setenv(KEY_VARIABLE, "nr-key")
    states: list[dict[str, Any]] = []
    server = Server(FakeBackend(waits=(Waiting("queued", 2),)), [2500])
    _, slept = run(server, on_state=states.append)
    assert slept == [0.5]
    assert states == [
        {"state": "queued", "ahead": 2},
        {"state": "writing"},
        {"state": "reconnecting", "attempt": 1},
        {"state": "moved"},
        {"state": "queued", "ahead": 2},
        {"state": "writing"},
    ]
    first, second = server.requests
    assert "last-event-id" not in first.headers
    assert second.headers["last-event-id"]
    assert second.headers["authorization"] == "Bearer nr-key"
    body = json.loads(first.content)
    assert (body["seed"], body["max_tokens"], body["stream"]) == (5, 50, True)
    assert "min_p" not in body


def test_other_parameters_are_sent_only_if_they_change_something():
    seen: list[httpx.Request] = []

    def handler(request: httpx.Request) -> httpx.Response:
        seen.append(request)
        return httpx.Response(200, content=b"data: [DONE]\n\n")

    params = SamplingParams(min_p=0.1, presence_penalty=0.5, stop=("x",))
    assert list(ask(URL, user("x"), params, transport=httpx.MockTransport(handler))) == []
    body = json.loads(seen[0].content)
    assert (body["min_p"], body["presence_penalty"], body["stop"]) == (0.1, 0.5, ["x"])
    assert "frequency_penalty" not in body


def test_a_server_without_room_is_asked_again_when_it_said():
    answers = [
        httpx.Response(503, headers={"retry-after": "7"}, json={"error": {"message": "full"}}),
        httpx.Response(429, headers={"retry-after": "Wed, 21 Oct 2026 07:28:00 GMT"}),
        httpx.Response(502),
        httpx.Response(200, content=b'data: {"choices":[{"delta":{"content":"x"}}]}\n\ndata: [DONE]\n\n'),
    ]
    deltas, slept = run(lambda _: answers.pop(0))
    assert (deltas, slept) == ([{"content": "x"}], [7, 1, 2])


def test_a_server_that_stays_full_is_given_up():
    message, slept = failing(lambda _: httpx.Response(503, json={"error": {"message": "as many as can wait, wait"}}))
    assert "no room now: as many as can wait, wait" in message
    assert 100 < sum(slept) <= 120
    assert max(slept) == 8


@pytest.mark.parametrize("status", [400, 401, 404, 409, 500])
def test_a_refusal_is_told_in_the_server_s_words(status):
    message, slept = failing(lambda _: httpx.Response(status, json={"error": {"message": "because"}}))
    assert (f"answered {status}: because" in message, slept) == (True, [])
    assert "answered 400: <html>" in failing(lambda _: httpx.Response(400, content=b"<html>"))[0]


def test_an_error_in_the_stream_ends_it():
    message, slept = failing(Server(FakeBackend(fail_at=9), []))
    assert ("broke off: the model failed" in message, slept) == (True, [])


def test_a_server_that_is_not_there_is_one_clear_line_at_once():
    def nobody(_: httpx.Request) -> httpx.Response:
        raise httpx.ConnectError("refused")

    message, slept = failing(nobody)
    assert ("is the server running?" in message, slept) == (True, [])
    with pytest.raises(UserError, match="http"):
        list(ask("nonsense", user("x"), PARAMS))


def test_a_server_that_answered_before_is_waited_for():
    refused = 3
    server = Server(FakeBackend(), [])

    def away(request: httpx.Request) -> httpx.Response:
        nonlocal refused
        refused -= 1
        if refused >= 0:
            raise httpx.ConnectError("refused")
        return server(request)

    deltas, slept = run(away, known=True)
    assert said(deltas) == CALM
    assert slept == [0.5, 1.0, 2.0]


def test_a_server_that_goes_for_good_is_given_up_after_two_minutes():
    server = Server(FakeBackend(), [2500])

    def handler(request: httpx.Request) -> httpx.Response:
        if server.requests:
            raise httpx.ConnectError("refused")
        return server(request)

    message, slept = failing(handler)
    assert "does not come back" in message
    assert slept[:6] == [0.5, 1, 2, 4, 8, 8]
    assert sum(slept) <= 120


def test_a_server_without_ids_is_not_asked_again_in_the_middle_of_a_reply():
    content = b'data: {"choices":[{"delta":{"content":"x"}}]}\n\n'
    message, slept = failing(lambda _: httpx.Response(200, content=content))
    assert ("in the middle of the reply" in message, slept) == (True, [])
