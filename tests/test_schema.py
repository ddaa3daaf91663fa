"""The request schemas refuse what they cannot honour, in words that help."""

import pytest
from pydantic import ValidationError

from nanochat_ray.serve.schema import ChatRequest, CompletionRequest, describe_invalid

HI = [{"role": "user", "content": "hi"}]


def problem(model=ChatRequest, **body) -> str:
    with pytest.raises(ValidationError) as caught:
        model.model_validate(body)
    return describe_invalid(caught.value.errors())[0]


def content(value) -> dict:
    return {"messages": [{"role": "user", "content": value}]}


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ({}, "messages: Field required"),
        ({"messages": []}, "messages: List should have at least 1 item"),
        ({"messages": HI * 501}, "messages: List should have at most 500 items"),
        ({"messages": [{"role": "robot", "content": "hi"}]}, "messages.0.role: Input should be 'system'"),
        ({"messages": [{"role": "user"}]}, "messages.0.content: Field required"),
        ({"messages": ["hi"]}, "messages.0"),
        (content(3), "messages.0.content"),
        (content(None), "messages.0.content"),
        (content("x" * 100_001), "messages.0.content: String should have at most 100000 characters"),
        (content([{"type": "image_url", "text": ""}]), "messages.0.content.0.type: Input should be 'text'"),
        (content([{"type": "text"}]), "messages.0.content.0.text: Field required"),
        ({"messages": [{"role": "assistant", "content": "x", "tool_calls": [{}]}]}, "tool_calls in a message"),
        ({"messages": HI, "temperature": float("nan")}, "temperature: Input should be a finite number"),
        ({"messages": HI, "temperature": "hot"}, "temperature: Input should be a valid number"),
        ({"messages": HI, "temperature": -1}, "temperature: Input should be greater than or equal to 0"),
        ({"messages": HI, "temperature": 10**400}, "temperature"),
        ({"messages": HI, "top_p": 0}, "top_p: Input should be greater than 0"),
        ({"messages": HI, "top_k": 0}, "top_k"),
        ({"messages": HI, "min_p": 1.1}, "min_p"),
        ({"messages": HI, "repetition_penalty": 0}, "repetition_penalty"),
        ({"messages": HI, "presence_penalty": 2.5}, "presence_penalty"),
        ({"messages": HI, "frequency_penalty": -2.5}, "frequency_penalty"),
        ({"messages": HI, "max_tokens": True}, "max_tokens: Input should be a valid integer"),
        ({"messages": HI, "max_tokens": 0}, "max_tokens"),
        ({"messages": HI, "max_tokens": 5, "max_completion_tokens": 9}, "max_tokens and max_completion_tokens differ"),
        ({"messages": HI, "seed": 1.5}, "seed: Input should be a valid integer"),
        ({"messages": HI, "seed": 1 << 63}, "seed"),
        ({"messages": HI, "stop": ""}, "stop: String should have at least 1 character"),
        ({"messages": HI, "stop": ["a", ""]}, "stop.1: String should have at least 1 character"),
        ({"messages": HI, "stop": ["a"] * 5}, "stop: List should have at most 4 items"),
        ({"messages": HI, "n": 0}, "n: "),
        ({"messages": HI, "n": 9}, "n: "),
        ({"messages": HI, "logprobs": 3}, "logprobs: Input should be a valid boolean"),
        ({"messages": HI, "top_logprobs": 3}, "top_logprobs has a meaning only with logprobs"),
        ({"messages": HI, "logprobs": True, "top_logprobs": 21}, "top_logprobs: "),
        ({"messages": HI, "stream_options": {"include_usage": True}}, "only with stream: true"),
        ({"messages": HI, "stream": True, "stream_options": {"x": 1}}, "stream_options.x: this field is not known"),
        ({"messages": HI, "tools": [{"type": "function"}]}, "tools is not supported"),
        ({"messages": HI, "logit_bias": {"1": 2}}, "logit_bias is not supported"),
        ({"messages": HI, "response_format": {"type": "json_object"}}, "response_format is not supported"),
        ({"messages": HI, "temprature": 1}, "temprature: this field is not known"),
        ({"messages": HI, "prompt": "x"}, "prompt: this field is not known"),
    ],
)
def test_a_bad_chat_is_described_by_field(body, words):
    assert words in problem(**body)


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ({}, "prompt: Field required"),
        ({"prompt": None}, "prompt"),
        ({"prompt": []}, "prompt: List should have at least 1 item"),
        ({"prompt": ["x"] * 9}, "prompt: List should have at most 8 items"),
        ({"prompt": [[]]}, "prompt"),
        ({"prompt": [-1]}, "prompt.0: Input should be greater than or equal to 0"),
        ({"prompt": ["x", 1]}, "prompt"),
        ({"prompt": "x", "echo": True}, "echo is not supported"),
        ({"prompt": "x", "echo": 0}, "echo is not supported"),
        ({"prompt": "x", "best_of": 2}, "best_of is not supported"),
        ({"prompt": "x", "suffix": "y"}, "suffix is not supported"),
        ({"prompt": "x", "logprobs": 6}, "logprobs: "),
        ({"prompt": "x", "logprobs": True}, "logprobs: Input should be a valid integer"),
        ({"prompt": "x", "messages": HI}, "messages: this field is not known"),
    ],
)
def test_a_bad_completion_is_described_by_field(body, words):
    assert words in problem(CompletionRequest, **body)


