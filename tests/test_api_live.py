"""Replies while they are written: states, keep-alives, bundles, clients that leave in any phase, failures, figures."""

import asyncio
import hashlib
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from nanochat_ray.serve.api import Times, api_of
from nanochat_ray.serve.backend import Busy, Waiting
from nanochat_ray.serve.keys import ApiKeys, StoredKey
from nanochat_ray.serve.sse import Comment, Event
from tests.asgi import CHAT, COMPLETIONS, Client, user
from tests.fake_backend import BUSY, FakeBackend

BODY = {"messages": user("x"), "stream": True}
SLOW = {"messages": user("slow"), "max_tokens": 800}


def stream_of(backend: FakeBackend, body: dict[str, Any] = BODY, **options: Any) -> list[Event | Comment]:
    async def run() -> list[Event | Comment]:
        async with Client(api_of(backend, **options)).stream(CHAT, body) as answer:
            return [item async for item in answer.items()]

    return asyncio.run(run())


def states(items: list[Event | Comment]) -> list[Any]:
    return [item.state for item in items if isinstance(item, Comment)]


def data(items: list[Event | Comment]) -> str:
    return "\n".join(item.data for item in items if isinstance(item, Event))


# --- states and bundles ----------------------------------------------------------------------------------------------


def test_a_reply_that_waits_says_why_and_when_it_goes_on():
    waits = (Waiting("starting"), Waiting("queued", 2), Waiting("queued", 2), Waiting("queued", 1))
    items = stream_of(FakeBackend(waits=waits))
    assert states(items) == [
        {"state": "starting"},
        {"state": "queued", "ahead": 2},
        {"state": "queued", "ahead": 1},
        {"state": "writing"},
    ]
    assert isinstance(items[0], Event)  # the role: the answer has begun
    assert items[-1] == Event("[DONE]", items[-2].last_id)


def test_a_reply_of_several_choices_waits_only_while_none_goes_on():
    class OneIsLate(FakeBackend):
        def generate(self, request):
            self.waits = (Waiting("queued", 1),) if len(self.requests) else ()
            return super().generate(request)

    assert states(stream_of(OneIsLate(), {**BODY, "n": 2})) in ([], [{"state": "queued", "ahead": 1}])
    both = FakeBackend(waits=(Waiting("queued", 1),))
    assert states(stream_of(both, {**BODY, "n": 2})) == [{"state": "queued", "ahead": 1}, {"state": "writing"}]


def test_silence_is_filled_with_comments_that_say_nothing():
    backend = FakeBackend(pause=lambda: asyncio.sleep(0.05), together=1000, waits=(Waiting("queued", 1),))
    items = stream_of(backend, times=Times(keep_alive=0.02))
    assert states(items).count(None) >= 2


def test_a_backend_that_says_nothing_for_long_does_not_keep_the_stream_from_beginning():
    async def run() -> None:
        backend = FakeBackend(pause=asyncio.Event().wait)
        client = Client(api_of(backend, times=Times(first_update=0.01, keep_alive=0.01)))
        async with client.stream(CHAT, BODY) as answer:
            assert answer.status == 200
            items = answer.items()
            assert isinstance(await anext(items), Event)
            assert await anext(items) == Comment("")
        await asyncio.sleep(0)
        assert backend.active == 0

    asyncio.run(run())


def test_what_arrives_together_is_sent_together():
    pieces = data(stream_of(FakeBackend(together=1))).count('"content"')
    bundles = data(stream_of(FakeBackend(together=1000))).count('"content"')
    assert (pieces, bundles) == (1 + len("Hello from the script."), 2)


def test_proxies_are_told_not_to_collect_a_stream():
    answer = asyncio.run(Client(api_of(FakeBackend())).ask(CHAT, BODY))
    assert answer.headers["content-type"].startswith("text/event-stream")
    assert answer.headers["x-accel-buffering"] == "no"
    assert answer.headers["cache-control"] == "no-store"


# --- clients that leave ----------------------------------------------------------------------------------------------


