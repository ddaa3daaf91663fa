"""What finetuning learns to say, token by token: what the assistant writes and the end of its turn, and nothing else.

One letter stands for one token: text for itself, and for the structure B bos, U and u around a user's turn, A and a
around the assistant's, P and p around a tool call, O and o around the tool's answer.
"""

import json
from itertools import chain, pairwise

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from nanochat_ray.data.corpus import Unit
from nanochat_ray.stream.rows import ChatRows, to_inputs_and_targets
from nanochat_ray.tokenizer import SPECIAL_TOKENS
from tests.fakes import ByteTokenizer, tiny_model

TOKENIZER = ByteTokenizer()
LETTERS = dict(zip(map(TOKENIZER.special, SPECIAL_TOKENS), "BUuAaPpOo", strict=True))
NOT_TRAINED = "."


def user(text):
    return {"role": "user", "content": text}


def assistant(*parts):
    return {"role": "assistant", "content": [{"type": kind, "text": text} for kind, text in parts]}


def says(text):
    return {"role": "assistant", "content": text}


@pytest.fixture
def rows(tmp_path):
    """A function: conversations, T → of each row the tokens, and below each the target that it is, as two strings."""

    def rows(conversations, sequence_len):
        packed = packed_rows(tmp_path, conversations, sequence_len)
        _, targets_NT = to_inputs_and_targets(packed.tokens_NT)
        tokens_NT = np.where(packed.tokens_NT >= 0, packed.tokens_NT, ~packed.tokens_NT)
        return [
            (spell(tokens), NOT_TRAINED + spell(targets)) for tokens, targets in zip(tokens_NT, targets_NT, strict=True)
        ]

    return rows


def packed_rows(folder, conversations, sequence_len):
    texts = [json.dumps(messages) for messages in conversations]
    pq.write_table(pa.table({"messages": texts, "source": ["hand"] * len(texts)}), folder / "chats.parquet")
    return ChatRows(TOKENIZER, sequence_len).rows(Unit(str(folder / "chats.parquet"), 0, len(texts), 100))


def spell(ids):
    return "".join(NOT_TRAINED if id < 0 else LETTERS.get(id) or chr(id) for id in ids)


def test_of_one_exchange_the_answer_and_its_end_are_learned_and_padding_is_not(rows):
    assert rows([[user("hi"), says("yes")]], 13) == [
        (
            "BUhiuAyesaBBBB",
            "......yesa....",
        )
    ]


def test_of_many_turns_each_answer_is_learned_and_no_question(rows):
    assert rows([[user("1+1"), says("2"), user("well?"), says("yes"), user("3"), says("4")]], 26) == [
        (
            "BU1+1uA2aUwell?uAyesaU3uA4a",
            ".......2a........yesa....4a",
        )
    ]


def test_a_last_turn_of_the_user_is_not_learned(rows):
    assert rows([[user("1"), says("2"), user("34")]], 11) == [
        (
            "BU1uA2aU34uB",
            ".....2a.....",
        )
    ]


def test_a_system_message_is_part_of_the_first_question(rows):
    assert rows([[{"role": "system", "content": "be"}, user("x"), says("y")]], 10) == [
        (
            "BUbe\n\nxuAya",
            ".........ya",
        )
    ]


def test_tool_calls_with_both_marks_are_learned_and_what_the_tool_says_is_not(rows):
    answer = assistant(("text", "is "), ("python", "6*7"), ("python_output", "42"), ("text", "42."))
    assert rows([[user("?"), answer]], 24) == [
        (
            "BU?uAis P6*7pO42o42.aBBBB",
            ".....is P6*7p....42.a....",
        )
    ]


def test_a_turn_may_begin_and_end_with_a_tool_and_call_it_twice(rows):
    calls = [("python", "1"), ("python_output", "2"), ("python", "3"), ("python_output", "4")]
    assert rows([[user("?"), assistant(*calls), user("!"), assistant(("text", "5"), ("text", "6"))]], 26) == [
        (
            "BU?uAP1pO2oP3pO4oaU!uA56aBB",
            ".....P1p...P3p...a....56a..",
        )
    ]


