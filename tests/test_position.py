"""Positions in a stream: what is written is read back, and nothing else is taken for one."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nanochat_ray.serve.position import Position, Sent, digest

sents = st.builds(Sent, st.integers(0, 9_999_999), st.sampled_from(["", "t", "e"]), st.integers(0, 2**32 - 1))
positions = st.builds(
    Position, st.just(digest("model")), st.text(max_size=9).map(digest), st.lists(sents, min_size=1).map(tuple)
)


@given(positions.filter(lambda position: len(position.choices) <= 64))
def test_a_position_is_read_back(position):
    assert Position.parse(str(position)) == position


@given(st.text(max_size=40))
def test_any_other_text_is_none(text):
    parsed = Position.parse(text)
    assert parsed is None or str(parsed) == text


@pytest.mark.parametrize(
    "text",
    ["", "0" * 8, f"{'0' * 8}-{'1' * 8}-", f"{'0' * 8}-{'1' * 8}-x", f"{'0' * 8}-{'1' * 8}-1..2", "é" * 30]
    + [f"{'0' * 8}-{'1' * 8}-{count}:01234567" for count in ("12345678", "-1", "1te", "1 ", "١", "1:01234567")]
    + [f"{'0' * 8}-{'1' * 8}-{rest}" for rest in ("1", "1:0123456G", "1:01234567\n", ".".join(["1:01234567"] * 65))],
)
def test_malformed_positions_are_none(text):
    assert Position.parse(text) is None


@given(st.lists(st.integers(0, 2**31 - 1)), st.data())
def test_the_checksum_does_not_depend_on_how_the_tokens_came(tokens, data):
    cut = data.draw(st.integers(0, len(tokens)))
    assert Sent().after(tokens[:cut], "t").after(tokens[cut:], "e") == Sent().after(tokens, "e")


def test_other_tokens_have_another_checksum():
    assert Sent().after([1, 2, 3], "") != Sent().after([1, 3, 2], "")