def never() -> Awaitable[Any]:
    return asyncio.Event().wait()


def a_while() -> Awaitable[Any]:
    return asyncio.sleep(0.001)


@pytest.mark.parametrize("path", [CHAT, COMPLETIONS])
@pytest.mark.parametrize("n", [1, 3])
@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize(
    ("waits", "pause"),
    [((), never), ((Waiting("queued", 1),), never), ((), a_while)],
    ids=["before anything", "queued", "writing"],
)
def test_the_work_of_a_client_that_leaves_stops_at_once(path, n, stream, waits, pause: Callable[[], Awaitable[Any]]):
    async def run() -> None:
        backend = FakeBackend(waits=waits, pause=pause)
        client = Client(api_of(backend, times=Times(first_update=0.02)))
        body = {**SLOW, "n": n, "stream": stream}
        if path == COMPLETIONS:
            body["prompt"] = body.pop("messages")[0]["content"]

        async def ask() -> None:
            async with client.stream(path, body) as answer:
                async for _ in answer.portions():
                    pass

        others = asyncio.all_tasks()
        asking = asyncio.create_task(ask())
        await asyncio.sleep(0.06)
        assert backend.active == n
        client.leave_all()
        await asyncio.wait_for(asking, 1)
        await asyncio.sleep(0)
        assert (backend.active, backend.opened, backend.finished) == (0, n, 0)
        figures = (await client.ask("/stats")).json()["requests"]
        assert (figures["active"], figures["cancelled"], figures["failed"]) == (0, 1, 0)
        assert asyncio.all_tasks() == others

    asyncio.run(run())


@pytest.mark.parametrize("stream", [True, False])
def test_a_handler_that_is_cancelled_stops_its_work(stream):
    """Ray Serve cancels what answers a request whose client has gone."""

    async def run() -> None:
        backend = FakeBackend(pause=a_while)
        client = Client(api_of(backend))
        asking = asyncio.create_task(client.ask(CHAT, {**SLOW, "stream": stream}))
        await asyncio.sleep(0.02)
        assert backend.active == 1
        client.cancel_all()
        await asyncio.wait([asking])
        await asyncio.sleep(0)
        assert backend.active == 0
        assert (await client.ask("/stats")).json()["requests"]["cancelled"] == 1

    asyncio.run(run())


def test_a_slow_reader_does_not_slow_the_model_and_gets_everything():
    async def run() -> None:
        backend = FakeBackend()
        async with Client(api_of(backend)).stream(CHAT, {**SLOW, "stream": True}) as answer:
            while not backend.finished:
                await asyncio.sleep(0)
            text = (await answer.read()).decode()
        assert text.endswith("[DONE]\n\n")

    asyncio.run(run())


# --- failures --------------------------------------------------------------------------------------------------------


def test_a_reply_that_fails_is_an_error_in_the_stream_or_of_the_answer():
    items = stream_of(FakeBackend(fail_at=5))
    assert '"server_error"' in items[-1].data
    assert "[DONE]" not in data(items)
    assert '"content":"Hello"' in data(stream_of(FakeBackend(fail_at=5, together=1000)))
    whole = asyncio.run(Client(api_of(FakeBackend(fail_at=5))).ask(CHAT, {"messages": user("x")}))
    assert (whole.status, whole.error["type"]) == (500, "server_error")


def test_one_choice_that_fails_ends_all():
    async def run() -> None:
        backend = FakeBackend(fail_at=7, pause=a_while)
        answer = await Client(api_of(backend)).ask(CHAT, {**BODY, "n": 3})
        assert b"server_error" in answer.content
        await asyncio.sleep(0)
        assert (backend.opened, backend.active) == (3, 0)

    asyncio.run(run())


