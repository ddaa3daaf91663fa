"""The request schema refuses what it cannot honour, in words that help; the response shapes are OpenAI's."""

import json

import pytest
from openai.types.chat import ChatCompletion, ChatCompletionChunk
from pydantic import ValidationError

from nanochat_ray.engine.reply import Piece, ToolCall
from nanochat_ray.errors import UserError
from nanochat_ray.serve import schema
from nanochat_ray.serve.schema import ChatRequest, ChunkMaker, describe_invalid, merge

HI = [{"role": "user", "content": "hi"}]


def problem(**body) -> str:
    with pytest.raises(ValidationError) as caught:
        ChatRequest.model_validate(body)
    return describe_invalid(caught.value.errors())[0]


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ({}, "messages: Field required"),
        ({"messages": []}, "messages: List should have at least 1 item"),
        ({"messages": HI * 501}, "messages: List should have at most 500 items"),
        ({"messages": [{"role": "robot", "content": "hi"}]}, "messages.0.role"),
        ({"messages": [{"role": "user"}]}, "messages.0.content"),
        ({"messages": [{"role": "user", "content": 3}]}, "messages.0.content"),
        ({"messages": [{"role": "user", "content": "x" * 100_001}]}, "100001 characters"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url", "text": ""}]}]}, "messages.0.content"),
        ({"messages": HI, "temperature": float("nan")}, "temperature: Input should be a finite number"),
        ({"messages": HI, "temperature": "hot"}, "temperature: Input should be a valid number"),
        ({"messages": HI, "max_tokens": True}, "max_tokens: Input should be a valid integer"),
        ({"messages": HI, "seed": 1.5}, "seed: Input should be a valid integer"),
        ({"messages": HI, "n": 2}, "n is not supported"),
        ({"messages": HI, "logprobs": True}, "logprobs is not supported"),
        ({"messages": HI, "tools": [{"type": "function"}]}, "tools is not supported"),
    ],
)
def test_a_bad_body_is_described_by_field(body, words):
    assert words in problem(**body)


def test_a_description_never_repeats_what_the_user_wrote():
    secret = "my secret diary"
    assert secret not in problem(messages=[{"role": secret, "content": secret}], temperature=secret, stop=[secret, 3])


@pytest.mark.parametrize("bad", [{"temperature": -1.0}, {"top_p": 0.0}, {"top_k": 0}, {"max_tokens": 0}, {"stop": ""}])
def test_a_value_out_of_range_is_refused_by_name(bad):
    with pytest.raises(UserError, match=next(iter(bad))):
        ChatRequest.model_validate({"messages": HI, **bad}).sampling()


def test_fields_become_sampling_parameters():
    body = {"temperature": 0, "top_p": 0.5, "top_k": 3, "seed": -7, "stop": ["a", "b"], "max_completion_tokens": 9}
    params = ChatRequest.model_validate({"messages": HI, "max_tokens": 5, "user": "ignored", **body}).sampling()
    assert (params.temperature, params.top_p, params.top_k, params.seed) == (0.0, 0.5, 3, -7)
    assert (params.stop, params.max_tokens) == (("a", "b"), 9)
    assert ChatRequest.model_validate({"messages": HI, "stop": "end"}).sampling().stop == ("end",)


def test_without_a_seed_every_request_draws_its_own():
    request = ChatRequest.model_validate({"messages": HI})
    assert len({request.sampling().seed for _ in range(5)}) == 5


def test_an_earlier_tool_call_can_be_sent_back_in_its_place():
    parts = [
        {"type": kind, "text": value} for kind, value in [("text", "a"), ("python", "1+1"), ("python_output", "2")]
    ]
    request = ChatRequest.model_validate({"messages": [*HI, {"role": "assistant", "content": parts}, *HI]})
    assert request.conversation()[1] == {"role": "assistant", "content": parts}


def test_chunks_and_responses_are_what_the_openai_package_reads():
    chunks = ChunkMaker("chatcmpl-1", 1, "m")
    made = [chunks.first(), chunks.text("hi"), chunks.tool(ToolCall("1+1", "2")), chunks.last("tool_limit")]
    parsed = [ChatCompletionChunk.model_validate(json.loads(json.dumps(chunk))) for chunk in made]
    assert parsed[1].choices[0].delta.content == "hi"
    assert parsed[2].choices[0].delta.model_extra == {"tool": {"expression": "1+1", "result": "2"}}
    assert parsed[3].choices[0].finish_reason == "length"
    assert ChatCompletionChunk.model_validate(chunks.usage(schema.Usage.of(3, 4))).usage.total_tokens == 7
    choice = schema.Choice(message=schema.ReplyMessage(content="hi"), finish_reason="stop")
    whole = schema.ChatResponse(id="x", created=1, model="m", choices=[choice], usage=schema.Usage.of(1, 2))
    assert ChatCompletion.model_validate(whole.model_dump()).choices[0].message.content == "hi"


def test_merging_joins_text_and_keeps_tool_calls_in_their_place():
    call = ToolCall("1+1", "2")
    pieces = [Piece((1,), "a"), Piece((2,), "b"), Piece((3,), tool=call), Piece((4,), "c"), Piece((5,), finish="stop")]
    assert merge(pieces) == [
        Piece((1, 2), "ab"),
        Piece((3,), tool=call),
        Piece((4, 5), "c", finish="stop"),
    ]
