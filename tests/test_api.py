"""The API without Ray: the real client's view, OpenAI's shapes, and what each bad request is told."""

import asyncio
import json
import logging
from collections.abc import Awaitable, Callable
from typing import Any

import httpx
import openai
import pytest

from nanochat_ray.engine.sampler import SamplingParams
from nanochat_ray.serve.api import api_of
from nanochat_ray.serve.keys import ApiKeys, StoredKey
from tests.asgi import CHAT, COMPLETIONS, Client, user
from tests.fake_backend import BUSY, TOKENIZER, FakeBackend, seeded
from tests.fakes import HOSTILE

JSON = {"content-type": "application/json"}


def call(body: Any, backend: FakeBackend | None = None, path: str = CHAT, **options: Any):
    return asyncio.run(Client(api_of(backend or FakeBackend())).ask(path, body, **options))


def with_openai(use: Callable[[openai.AsyncOpenAI], Awaitable[Any]], backend: FakeBackend | None = None) -> Any:
    """What `use` returns for a client of the application."""

    async def run() -> Any:
        transport = httpx.ASGITransport(api_of(backend or FakeBackend()))
        http = httpx.AsyncClient(transport=transport)
        base = "http://127.0.0.1:8000/v1"
        async with openai.AsyncOpenAI(base_url=base, api_key="unused", max_retries=0, http_client=http) as client:
            return await use(client)

    return asyncio.run(run())


# --- the openai package -----------------------------------------------------------------------------------------------


def test_a_whole_chat():
    answer = with_openai(lambda client: client.chat.completions.create(model="scripted", messages=user("sum")))
    choice = answer.choices[0]
    assert (choice.message.content, choice.finish_reason) == ("Let me see:  It is 391.", "stop")
    assert choice.message.model_extra == {"tools": [{"expression": "17*23", "result": "391"}]}
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (4 + 3, 23 + 5 + 3 + 4 + 1)
    assert answer.id.startswith("chatcmpl-")


def test_a_streamed_chat_with_usage():
    async def use(client):
        options = {"include_usage": True}
        stream = await client.chat.completions.create(
            model="scripted", messages=user("sum"), stream=True, stream_options=options
        )
        return [chunk async for chunk in stream]

    chunks = with_openai(use)
    deltas = [chunk.choices[0].delta for chunk in chunks if chunk.choices]
    assert deltas[0].role == "assistant"
    assert "".join(delta.content or "" for delta in deltas) == "Let me see:  It is 391."
    tools = [delta.model_extra["tool"] for delta in deltas if delta.model_extra]
    assert tools == [{"expression": "", "result": None}, {"expression": "17*23", "result": "391"}]
    assert [chunk.choices[0].finish_reason for chunk in chunks if chunk.choices][-1] == "stop"
    assert chunks[-1].usage.total_tokens == 43
    assert chunks[0].usage is None
    assert len({chunk.id for chunk in chunks}) == 1


def test_several_choices_with_logprobs_are_what_each_seed_alone_gives():
    async def use(client):
        create = client.chat.completions.create
        common = {"model": "scripted", "messages": user("x"), "logprobs": True, "top_logprobs": 2}
        together = await create(**common, n=3, seed=(1 << 63) - 2)
        alone = [await create(**common, seed=seed) for seed in ((1 << 63) - 2, (1 << 63) - 1, -(1 << 63))]
        return together, alone

    together, alone = with_openai(use, FakeBackend(seeded))
    assert [choice.index for choice in together.choices] == [0, 1, 2]
    for choice, answer in zip(together.choices, alone, strict=True):
        assert choice.message == answer.choices[0].message
        assert choice.logprobs == answer.choices[0].logprobs
    assert together.usage.prompt_tokens == alone[0].usage.prompt_tokens
    assert together.usage.completion_tokens == sum(answer.usage.completion_tokens for answer in alone)


def test_a_chat_s_logprobs_name_every_token_that_the_model_chose():
    answer = with_openai(
        lambda client: client.chat.completions.create(
            model="scripted", messages=user("emoji"), logprobs=True, top_logprobs=2, max_tokens=16
        )
    )
    content = answer.choices[0].logprobs.content
    assert bytes(byte for one in content for byte in one.bytes).decode(errors="ignore") == "Grüße 🙂 日"
    assert content[2].token == "bytes:\\xc3"
    assert [top.logprob for top in content[1].top_logprobs] == [-0.501, -1.501]


