"""Conversations as tokens: structure only from structure, training only on what the assistant says."""

import json
from itertools import chain

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nanochat_ray.chat import check_conversation, render, render_prompt
from nanochat_ray.errors import UserError
from nanochat_ray.tokenizer import SPECIAL_TOKENS, Tokenizer, train_tokenizer
from nanochat_ray.tokenizer_samples import SAMPLES

USER = {"role": "user", "content": "What is 12*7?"}
ANSWER = {"role": "assistant", "content": "84"}
TOOL_ANSWER = {
    "role": "assistant",
    "content": [
        {"type": "text", "text": "It is "},
        {"type": "python", "text": "12*7"},
        {"type": "python_output", "text": "84"},
        {"type": "text", "text": "84."},
    ],
}


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_tokenizer(SAMPLES.values(), 500)


def _spelled(tokenizer: Tokenizer, ids: list[int], mask: list[int], wanted: int) -> str:
    return tokenizer.decode([token for token, trained in zip(ids, mask, strict=True) if trained == wanted])


def test_a_tool_conversation_is_laid_out_and_masked_as_specified(tokenizer):
    ids, mask = render(tokenizer, [USER, TOOL_ANSWER, {"role": "user", "content": "Thanks"}, ANSWER])
    assert tokenizer.decode(ids) == (
        "<|bos|><|user_start|>What is 12*7?<|user_end|><|assistant_start|>It is "
        "<|python_start|>12*7<|python_end|><|output_start|>84<|output_end|>84.<|assistant_end|>"
        "<|user_start|>Thanks<|user_end|><|assistant_start|>84<|assistant_end|>"
    )
    assert _spelled(tokenizer, ids, mask, 1) == (
        "It is <|python_start|>12*7<|python_end|>84.<|assistant_end|>84<|assistant_end|>"
    )
    assert _spelled(tokenizer, ids, mask, 0) == (
        "<|bos|><|user_start|>What is 12*7?<|user_end|><|assistant_start|><|output_start|>84<|output_end|>"
        "<|user_start|>Thanks<|user_end|><|assistant_start|>"
    )


def test_a_system_message_is_merged_in_front_of_the_first_user_message(tokenizer):
    system = {"role": "system", "content": "Be brief."}
    merged = {"role": "user", "content": "Be brief.\n\nWhat is 12*7?"}
    assert render(tokenizer, [system, USER, ANSWER, USER, ANSWER]) == render(tokenizer, [merged, ANSWER, USER, ANSWER])
    assert render_prompt(tokenizer, [system, USER]) == render_prompt(tokenizer, [merged])


def test_text_parts_of_a_user_are_one_text(tokenizer):
    parts = [{"type": "text", "text": "What is "}, {"type": "text", "text": "12*7?"}]
    assert render_prompt(tokenizer, [{"role": "user", "content": parts}]) == render_prompt(tokenizer, [USER])


def test_a_prompt_is_what_training_saw_before_the_answer(tokenizer):
    ids, mask = render(tokenizer, [USER, TOOL_ANSWER])
    prompt = render_prompt(tokenizer, [USER])
    assert ids[: len(prompt)] == prompt
    assert mask[: len(prompt)] == [0] * len(prompt)
    assert mask[len(prompt)] == 1


def test_rendering_leaves_the_messages_as_they_were(tokenizer):
    messages = [{"role": "system", "content": "s"}, dict(USER), dict(ANSWER)]
    render(tokenizer, messages)
    assert messages == [{"role": "system", "content": "s"}, USER, ANSWER]


hostile = st.lists(
    st.one_of(st.sampled_from([f"<|{name}|>" for name in SPECIAL_TOKENS]), st.text(max_size=8)), min_size=1
).map("".join)
text = hostile.filter(bool)
assistant_part = st.one_of(
    text.map(lambda said: [{"type": "text", "text": said}]),
    st.tuples(text, hostile).map(
        lambda call: [{"type": "python", "text": call[0]}, {"type": "python_output", "text": call[1]}]
    ),
)
assistant_content = st.one_of(
    text, st.lists(assistant_part, min_size=1, max_size=3).map(lambda parts: list(chain(*parts)))
)


@st.composite
def conversations(draw):
    messages = [{"role": "system", "content": draw(text)}] if draw(st.booleans()) else []
    for _ in range(draw(st.integers(1, 3))):
        messages.append({"role": "user", "content": draw(text)})
        messages.append({"role": "assistant", "content": draw(assistant_content)})
    return messages


@given(messages=conversations())
def test_all_special_tokens_are_structural_and_all_text_comes_back(tokenizer, messages):
    ids, mask = render(tokenizer, messages)
    assert len(mask) == len(ids)
    assert set(mask) <= {0, 1}
    expected = _expected_runs(messages)
    assert _runs(tokenizer, ids, mask) == expected
    prompt = render_prompt(tokenizer, messages[:-1])
    assert prompt == ids[: len(prompt)]
    assert prompt[-1] == tokenizer.special("assistant_start")


