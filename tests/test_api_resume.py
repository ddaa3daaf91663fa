"""Replies that are asked for again: resumed at every position, finished from the journal, taken over, or refused."""

import asyncio
import json
from dataclasses import dataclass, field
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nanochat_ray.serve.api import api_of
from nanochat_ray.serve.sse import Comment, Event
from tests.asgi import CHAT, COMPLETIONS, Client, user
from tests.fake_backend import FakeBackend, scripted, seeded

KEY = {"idempotency-key": "a-reply"}


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now

    def forget(self) -> None:
        """So long that the journal remembers nothing."""
        self.now += 10_000


@dataclass
class Choice:
    """What a client has put together of one choice."""

    text: str = ""
    tools: list[dict[str, Any]] = field(default_factory=list)
    logprobs: list[Any] = field(default_factory=list)
    offsets: list[int] = field(default_factory=list)
    finish: str | None = None


@dataclass
class Received:
    """What a client has put together of a stream, or of several that continue each other."""

    choices: dict[int, Choice] = field(default_factory=dict)
    ids: list[str] = field(default_factory=list)
    states: list[Any] = field(default_factory=list)
    usage: Any = None
    error: Any = None
    done: bool = False

    def take(self, item: Event | Comment) -> None:
        if isinstance(item, Comment):
            self.states.append(item.state)
        elif item.data == "[DONE]":
            self.done = True
        else:
            value = json.loads(item.data)
            self.error = value.get("error")
            self.usage = value.get("usage")
            for choice in value.get("choices", ()):
                self._add(self.choices.setdefault(choice["index"], Choice()), choice)
                if item.last_id and "role" not in choice.get("delta", {}):
                    self.ids.append(item.last_id)

    def with_all(self, items: list[Event | Comment]) -> "Received":
        for item in items:
            self.take(item)
        return self

    def _add(self, choice: Choice, chunk: dict[str, Any]) -> None:
        assert choice.finish is None, "something came after the end"
        delta = chunk.get("delta", chunk)
        choice.text += delta.get("content") or delta.get("text") or ""
        choice.tools += [delta["tool"]] if "tool" in delta else []
        logprobs = chunk.get("logprobs") or {}
        choice.logprobs += logprobs.get("content") or logprobs.get("token_logprobs") or []
        choice.offsets += logprobs.get("text_offset") or []
        choice.finish = chunk["finish_reason"]


async def receive(client: Client, body: Any, last: str | None = None, path: str = CHAT, into=None, upto=None):
    """A stream under KEY; `upto`: the client leaves after so many events with an id."""
    received = into or Received()
    before = len(received.ids)
    headers = KEY if last is None else {**KEY, "last-event-id": last}
    async with client.stream(path, {**body, "stream": True}, headers=headers) as answer:
        assert answer.status == 200, (await answer.read(), body)
        async for item in answer.items():
            if upto is not None and len(received.ids) - before >= upto:
                break
            received.take(item)
    return received


# --- resuming --------------------------------------------------------------------------------------------------------

bodies = st.fixed_dictionaries(
    {
        "n": st.integers(1, 3),
        "max_tokens": st.sampled_from([1, 2, 7, 23, 400]),
        "stop": st.sampled_from([None, ["here"], ["8", "o zw"]]),
        "logprobs": st.none() | st.integers(0, 2),
    }
)


def request_for(kind: str, wished: dict[str, Any], question: str) -> tuple[str, dict[str, Any]]:
    body = {name: value for name, value in wished.items() if value is not None}
    if kind == COMPLETIONS:
        return kind, {**body, "prompt": question}
    if (count := body.pop("logprobs", None)) is not None:
        body |= {"logprobs": True, "top_logprobs": count}
    return kind, {**body, "messages": user(question)}


@pytest.mark.parametrize("remembered", [True, False])
@given(bodies, st.sampled_from([CHAT, COMPLETIONS]), st.text("ab", min_size=1, max_size=3), st.data())
@settings(max_examples=30)
def test_resuming_anywhere_gives_what_the_undisturbed_stream_gives(remembered, wished, kind, question, data):
    path, body = request_for(kind, wished, question)

    async def run() -> None:
        backend = FakeBackend(seeded, together=data.draw(st.sampled_from([1, 4])))
        clock = Clock()
        client = Client(api_of(backend, clock=clock))
        calm = await receive(client, body, path=path)
        assert calm.done
        clock.forget()
        disturbed, last = Received(), None
        while not disturbed.done:
            # Any event that the client has may be the last it has, also when the server has sent more.
            await receive(client, body, last, path, disturbed, upto=data.draw(st.integers(1, len(calm.ids) + 1)))
            last = disturbed.ids[-1]
            if not remembered:
                clock.forget()
        assert disturbed.choices == calm.choices
        await asyncio.sleep(0)
        assert backend.active == 0

    asyncio.run(run())