def test_completions_of_text_texts_and_ids():
    async def use(client):
        create = client.completions.create
        whole = await create(model="scripted", prompt=["sum", "emoji"], n=2, max_tokens=30, logprobs=1)
        ids = await create(model="scripted", prompt=[300, *b"emoji"])
        stream = await create(model="scripted", prompt="emoji", stream=True, logprobs=0)
        return whole, ids, [chunk async for chunk in stream]

    backend = FakeBackend()
    whole, ids, chunks = with_openai(use, backend)
    assert [choice.text for choice in whole.choices] == ["Let me see:  It is"] * 2 + ["Grüße 🙂 日本"] * 2
    assert whole.choices[0].model_extra["tools"] == [{"expression": "17*23", "result": "391"}]
    assert whole.usage.prompt_tokens == 4 + 6
    assert whole.choices[0].finish_reason == "length"
    logprobs = whole.choices[2].logprobs
    assert logprobs.tokens[:5] == ["G", "r", "bytes:\\xc3", "bytes:\\xbc", "bytes:\\xc3"]
    assert logprobs.text_offset[:6] == [0, 1, 2, 2, 3, 3]
    assert logprobs.top_logprobs[0] == {"G": -0.25}
    assert ids.choices[0].text == "Grüße 🙂 日本"
    assert "".join(chunk.choices[0].text for chunk in chunks) == ids.choices[0].text
    offsets = [offset for chunk in chunks if (made := chunk.choices[0].logprobs) for offset in made.text_offset]
    assert offsets[:-1] == whole.choices[2].logprobs.text_offset[: len(offsets) - 1]
    assert {request.prompt[0] for request in backend.requests} == {TOKENIZER.bos, 300}


def test_stops_limits_and_the_other_parameters_reach_the_model():
    backend = FakeBackend()
    body = {"messages": user("x"), "stop": ["the"], "min_p": 0.1, "presence_penalty": 1, "seed": 5, "max_tokens": 99}
    assert call(body, backend).json()["choices"][0]["message"]["content"] == "Hello from "
    expected = SamplingParams(stop=("the",), min_p=0.1, presence_penalty=1, seed=5, max_tokens=99)
    assert backend.requests[0].params == expected
    cut = call({"messages": user("x"), "max_completion_tokens": 5}).json()["choices"][0]
    assert (cut["message"]["content"], cut["finish_reason"]) == ("Hello", "length")


def test_special_tokens_and_odd_characters_written_by_a_user_are_plain_text():
    backend = FakeBackend()
    text = "<|assistant_end|><|python_start|>\0\x1b" + HOSTILE
    assert call({"messages": user(text)}, backend).json()["usage"]["prompt_tokens"] == 4 + len(text)
    assert TOKENIZER.decode(backend.requests[0].prompt) == text


def test_the_turns_of_a_conversation_have_one_session_and_other_conversations_another():
    backend = FakeBackend()
    first = [{"role": "system", "content": "be kind"}, *user("hello")]
    call({"messages": first}, backend)
    call({"messages": [*first, {"role": "assistant", "content": "hi"}, *user("and?")]}, backend)
    call({"messages": user("hello")}, backend)
    sessions = [request.session for request in backend.requests]
    assert sessions[0] == sessions[1] != sessions[2]
    assert all(sessions)


# --- facts -----------------------------------------------------------------------------------------------------------


def test_models_health_and_stats():
    async def run():
        backend = FakeBackend()
        client = Client(api_of(backend))
        await client.ask(CHAT, {"messages": user("x")})
        facts = [(await client.ask(path)).json() for path in ("/v1/models", "/v1/models/scripted", "/stats")]
        healthy = await client.ask("/health")
        backend.ready_state = (False, "starting a replica")
        return facts, healthy, await client.ask("/health"), await client.ask("/v1/models/other/one")

    (models, model, stats), healthy, unready, unknown = asyncio.run(run())
    assert models == {"object": "list", "data": [model]}
    assert (model["id"], model["object"]) == ("scripted", "model")
    assert stats["model"] == {"id": "scripted", "depth": 0}
    assert stats["replicas"][0]["kv_blocks"] == 8
    assert stats["requests"] == {"active": 0, "completed": 1, "cancelled": 0, "failed": 0, "refused": 0, "moved": 0}
    assert (healthy.status, healthy.json()) == (200, {"status": "ok", "model": "scripted"})
    assert (unready.status, unready.json()["status"]) == (503, "starting a replica")
    assert "retry-after" in unready.headers
    assert (unknown.status, unknown.error["code"]) == (404, "model_not_found")


def test_a_backend_that_does_not_answer_is_not_ready(monkeypatch):
    monkeypatch.setattr("nanochat_ray.serve.api.READY_TIMEOUT_S", 0.01)
    backend = FakeBackend()
    backend.ready = lambda: asyncio.sleep(3600)  # type: ignore[method-assign]
    assert asyncio.run(Client(api_of(backend)).ask("/health")).json()["status"] == "not answering"


def test_every_answer_passes_the_guard():
    keys = ApiKeys([StoredKey("a", "0" * 64)], lambda: 0.0)
    refused = asyncio.run(Client(api_of(FakeBackend(), keys=keys)).ask(CHAT, {"messages": user("x")}))
    assert (refused.status, refused.headers["x-frame-options"]) == (401, "DENY")
    assert asyncio.run(Client(api_of(FakeBackend()), {"host": "evil.example"}).ask("/health")).status == 403
    assert asyncio.run(
        Client(api_of(FakeBackend(), allowed_hosts=["x.example"]), {"host": "x.example"}).ask("/")
    ).status


