"""A reply goes on elsewhere: no token lost, repeated or changed, whenever and however often its replica is lost."""

import asyncio
from contextlib import aclosing

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nanochat_ray.engine.reply import Piece
from nanochat_ray.engine.sampler import SamplingParams
from nanochat_ray.serve import failover
from nanochat_ray.serve.backend import GenerationFailed, ReplyRequest, Waiting
from nanochat_ray.serve.failover import MOST_LOSSES, OtherModel, ReplicaLost, continued

REPLY = tuple(range(40))
REQUEST = ReplyRequest((1, 2, 3), SamplingParams())


@pytest.fixture(autouse=True)
def at_once(monkeypatch):
    monkeypatch.setattr(failover, "PAUSE_S", 0.0)


class Replicas:
    """Each takes a reply up where it is told to, and is lost, or hands it over, after so many tokens."""

    def __init__(self, lives: list[tuple[int, bool]], together: int) -> None:
        self.lives, self.together = iter(lives), together
        self.asked: list[tuple[int, ...]] = []
        self.open = 0

    async def bundles(self, request: ReplyRequest):
        self.asked.append(request.said)
        assert request.said == REPLY[: len(request.said)]
        self.open += 1
        try:
            left, lost = next(self.lives, (len(REPLY), False))
            rest = REPLY[len(request.said) :]
            while rest and left > 0:
                taken, rest = rest[: self.together], rest[self.together :]
                yield [
                    Piece((token,), text=chr(65 + token), finish="stop" if token == REPLY[-1] else None)
                    for token in taken
                ]
                left -= len(taken)
                await asyncio.sleep(0)
            if rest and lost:
                raise ReplicaLost("gone")
        finally:
            self.open -= 1


async def collect(replicas: Replicas) -> list:
    return [update async for update in continued(replicas.bundles, REQUEST)]


lives = st.lists(st.tuples(st.integers(0, 12), st.booleans()), max_size=2) | st.lists(
    st.tuples(st.integers(1, 12), st.booleans()), max_size=10
)


@given(lives, st.integers(1, 5))
def test_the_reply_is_the_undisturbed_one(lives, together):
    replicas = Replicas(lives, together)
    updates = asyncio.run(collect(replicas))
    pieces = [update for update in updates if isinstance(update, Piece)]
    assert tuple(token for piece in pieces for token in piece.tokens) == REPLY
    assert "".join(piece.text for piece in pieces) == "".join(chr(65 + token) for token in REPLY)
    assert pieces[-1].finish == "stop"
    assert updates.count(Waiting("moved")) == len(replicas.asked) - 1
    assert replicas.open == 0


def test_a_reply_that_kills_its_replicas_is_given_up():
    replicas = Replicas([(5, True)] + [(0, True)] * 10, 1)
    with pytest.raises(GenerationFailed, match=f"{MOST_LOSSES} replicas"):
        asyncio.run(collect(replicas))
    assert len(replicas.asked) == 1 + MOST_LOSSES - 1
    assert replicas.open == 0


def test_a_reply_is_never_continued_by_another_model(monkeypatch):
    """While one replaces the other, the router knows replicas of both; after that only the new one's are there."""
    monkeypatch.setattr(failover, "PAUSE_S", 0.01)
    monkeypatch.setattr(failover, "OTHER_MODEL_PATIENCE_S", 0.1)
    old, sessions = Replicas([(5, True)], 1), []

    async def either(request: ReplyRequest):
        sessions.append(request.session)
        if 1 < len(sessions) < 5 or (len(sessions) > 5 and not old_is_there):
            raise OtherModel
        async with aclosing(old.bundles(request)) as bundles:
            async for bundle in bundles:
                yield bundle

    async def read() -> list:
        return [update async for update in continued(either, REQUEST)]

    old_is_there = True
    pieces = [update for update in asyncio.run(read()) if isinstance(update, Piece)]
    assert tuple(token for piece in pieces for token in piece.tokens) == REPLY
    assert len(set(sessions)) == len(sessions) == 5  # so that each attempt may find another replica
    old_is_there = False
    with pytest.raises(GenerationFailed, match="the model was replaced"):
        asyncio.run(read())


def test_who_stops_reading_stops_the_work():
    async def read_three(replicas: Replicas) -> None:
        async with aclosing(continued(replicas.bundles, REQUEST)) as updates:
            for _ in range(3):
                await anext(updates)
            assert replicas.open == 1
        assert replicas.open == 0

    asyncio.run(read_three(Replicas([], 1)))