@pytest.mark.parametrize("remembered", [True, False])
@pytest.mark.parametrize("together", [1, 5])
@pytest.mark.parametrize("limit", [8, 25, 30, 400])
def test_every_single_position_of_a_reply_with_a_call_can_be_resumed(remembered, together, limit):
    body = {"messages": user("sum"), "n": 2, "logprobs": True, "max_tokens": limit, "stop": ["is 39", "zzz"]}

    async def run() -> None:
        clock = Clock()
        client = Client(api_of(FakeBackend(scripted, together=together), clock=clock))
        async with client.stream(CHAT, {**body, "stream": True}, headers=KEY) as answer:
            items = [item async for item in answer.items()]
        calm = Received().with_all(items)
        for count, item in enumerate(items[:-1], start=1):
            if item.last_id:
                if not remembered:
                    clock.forget()
                resumed = Received().with_all(items[:count])
                await receive(client, body, item.last_id, into=resumed)
                assert (resumed.done, resumed.choices) == (True, calm.choices)

    asyncio.run(run())


def test_a_finished_reply_is_answered_again_without_any_work_streamed_or_whole():
    body = {"messages": user("sum"), "logprobs": True, "top_logprobs": 1}

    async def run() -> None:
        backend = FakeBackend()
        client = Client(api_of(backend))
        first = await receive(client, body)
        whole = (await client.ask(CHAT, body, headers=KEY)).json()
        again = await receive(client, body)
        rest = await receive(client, body, first.ids[-2])
        end = await receive(client, body, first.ids[-1])
        assert (again.choices, again.done) == (first.choices, True)
        assert whole["choices"][0]["message"]["content"] == first.choices[0].text
        assert whole["choices"][0]["logprobs"]["content"] == first.choices[0].logprobs
        assert rest.choices == {0: Choice(finish="stop")}
        assert (end.choices, end.done) == ({}, True)
        assert len(backend.requests) == 1

    asyncio.run(run())


def test_what_was_written_is_not_written_again_but_gone_on_from():
    body = {"messages": user("slow"), "max_tokens": 50}

    async def run() -> None:
        backend = FakeBackend()
        client = Client(api_of(backend))
        received = await receive(client, body, upto=20)
        await asyncio.sleep(0.01)
        written = backend.new_tokens
        assert 20 <= written < 50
        await receive(client, body, received.ids[-1], into=received)
        assert backend.new_tokens == 50
        assert backend.requests[1].said == tuple(b"tick " * 10)[:written]
        whole = (await client.ask(CHAT, body, headers=KEY)).json()
        assert whole["choices"][0]["message"]["content"] == received.choices[0].text == "tick " * 10
        assert whole["usage"]["completion_tokens"] == 50

    asyncio.run(run())


def test_without_the_journal_the_beginning_is_written_again_unseen_and_the_client_told_why_it_waits():
    body = {"messages": user("slow"), "max_tokens": 50}

    async def run() -> None:
        received = await receive(Client(api_of(FakeBackend())), body, upto=20)
        backend = FakeBackend()
        client = Client(api_of(backend))
        await receive(client, body, received.ids[-1], into=received)
        assert received.choices[0].text == "tick " * 10
        assert [len(request.said) for request in backend.requests] == [0, 20]
        assert [request.params.max_tokens for request in backend.requests] == [20, 50]
        assert backend.requests[0].params.seed == backend.requests[1].params.seed
        assert received.states == [{"state": "moved"}, {"state": "writing"}]
        await receive(client, body)  # and is remembered from now on
        assert len(backend.requests) == 2

    asyncio.run(run())


def test_a_seed_that_is_not_named_follows_from_the_key():
    async def run() -> list[int]:
        backend = FakeBackend()
        client = Client(api_of(backend))
        for headers in (KEY, {"idempotency-key": "other"}, {}, {}):
            await client.ask(CHAT, {"messages": user("x")}, headers=headers)
        await Client(api_of(backend)).ask(CHAT, {"messages": user("x")}, headers=KEY)
        return [request.params.seed for request in backend.requests]

    seeds = asyncio.run(run())
    assert len(set(seeds)) == 4
    assert seeds[0] == seeds[4]


