"""Positions in a stream: what is written is read back, and nothing else is taken for one."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nanochat_ray.serve.position import Position, Sent, digest

sents = st.builds(Sent, st.integers(0, 9_999_999), st.sampled_from(["", "t", "e"]))
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
    + [f"{'0' * 8}-{'1' * 8}-{count}" for count in ("12345678", "-1", "1te", "1 ", "1\n", "١", ".".join(["1"] * 65))],
)
def test_malformed_positions_are_none(text):
    assert Position.parse(text) is None