def test_one_choice_without_room_refuses_all():
    class RoomForTwo(FakeBackend):
        def generate(self, request):
            self.refusal = BUSY if len(self.requests) == 2 else None
            return super().generate(request)

    async def run() -> None:
        backend = RoomForTwo(pause=a_while)
        client = Client(api_of(backend))
        assert (await client.ask(CHAT, {**BODY, "n": 3})).status == 503
        await asyncio.sleep(0)
        assert (backend.opened, backend.active) == (2, 0)
        assert (await client.ask("/stats")).json()["requests"]["refused"] == 1

    asyncio.run(run())


def test_a_stream_that_has_begun_waits_for_room_instead_of_breaking():
    class FullAtFirst(FakeBackend):
        def generate(self, request):
            room = len(self.requests) >= 2  # at the third attempt
            self.refusal = None if room else Busy("full", retry_after_s=0)
            return super().generate(request)

    async def run() -> None:
        body, key = {**BODY, "messages": user("slow"), "max_tokens": 9}, {"idempotency-key": "k"}
        async with Client(api_of(FakeBackend())).stream(CHAT, body, headers=key) as answer:
            items = [item async for item in answer.items() if isinstance(item, Event)]
        resume = {**key, "last-event-id": items[4].last_id}
        async with Client(api_of(FullAtFirst())).stream(CHAT, body, headers=resume) as answer:
            resumed = [item async for item in answer.items()]
        assert states(resumed)[:2] == [{"state": "moved"}, {"state": "queued"}]
        assert resumed[-1].data == "[DONE]"

    asyncio.run(run())


def test_the_keys_of_two_people_have_nothing_to_do_with_each_other():
    secrets = ("one", "two")
    stored = [StoredKey(name, hashlib.sha256(name.encode()).hexdigest()) for name in secrets]

    async def run() -> None:
        backend = FakeBackend()
        client = Client(api_of(backend, keys=ApiKeys(stored, lambda: 0.0)))
        for name in secrets:
            headers = {"idempotency-key": "same", "authorization": f"Bearer {name}"}
            assert (await client.ask(CHAT, {"messages": user(name)}, headers=headers)).status == 200
        assert len(backend.requests) == 2

    asyncio.run(run())


# --- figures ---------------------------------------------------------------------------------------------------------


def test_the_figures_for_prometheus():
    async def run() -> str:
        backend = FakeBackend(waits=(Waiting("moved"),), pause=a_while)
        client = Client(api_of(backend))
        await client.ask(CHAT, {**BODY, "max_tokens": 5})
        await client.ask(CHAT, {**BODY, "n": 2, "max_tokens": 5})
        await client.ask(CHAT, {"messages": []})
        backend.refusal = BUSY
        await client.ask(CHAT, BODY)
        for path in ("/health", "/v1/models/a", "/v1/models/b", "/page/../x", "/nothing/1", "/nothing/2"):
            await client.ask(path)
        answer = await client.ask("/metrics")
        assert answer.headers["content-type"].startswith("text/plain; version=0.0.4")
        return answer.content.decode()

    families = list(text_string_to_metric_families(asyncio.run(run())))
    assert all(family.name.startswith("nanochat_") and family.documentation for family in families)
    samples = {
        (sample.name.removeprefix("nanochat_"), *sample.labels.values()): sample.value
        for family in families
        for sample in family.samples
    }
    assert samples["http_requests_total", CHAT, "200"] == 2
    assert samples["http_requests_total", CHAT, "400"] == 1
    assert samples["http_requests_total", CHAT, "503"] == 1
    assert samples["http_requests_total", "/v1/models/{model_id:path}", "404"] == 2
    assert samples["http_requests_total", "other", "404"] == 2
    assert samples["generated_tokens_total",] == 15
    assert samples["prompt_tokens_total",] == 10
    assert samples["time_to_first_token_seconds_count",] == 2
    assert samples["inter_token_seconds_count",] == 12
    assert 0.001 * 12 <= samples["inter_token_seconds_sum",] < 1
    assert samples["requests_completed_total",] == 2
    assert samples["requests_refused_total",] == 1
    assert samples["requests_moved_total",] == 3
    assert samples["replica_kv_used", "a"] == 2
    assert samples["replica_busy_s_total", "a"] == 0.5