def _runs(tokenizer: Tokenizer, ids: list[int], mask: list[int]) -> list[tuple[str, int]]:
    """(special token's name or the text between two of them, mask), empty texts left out."""
    names = {tokenizer.special(name): f"<{name}>" for name in SPECIAL_TOKENS}
    runs: list[tuple[str, int]] = []
    pending: list[int] = []
    for position, token in enumerate([*ids, tokenizer.bos]):
        if token not in names:
            pending.append(position)
            continue
        if pending:
            assert len({mask[i] for i in pending}) == 1
            runs.append((tokenizer.decode([ids[i] for i in pending]), mask[pending[0]]))
            pending = []
        if position < len(ids):
            runs.append((names[token], mask[position]))
    return runs


def _expected_runs(messages) -> list[tuple[str, int]]:
    """Slow and obvious: the format, spelled out, with neighbouring assistant texts joined."""
    runs: list[tuple[str, int]] = [("<bos>", 0)]
    prefix = ""
    for message in messages:
        content = message["content"]
        if message["role"] == "system":
            prefix = content + "\n\n"
        elif message["role"] == "user":
            runs += [("<user_start>", 0), (prefix + content, 0), ("<user_end>", 0)]
            prefix = ""
        else:
            runs.append(("<assistant_start>", 0))
            said = ""
            for part in [{"type": "text", "text": content}] if isinstance(content, str) else content:
                if part["type"] == "text":
                    said += part["text"]
                    continue
                runs += [(said, 1)] if said else []
                said = ""
                name, trained = ("python", 1) if part["type"] == "python" else ("output", 0)
                inside = [(part["text"], trained)] if part["text"] else []
                runs += [(f"<{name}_start>", trained), *inside, (f"<{name}_end>", trained)]
            runs += [(said, 1)] if said else []
            runs.append(("<assistant_end>", 1))
    return runs


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ([], "the conversation is empty"),
        ("hello", "a list of messages, not str"),
        ([USER, "hi"], "message 1 is str"),
        ([{"content": "x"}], "message 0 has no role; expected one of user, assistant, system"),
        ([{"role": "tool", "content": "x"}], "message 0 has role 'tool'"),
        ([{"role": ["user"], "content": "x"}], "message 0 has role"),
        ([ANSWER], 'message 0 has role "assistant"; expected "user"'),
        ([USER, USER], 'message 1 has role "user"; expected "assistant"'),
        ([USER, ANSWER, ANSWER], 'message 2 has role "assistant"; expected "user"'),
        ([USER, {"role": "system", "content": "x"}], 'message 1 has role "system"; only message 0 may'),
        ([{"role": "system", "content": "x"}], "only a system message"),
        ([{"role": "system", "content": "x"}, ANSWER], 'message 1 has role "assistant"; expected "user"'),
        ([USER, {"role": "assistant"}], r"message 1 \(assistant\) has no content"),
        ([{"role": "user", "content": None}], r"message 0 \(user\) has content of type NoneType"),
        ([{"role": "user", "content": ""}], r"message 0 \(user\) is empty"),
        ([{"role": "user", "content": []}], r"message 0 \(user\) is empty"),
        ([USER, {"role": "assistant", "content": [{"type": "image", "text": "x"}]}], "message 1 .*part 0: expected"),
        ([USER, {"role": "assistant", "content": [{"type": "text"}]}], "message 1 .*part 0: expected"),
        ([USER, {"role": "assistant", "content": ["x"]}], "message 1 .*part 0: expected .*found 'x'"),
        ([USER, {"role": "assistant", "content": [{"type": ["text"], "text": "x"}]}], "message 1 .*part 0: expected"),
        ([{"role": "user", "content": [{"type": "python", "text": "1"}]}], "message 0 .*part 0: expected"),
        ([USER, {"role": "assistant", "content": [{"type": "python", "text": ""}]}], "the tool call is empty"),
        (
            [USER, {"role": "assistant", "content": [{"type": "python_output", "text": "1"}]}],
            "part 0: a python_output must follow its python part",
        ),
    ],
)
def test_a_wrong_conversation_is_refused_naming_the_message(tokenizer, messages, message):
    for refuse in (
        check_conversation,
        lambda wrong: render(tokenizer, wrong),
        lambda wrong: render_prompt(tokenizer, wrong),
    ):
        with pytest.raises(UserError, match=message):
            refuse(messages)


def test_a_conversation_may_end_with_either_role(tokenizer):
    check_conversation([USER])
    check_conversation([USER, ANSWER])
    with pytest.raises(UserError, match="no assistant message"):
        render(tokenizer, [USER])
    with pytest.raises(UserError, match='message 1 has role "assistant"; expected a last message with role "user"'):
        render_prompt(tokenizer, [USER, ANSWER])


def test_lone_surrogates_from_json_do_not_stop_a_conversation(tokenizer):
    assert "\ufffd" in tokenizer.decode(render_prompt(tokenizer, [{"role": "user", "content": "\ud83d"}]))


def test_real_chats_are_accepted(tokenizer, shared_data):
    lines = [line for path in sorted(shared_data.glob("sft/*.jsonl")) for line in path.open()][:300]
    assert lines
    for line in lines:
        ids, mask = render(tokenizer, json.loads(line)["messages"])
        assert 0 < sum(mask) < len(ids)