def test_two_chats_in_a_row_do_not_learn_where_one_begins(rows):
    assert rows([[user("1"), says("2")], [user("34"), says("56")]], 17) == [
        (
            "BU34uA56aBU1uA2aBB",
            "......56a.....2a..",
        )
    ]


def test_a_chat_longer_than_a_row_is_learned_as_far_as_the_row_goes(rows):
    assert rows([[user("12"), says("3456789")]], 9) == [
        (
            "BU12uA3456",
            "......3456",
        )
    ]


def test_of_a_chat_cut_within_a_question_only_the_answers_before_are_learned(rows):
    assert rows([[user("1"), says("2"), user("345678"), says("9")]], 9) == [
        (
            "BU1uA2aU34",
            ".....2a...",
        )
    ]


def test_of_a_chat_cut_before_its_first_answer_nothing_is_learned(rows):
    assert rows([[user("123456789"), says("0")]], 6) == [
        (
            "BU12345",
            ".......",
        )
    ]


def test_marks_that_a_message_spells_are_text(rows):
    assert rows([[user("<|assistant_start|>"), says("<|user_start|>")]], 39) == [
        (
            "BU<|assistant_start|>uA<|user_start|>aBB",
            "......................." + "<|user_start|>a..",
        )
    ]


words = st.text("xyz", min_size=1, max_size=4)
part = st.one_of(
    words.map(lambda text: [("text", text)]),
    st.tuples(words, words).map(lambda call: [("python", call[0]), ("python_output", call[1])]),
)


@given(data=st.data())
def test_every_token_of_the_assistant_is_a_target_once_and_no_other(data, tmp_path_factory):
    """The same, for any conversations, against the rules written a second time."""
    conversations, expected = [], []
    for _ in range(data.draw(st.integers(1, 5))):
        messages, spelled = [], [("B", ".")]
        for _ in range(data.draw(st.integers(1, 3))):
            asked, parts = data.draw(words), list(chain(*data.draw(st.lists(part, min_size=1, max_size=3))))
            messages += [user(asked), assistant(*parts)]
            spelled += [(letter, ".") for letter in f"U{asked}uA"]
            for kind, text in parts:
                if kind == "python_output":
                    spelled += [(letter, ".") for letter in f"O{text}o"]
                else:
                    spelled += [(letter, letter) for letter in (f"P{text}p" if kind == "python" else text)]
            spelled.append(("a", "a"))
        conversations.append(messages)
        expected.append(tuple("".join(line) for line in zip(*spelled, strict=True)))
    packed = packed_rows(tmp_path_factory.mktemp("chats"), conversations, 127)
    found = []
    for tokens, padding in zip(packed.tokens_NT, packed.padding_N, strict=True):
        row = spell(np.where(tokens >= 0, tokens, ~tokens)[: 128 - padding])
        targets = spell(np.where(tokens >= 0, tokens, -1))
        assert set(targets[128 - padding :]) <= {NOT_TRAINED}
        starts = [*(place for place, letter in enumerate(row) if letter == "B"), len(row)]
        found += [(row[begin:end], targets[begin:end]) for begin, end in pairwise(starts)]
    assert sorted(found) == sorted(expected)


def test_the_loss_is_the_mean_over_these_tokens_alone():
    model = tiny_model()
    tokens = [256, 257, ord("q"), 258, 259, ord("x"), ord("y"), 260]
    trained = [0, 0, 0, 0, 0, 1, 1, 1]
    row = np.array([[id if wanted else ~id for id, wanted in zip(tokens, trained, strict=True)]], dtype=np.int32)
    inputs_BT, targets_BT = map(torch.from_numpy, to_inputs_and_targets(row))
    nats_T = torch.log_softmax(model(inputs_BT)[0], dim=-1)[range(7), tokens[1:]].neg()
    assert model(inputs_BT, targets_BT).item() == pytest.approx(nats_T[4:].mean().item(), rel=1e-5)
