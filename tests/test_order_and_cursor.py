"""The order of the stream and its cursor, as arithmetic."""

import dataclasses
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nanochat_ray.errors import UserError
from nanochat_ray.stream.cursor import Cursor, RowId, StreamIdentity
from nanochat_ray.stream.order import epoch_order, micro_batches_of, row_order

IDENTITY = StreamIdentity("corpus", "tokenizer", 256, 16, 4, 42)
row_ids = st.builds(RowId, st.integers(0, 5), st.integers(0, 1000), st.integers(0, 5000))


@given(st.integers(1, 200), st.integers(0, 2**31 - 1))
def test_every_epoch_visits_every_unit_once(units, seed):
    assert epoch_order(units, 0, seed).tolist() == list(range(units))
    for epoch in (1, 2):
        assert sorted(epoch_order(units, epoch, seed).tolist()) == list(range(units))
        assert epoch_order(units, epoch, seed).tolist() == epoch_order(units, epoch, seed).tolist()


def test_later_epochs_and_other_seeds_differ():
    orders = [tuple(epoch_order(50, epoch, seed)) for epoch in (1, 2) for seed in (1, 2)]
    assert len(set(orders)) == 4


@given(st.integers(0, 300), st.integers(0, 3), st.integers(0, 99), st.integers(0, 2**31 - 1))
def test_row_order_is_a_permutation(rows, epoch, unit, seed):
    assert sorted(row_order(rows, epoch, unit, seed).tolist()) == list(range(rows))


@given(st.integers(1, 16), st.integers(0, 20), st.integers(1, 12), st.integers(1, 9))
def test_the_workers_of_any_world_share_out_each_step_exactly(micro_batches, first_step, steps, world_size):
    """Worker r gets, over all steps, the micro-batches r, r + W, r + 2W … of the stream that began at first_step."""
    dealt = [[] for _ in range(world_size)]
    for step in range(first_step, first_step + steps):
        shares = [micro_batches_of(step, micro_batches, first_step, rank, world_size) for rank in range(world_size)]
        assert sorted(i for share in shares for i in share) == list(
            range(step * micro_batches, (step + 1) * micro_batches)
        )
        for rank, share in enumerate(shares):
            dealt[rank] += share
    begin = first_step * micro_batches
    for rank in range(world_size):
        assert dealt[rank] == list(range(begin + rank, begin + steps * micro_batches, world_size))


@given(row_ids, st.integers(0, 10**6), st.integers(0, 10**12))
def test_a_cursor_survives_json(next_row, step, tokens):
    cursor = Cursor(IDENTITY, step, tokens, next_row)
    assert Cursor.from_dict(json.loads(json.dumps(cursor.to_dict()))) == cursor


def test_a_step_moves_the_cursor_behind_its_last_row():
    cursor = Cursor(IDENTITY, 3, 300, RowId(0, 2, 5)).advanced(RowId(0, 4, 9), 100)
    assert (cursor.step, cursor.tokens, cursor.next_row) == (4, 400, RowId(0, 4, 10))


@pytest.mark.parametrize("field", [field.name for field in dataclasses.fields(StreamIdentity)])
def test_another_stream_is_refused_with_the_difference(field):
    other = dataclasses.replace(IDENTITY, **{field: "other" if field in ("corpus", "tokenizer") else 7})
    with pytest.raises(UserError, match=f"{field} was .*, now"):
        Cursor(IDENTITY, 8).require_identity(other)


def test_the_same_stream_is_accepted():
    Cursor(IDENTITY, 8).require_identity(dataclasses.replace(IDENTITY))