def test_a_description_never_repeats_what_the_user_wrote():
    secret = "my secret diary"
    assert secret not in problem(messages=[{"role": secret, "content": secret}], temperature=secret, stop=[secret, 3])


def test_fields_become_sampling_parameters():
    body = {"temperature": 0, "top_p": 0.5, "top_k": 3, "seed": -7, "stop": ["a", "b"], "max_completion_tokens": 9}
    more = {"min_p": 0.1, "repetition_penalty": 1.5, "presence_penalty": -1, "frequency_penalty": 0.5}
    params = ChatRequest.model_validate({"messages": HI, **body, **more}).sampling()
    assert (params.temperature, params.top_p, params.top_k, params.seed) == (0.0, 0.5, 3, -7)
    assert (params.min_p, params.repetition_penalty) == (0.1, 1.5)
    assert (params.presence_penalty, params.frequency_penalty) == (-1, 0.5)
    assert (params.stop, params.max_tokens, params.logprobs) == (("a", "b"), 9, None)
    assert ChatRequest.model_validate({"messages": HI, "stop": "end"}).sampling().stop == ("end",)


def test_both_kinds_of_logprobs_become_one_parameter():
    chat = {"messages": HI, "logprobs": True}
    assert ChatRequest.model_validate(chat).sampling().logprobs == 0
    assert ChatRequest.model_validate({**chat, "top_logprobs": 5}).sampling().logprobs == 5
    assert CompletionRequest.model_validate({"prompt": "x", "logprobs": 2}).sampling().logprobs == 2
    assert CompletionRequest.model_validate({"prompt": "x"}).sampling().logprobs is None


def test_without_a_seed_every_request_draws_its_own_unless_one_is_given():
    request = ChatRequest.model_validate({"messages": HI})
    assert len({request.sampling().seed for _ in range(5)}) == 5
    assert request.sampling(seed=5).seed == 5
    assert ChatRequest.model_validate({"messages": HI, "seed": 0}).sampling(seed=5).seed == 0


def test_fields_that_change_nothing_are_accepted():
    harmless = {"user": "u", "metadata": {"a": "b"}, "store": False, "service_tier": "auto", "tools": [], "n": None}
    neutral = {
        "logit_bias": {},
        "response_format": {"type": "text"},
        "tool_choice": "none",
        "parallel_tool_calls": True,
    }
    ChatRequest.model_validate({"messages": HI, "stream": None, **harmless, **neutral})
    CompletionRequest.model_validate({"prompt": "x", "user": "u", "echo": False, "best_of": 1, "suffix": None})


def test_an_earlier_tool_call_can_be_sent_back_in_its_place():
    parts = [
        {"type": kind, "text": value} for kind, value in [("text", "a"), ("python", "1+1"), ("python_output", "2")]
    ]
    request = ChatRequest.model_validate({"messages": [*HI, {"role": "assistant", "content": parts}, *HI]})
    assert request.conversation()[1] == {"role": "assistant", "content": parts}


def test_a_reply_can_be_sent_back_as_it_came_and_a_developer_speaks_for_the_system():
    reply = {"role": "assistant", "content": "a", "refusal": None, "tool_calls": None, "tools": [], "name": "x"}
    request = ChatRequest.model_validate({"messages": [{"role": "developer", "content": "be kind"}, *HI, reply, *HI]})
    assert [message["role"] for message in request.conversation()] == ["system", "user", "assistant", "user"]
    assert request.conversation()[2] == {"role": "assistant", "content": "a"}


@pytest.mark.parametrize(
    ("prompt", "one_by_one"),
    [("a", ["a"]), ("", [""]), (["a", "b"], ["a", "b"]), ([1, 2], [[1, 2]]), ([[1], [2, 3]], [[1], [2, 3]])],
)
def test_the_four_forms_of_a_prompt(prompt, one_by_one):
    assert CompletionRequest.model_validate({"prompt": prompt}).prompts() == one_by_one
