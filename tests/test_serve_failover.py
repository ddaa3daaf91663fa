"""Replies on machines that come and go, through the command a user types: each is the undisturbed one, to the byte."""

import asyncio
import json
import os
import random
import signal
import time
from dataclasses import dataclass, field
from pathlib import Path

import httpx
import pytest

from nanochat_ray.bench.served import save_untrained
from nanochat_ray.bench.spot_cluster import SpotCluster, spot_cluster
from nanochat_ray.plan import make_plan
from nanochat_ray.serve.sse import Comment, Parser
from nanochat_ray.tokenizer import train_tokenizer
from tests.serving import free_port, running

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(600)]

STREAMS = 16
CHAT = "/v1/chat/completions"
LONG = 300  # tokens; an untrained model ends a sampled reply by chance, so the longest of each kind are chosen


@dataclass
class Streamed:
    """One reply as its client saw it."""

    text: str = ""
    tokens: int = 0
    states: list[str] = field(default_factory=list)
    finish: str | None = None
    error: str | None = None


async def stream(client: httpx.AsyncClient, body: dict) -> Streamed:
    seen, parser = Streamed(), Parser()
    options = {"stream": True, "stream_options": {"include_usage": True}}
    async with client.stream("POST", CHAT, json={**body, **options}) as answer:
        assert answer.status_code == 200, await answer.aread()
        async for portion in answer.aiter_bytes():
            for event in parser.push(portion):
                if isinstance(event, Comment):
                    seen.states += [event.state["state"]] if event.state else []
                    continue
                if event.data == "[DONE]":
                    return seen
                value = json.loads(event.data)
                seen.error = value.get("error", {}).get("message")
                for choice in value.get("choices", []):
                    seen.text += choice["delta"].get("content") or ""
                    seen.finish = choice["finish_reason"] or seen.finish
                seen.tokens = (value.get("usage") or {}).get("completion_tokens", seen.tokens)
    return seen


async def all_streams(url: str, bodies: list[dict], meanwhile=None) -> list[Streamed]:
    async with httpx.AsyncClient(base_url=url, timeout=300) as client:
        streams = [asyncio.create_task(stream(client, body)) for body in bodies]
        if meanwhile is not None:
            await meanwhile()
        return await asyncio.gather(*streams)


def body(number: int) -> dict:
    """Every second one is greedy."""
    sampling = {"temperature": 0} if number % 2 else {"temperature": 1.0, "top_k": 200, "seed": number}
    messages = [{"role": "user", "content": f"{number} tell me something long " + "about it " * (number % 7)}]
    return {"messages": messages, "max_tokens": 1200, **sampling}


@pytest.fixture(scope="module")
def storage(tmp_path_factory) -> Path:
    """A run with an untrained model whose steps are slow enough for something to happen to it while it writes."""
    folder = tmp_path_factory.mktemp("storage")
    letters = random.Random(0)
    words = ["".join(letters.choices("abcdefghijklmnop", k=letters.randint(2, 7))) for _ in range(4000)]
    tokenizer = train_tokenizer([" ".join(words)], 2048)
    plan = make_plan(
        depth=4, vocab_size=2048, head_size=64, sequence_len=2048, batch_tokens=4096, micro_batch_rows=1, steps=1
    )
    save_untrained(str(folder), "spot", plan, tokenizer)
    return folder


def replicas(url: str) -> list[dict]:
    return httpx.get(f"{url}/stats", timeout=10).json()["replicas"]


def wait_for_replicas(url: str, count: int, seconds: float = 90) -> list[dict]:
    deadline = time.monotonic() + seconds
    while len(found := replicas(url)) < count:
        assert time.monotonic() < deadline, f"{len(found)} replicas instead of {count}"
        time.sleep(0.5)
    return found


async def until_writing(url: str, everywhere: int) -> list[dict]:
    """The replicas, once so many write at the same time."""
    deadline = time.monotonic() + 60
    async with httpx.AsyncClient(base_url=url, timeout=10) as client:
        while True:
            found = (await client.get("/stats")).json()["replicas"]
            if sum(replica["running"] > 0 and replica["generated_tokens"] > 0 for replica in found) >= everywhere:
                return found
            assert time.monotonic() < deadline, found
            await asyncio.sleep(0.1)


def serving(cluster: SpotCluster, storage: Path, count: int):
    port = str(free_port())
    flags = ["--storage", str(storage), "--run", "spot", "--dtype", "bf16", "--replicas", str(count)]
    command = ["-m", "jobs.serve", *flags, "--address", cluster.address, "--port", port, "--json"]
    return running(command, ready="url", environment=cluster.environment)


def test_sixteen_replies_survive_a_killed_replica_and_a_machine_with_notice(storage):
    with spot_cluster(machines=3) as cluster, serving(cluster, storage, 3) as (_, line):
        url = json.loads(line)["url"]
        wait_for_replicas(url, 3)
        candidates = [body(number) for number in range(60)]
        undisturbed = []
        for first in range(0, len(candidates), STREAMS):
            undisturbed += asyncio.run(all_streams(url, candidates[first : first + STREAMS]))
        pairs = list(zip(candidates, undisturbed, strict=True))
        longest = [sorted(kind, key=lambda pair: -pair[1].tokens)[: STREAMS // 2] for kind in (pairs[::2], pairs[1::2])]
        both = [pair for kind in longest for pair in kind]
        assert min(reply.tokens for _, reply in both) >= LONG
        happened: dict = {}

        async def meanwhile() -> None:
            writing = [one for one in await until_writing(url, 3) if one["running"]]
            killed, drained = writing[0], next(one for one in writing if one["node"] != writing[0]["node"])
            happened.update(killed=killed["running"], drained=drained["running"])
            os.kill(killed["pid"], signal.SIGKILL)
            deadline = await asyncio.to_thread(cluster.drain, drained["node"], 20.0)

            async def take_the_machine() -> None:
                await asyncio.sleep(max(0.0, deadline - time.time()))
                await asyncio.to_thread(cluster.kill, drained["node"])

            happened["taking"] = asyncio.create_task(take_the_machine())

        async def disturbed() -> list[Streamed]:
            seen = await all_streams(url, [wish for wish, _ in both], meanwhile)
            await happened["taking"]
            return seen

        seen = asyncio.run(disturbed())
        assert [one.error for one in seen] == [None] * STREAMS
        assert [(one.text, one.tokens, one.finish) for one in seen] == [
            (one.text, one.tokens, one.finish) for _, one in both
        ]
        assert happened["killed"] > 0
        moved = sum("moved" in one.states for one in seen)
        assert moved >= happened["killed"], [one.states for one in seen]
        cluster.add()
        wait_for_replicas(url, 3)