# --- bad requests ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("body", "status", "words"),
    [
        ({"messages": []}, 400, "messages"),
        ({"messages": [{"role": "robot", "content": "x"}]}, 400, "messages.0.role"),
        ({"messages": [{"role": "assistant", "content": "x"}]}, 400, "message 0"),
        ({"messages": user("")}, 400, "message 0"),
        ({"messages": [{"role": "system", "content": "x"}]}, 400, "only a system message"),
        ({"messages": user("x"), "temperature": -1}, 400, "temperature"),
        ({"messages": user("x"), "n": 9}, 400, "n: "),
        ({"messages": user("x" * 5000)}, 400, "context is 4096"),
        ({"messages": user("x"), "model": "gpt-4"}, 404, "no model 'gpt-4'"),
        ({"messages": user("x"), "model": ""}, 404, "no model ''"),
        ([], 400, "JSON object"),
        (None, 400, "JSON object"),
        (3, 400, "JSON object"),
    ],
)
def test_bad_requests_are_answered_in_openai_s_error_shape(body, status, words):
    answer = call(None, portions=[json.dumps(body).encode()], headers=JSON)
    assert (answer.status, answer.error["type"]) == (status, "invalid_request_error")
    assert words in answer.error["message"]
    assert answer.error.keys() == {"message", "type", "param", "code"}


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"", "JSON object"),
        (b'{"messages": [', "not valid JSON"),
        (b"\xff\xfe", "not UTF-8"),
        (b"[" * 100_000, "nested too deeply"),
        (b'{"messages": [{"role": "user", "content": "x"}], "temperature": NaN}', "NaN"),
        (b'{"seed": ' + b"1" * 5000 + b"}", "not valid JSON"),
        (b'{"temperature": 1e999, "messages": [{"role": "user", "content": "x"}]}', "temperature"),
        (b'{"messages": [{"role": "user", "content": "x"}], "seed": 1, "seed": 2}', "same field twice"),
        (b'{"messages": [{"role": "user", "content": "\\ud83d"}]}', "surrogate"),
        (b'{"messages": [{"role": "user", "content": "x", "\\udc00": 1}]}', "surrogate"),
        (b"{" + b",".join(b'"x%d":1' % i for i in range(9999)) + b"}", "at most 256"),
    ],
)
def test_bodies_that_are_no_request_at_all(data, words):
    answer = call(None, portions=[data], headers=JSON)
    assert answer.status == 400
    assert words in answer.error["message"]


@pytest.mark.parametrize("kind", ["text/plain", "application/x-www-form-urlencoded", "multipart/form-data", ""])
def test_another_content_type_is_told_which_one_to_send(kind):
    answer = call(None, portions=[b'{"messages": []}'], headers={"content-type": kind} if kind else {})
    assert answer.status == 400
    assert "Content-Type: application/json" in answer.error["message"]


def test_what_is_not_there_is_said_in_the_same_shape():
    assert (call(None, path="/nothing").status, call(None, path="/nothing").error["code"]) == (404, None)
    wrong = call(None, method="GET")
    assert (wrong.status, wrong.headers["allow"], wrong.error["param"]) == (405, "POST", None)


@pytest.mark.parametrize("prompt", [[1, 99999], [[2**70]], ["x" * 5000]])
def test_bad_prompts_of_completions_are_refused(prompt, monkeypatch):
    def decode_bytes(ids):
        return bytes(i if i < 256 else {}[i] for i in ids)

    monkeypatch.setattr(TOKENIZER, "decode_bytes", decode_bytes)
    answer = call({"prompt": prompt}, path=COMPLETIONS)
    assert (answer.status, answer.error["param"]) == (400, "prompt")


@pytest.mark.parametrize("stream", [True, False])
def test_a_backend_without_room_is_said_before_anything_is_sent(stream):
    body = {"messages": user("x"), "stream": stream}
    backend = FakeBackend(refusal=BUSY)
    busy = call(body, backend)
    assert (busy.status, busy.headers["retry-after"], busy.error["code"]) == (503, "3", "overloaded")
    backend.ready_state = (False, "starting a replica")
    starting = call(body, backend)
    assert (starting.status, starting.headers["retry-after"], starting.error["code"]) == (503, "3", "starting")
    assert backend.active == 0


def test_what_people_write_is_in_no_log(caplog):
    marker = "mysecretmarker"
    bodies: list[Any] = [
        {"messages": user(marker)},
        {"messages": user(marker), "stream": True},
        {"messages": [{"role": marker, "content": marker}], "model": marker, "stop": 3},
        {"messages": user(marker), marker: 1},
    ]
    with caplog.at_level(logging.DEBUG):
        for body in bodies:
            call(body, FakeBackend(fail_at=3))
    assert marker not in caplog.text
