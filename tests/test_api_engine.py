"""The API in front of a real engine: a reply that is resumed where nobody knows it comes out as if nothing had been."""

import asyncio

import pytest

from nanochat_ray.engine.load import ChatModel
from nanochat_ray.serve.api import api_of
from nanochat_ray.serve.local import LocalBackend
from nanochat_ray.serve.sse import Event
from tests.asgi import CHAT, Client, user
from tests.fakes import tiny_engine
from tests.test_api_resume import KEY, Clock, Received, receive


def assert_same(one: Received, other: Received) -> None:
    """Everything; but a model that reads tokens at once and one by one gives logits that differ in the last bits."""
    assert one.choices.keys() == other.choices.keys()
    for index, choice in one.choices.items():
        expected = other.choices[index]
        assert (choice.text, choice.tools, choice.finish) == (expected.text, expected.tools, expected.finish)
        assert [entry["token"] for entry in choice.logprobs] == [entry["token"] for entry in expected.logprobs]
        assert [entry["logprob"] for entry in choice.logprobs] == pytest.approx(
            [entry["logprob"] for entry in expected.logprobs], abs=1e-3
        )


@pytest.mark.parametrize("more", [{}, {"frequency_penalty": 1.5, "repetition_penalty": 1.3}, {"temperature": 0}])
def test_a_real_reply_is_resumed_exactly_with_and_without_the_journal(more):
    body = {"messages": user("hello"), "n": 2, "max_tokens": 20, "temperature": 1, "logprobs": True, "top_logprobs": 2}

    async def run() -> None:
        backend = LocalBackend(ChatModel(tiny_engine(), "tiny", {}, "f"), max_waiting=8)
        clock = Clock()
        client = Client(api_of(backend, clock=clock))
        try:
            async with client.stream(CHAT, {**body, **more, "stream": True}, headers=KEY) as answer:
                items = [item async for item in answer.items() if isinstance(item, Event)]
            calm = Received().with_all(items)
            assert calm.done
            places = [place for place, item in enumerate(items[:-1]) if item.last_id]
            for place in places[:: max(1, len(places) // 4)]:
                for forget in (clock.forget, lambda: None):
                    forget()
                    resumed = Received().with_all(items[: place + 1])
                    await receive(client, {**body, **more}, items[place].last_id, into=resumed)
                    assert_same(resumed, calm)
        finally:
            backend.close()

    asyncio.run(run())