def test_a_newer_request_with_the_same_key_takes_over():
    body = {"messages": user("slow"), "max_tokens": 60}

    async def run() -> None:
        backend = FakeBackend()
        client = Client(api_of(backend))
        async with client.stream(CHAT, {**body, "stream": True}, headers=KEY) as older:
            first = await anext(older.portions())
            whole = asyncio.create_task(client.ask(CHAT, body, headers=KEY))
            left = first + await older.read()
            while not backend.requests[1:]:
                await asyncio.sleep(0)
            assert backend.active == 1
            newest = await receive(client, body)
        assert b"idempotency_conflict" in left
        assert b"[DONE]" not in left
        superseded = await whole
        assert (superseded.status, superseded.error["code"]) == (409, "idempotency_conflict")
        assert newest.choices[0].text == "tick " * 12
        assert backend.new_tokens == 60
        assert backend.active == 0

    asyncio.run(run())


# --- what cannot be resumed ------------------------------------------------------------------------------------------


def refused(headers: dict[str, str], body: dict[str, Any] | None = None, before: Any = None, backend=None):
    """The refusal of a streamed chat, after one under KEY."""

    async def run():
        client = Client(api_of(backend or FakeBackend()))
        first = await receive(client, {"messages": user("x")})
        last = first.ids[3]
        head = last.rpartition("-")[0]
        headers_now = {name: value.replace("LAST", last).replace("HEAD", head) for name, value in headers.items()}
        if before:
            before(first)
        return await client.ask(CHAT, {"messages": user("x"), "stream": True, **(body or {})}, headers=headers_now)

    return asyncio.run(run())


@pytest.mark.parametrize(
    ("headers", "body", "status", "code"),
    [
        (KEY, {"messages": user("y")}, 409, "idempotency_conflict"),
        (KEY, {"temperature": 0}, 409, "idempotency_conflict"),
        (KEY, {"n": 2}, 409, "idempotency_conflict"),
        ({**KEY, "last-event-id": "LAST"}, {"messages": user("y")}, 409, "idempotency_conflict"),
        ({"idempotency-key": "b", "last-event-id": "LAST"}, {}, 409, "idempotency_conflict"),
        ({**KEY, "last-event-id": "LAST.3:00000000"}, {}, 400, None),
        ({**KEY, "last-event-id": "HEAD-9999999:00000000"}, {}, 400, None),
        ({**KEY, "last-event-id": "x"}, {}, 400, None),
        ({**KEY, "last-event-id": "LAST999"}, {}, 400, None),
        ({"last-event-id": "LAST"}, {}, 400, None),
        ({**KEY, "last-event-id": "LAST"}, {"stream": False}, 400, None),
        ({"idempotency-key": "no spaces"}, {}, 400, None),
        ({"idempotency-key": ""}, {}, 400, None),
        ({"idempotency-key": "x" * 129}, {}, 400, None),
    ],
)
def test_what_does_not_fit_together_is_refused(headers, body, status, code):
    answer = refused(headers, body)
    assert (answer.status, answer.error["code"]) == (status, code)


def test_a_reply_of_a_model_that_was_replaced_cannot_be_continued_but_asked_for_anew():
    backend = FakeBackend()

    def replace_model(_: Received) -> None:
        backend.fingerprint = "model-2"

    answer = refused({**KEY, "last-event-id": "LAST"}, before=replace_model, backend=backend)
    assert (answer.status, answer.error["code"]) == (409, "model_changed")
    backend.fingerprint = "model-1"
    assert refused(KEY, before=replace_model, backend=backend).status == 200


@pytest.mark.parametrize("says", [b"short", b"quite another reply, which is much longer than what was received of it"])
def test_a_beginning_that_comes_out_otherwise_is_an_error_not_a_mixture(says):
    async def run() -> Received:
        first = await receive(Client(api_of(FakeBackend())), {"messages": user("slow")}, upto=30)
        other = FakeBackend(says=lambda _: list(says))
        return await receive(Client(api_of(other)), {"messages": user("slow")}, first.ids[-1])

    received = asyncio.run(run())
    assert received.error["code"] == "model_changed"
    assert not received.ids
    assert not received.done
