"""One unit → its rows, and the sequence of rows, without Ray."""

from itertools import islice

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nanochat_ray.data.corpus import Unit, open_corpus
from nanochat_ray.errors import UserError
from nanochat_ray.storage import Folder
from nanochat_ray.stream.cursor import RowId
from nanochat_ray.stream.rows import (
    ChatRows,
    EpochFacts,
    MicroBatch,
    PretrainingRows,
    UnitRows,
    look_at_epoch,
    micro_batches,
    one_epoch,
    stream_hash,
    to_inputs_and_targets,
)
from nanochat_ray.tasks.mixture import Source, build_mixture, write_mixture
from nanochat_ray.tokenizer import train_tokenizer
from tests.small_corpus import words
from tests.stream_fakes import NumberedRows


def documents(count, seed=0):
    random = np.random.default_rng(seed)
    return [words(random, int(random.integers(3, 60))) for _ in range(count)]


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(documents(200), 300)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    folder = tmp_path_factory.mktemp("corpus")
    for shard in range(3):
        pq.write_table(pa.table({"text": documents(40, shard)}), folder / f"shard_{shard}.parquet", row_group_size=10)
    return open_corpus(str(folder), Folder.at(folder))


units = st.lists(st.integers(0, 9), min_size=1, max_size=6).filter(any)  # rows of each unit


def as_units(rows_per_unit):
    return tuple(Unit(str(number), rows, 1, 100) for number, rows in enumerate(rows_per_unit))


@given(units, st.integers(1, 5), st.integers(0, 99))
def test_micro_batches_are_consecutive_slices_of_the_concatenated_units(rows_per_unit, micro_batch_rows, seed):
    source = NumberedRows(4)
    batches = list(islice(micro_batches(source, as_units(rows_per_unit), micro_batch_rows, RowId(0, 0, 0), seed), 12))
    ids = np.concatenate([batch.row_ids_M3 for batch in batches])
    assert all(len(batch.tokens_MT) == micro_batch_rows for batch in batches)
    assert [tuple(row) for row in ids] == sorted({tuple(row) for row in ids})  # in order, no row twice
    per_epoch = sum(rows_per_unit)
    for epoch in range(ids[-1, 0]):  # every finished epoch held every row
        assert (ids[:, 0] == epoch).sum() == per_epoch


@given(units, st.integers(1, 5), st.integers(0, 99), st.integers(0, 30))
def test_the_sequence_goes_on_from_any_micro_batch(rows_per_unit, micro_batch_rows, seed, done):
    """Resuming behind any micro-batch gives what an undisturbed reading gives."""
    sequence = micro_batches(NumberedRows(4), as_units(rows_per_unit), micro_batch_rows, RowId(0, 0, 0), seed)
    before = list(islice(sequence, done))
    start = before[-1].last_row.next() if before else RowId(0, 0, 0)
    resumed = micro_batches(NumberedRows(4), as_units(rows_per_unit), micro_batch_rows, start, seed)
    assert [b.digest() for b in islice(sequence, 5)] == [b.digest() for b in islice(resumed, 5)]


@given(st.lists(st.integers(0, 9), min_size=1, max_size=5), st.integers(1, 4), st.integers(0, 3))
def test_one_epoch_holds_each_row_once_and_ends_with_what_is_left(rows_per_unit, micro_batch_rows, seed):
    source, units = NumberedRows(4), as_units(rows_per_unit)
    if not sum(rows_per_unit):
        with pytest.raises(UserError, match="fills not one row"):
            list(one_epoch(source, units, micro_batch_rows, seed))
        return
    batches = list(one_epoch(source, units, micro_batch_rows, seed))
    assert [len(batch.tokens_MT) for batch in batches[:-1]] == [micro_batch_rows] * (len(batches) - 1)
    assert 1 <= len(batches[-1].tokens_MT) <= micro_batch_rows
    ids = [tuple(row) for batch in batches for row in batch.row_ids_M3.tolist()]
    assert len(ids) == len(set(ids)) == sum(rows_per_unit)
    endless = micro_batches(source, units, micro_batch_rows, RowId(0, 0, 0), seed)
    for batch, other in zip(batches[:-1], endless, strict=False):
        assert batch.digest() == other.digest()


def test_a_corpus_without_a_single_row_is_an_error_and_not_an_endless_search():
    with pytest.raises(UserError, match="too small"):
        next(micro_batches(NumberedRows(4), as_units([0, 0, 0]), 2, RowId(0, 0, 0), 1))


@pytest.mark.parametrize(
    ("ids", "in_order"),
    [
        ([(0, 0, 5), (0, 0, 6), (0, 1, 0), (0, 3, 0), (1, 0, 0)], True),
        ([(0, 0, 5)], True),
        ([(0, 0, 5), (0, 0, 7)], False),
        ([(0, 0, 5), (0, 0, 5)], False),
        ([(0, 0, 5), (0, 1, 1)], False),
        ([(0, 1, 0), (0, 0, 0)], False),
        ([(1, 0, 0), (0, 5, 0)], False),
    ],
)
def test_rows_that_are_missing_repeated_or_exchanged_are_noticed(ids, in_order):
    count = len(ids)
    batch = MicroBatch(np.array(ids), np.zeros((count, 3), np.int32), *np.zeros((2, count), np.int32))
    assert batch.is_in_order() is in_order


def test_the_digest_depends_on_tokens_and_on_place():
    def batch(start):
        return next(micro_batches(NumberedRows(4), as_units([6, 6]), 2, start, 1))

    assert batch(RowId(0, 0, 0)).digest() == batch(RowId(0, 0, 0)).digest()
    assert len({batch(RowId(0, 0, row)).digest() for row in range(4)}) == 4
    assert stream_hash([1, 2]) != stream_hash([2, 1])


def test_pretraining_rows_start_with_bos_and_every_token_is_a_target(corpus, tokenizer):
    tokens_NT, cropped_N, padding_N = PretrainingRows(tokenizer, 32).rows(corpus.train[0])
    assert tokens_NT.dtype == np.int32
    assert tokens_NT.shape[1] == 33
    assert (tokens_NT[:, 0] == tokenizer.bos).all()
    assert (tokens_NT >= 0).all()
    assert len(cropped_N) == len(tokens_NT)
    assert padding_N.tolist() == [0] * len(tokens_NT)


def test_only_what_the_assistant_says_is_a_target(tmp_path, tokenizer):
    chats = [[{"role": "user", "content": f"fox {n}"}, {"role": "assistant", "content": f"dog {n}"}] for n in range(20)]
    mixture = build_mixture([Source("chats", chats, chats[:4])], seed=1)
    stored = write_mixture(mixture, Folder.at(tmp_path / "data"))
    tokens_NT, _, padding_N = ChatRows(tokenizer, 48).rows(stored.train[0])
    inputs_NT, targets_NT = to_inputs_and_targets(tokens_NT)
    said = tokenizer.decode([id for id in targets_NT.flatten().tolist() if id >= 0])
    assert sorted(said.split("<|assistant_end|>")[:-1]) == sorted(f"dog {n}" for n in range(20))
    assert "fox" in tokenizer.decode(inputs_NT.flatten().tolist())
    last = tokens_NT[np.arange(len(tokens_NT)), 48 - padding_N]
    assert last.tolist() == [tokenizer.special("assistant_end")] * len(tokens_NT)


def test_inputs_and_targets_are_shifted_by_one():
    inputs, targets = to_inputs_and_targets(np.array([[5, ~6, 7, ~8]], dtype=np.int32))
    assert inputs.tolist() == [[5, 6, 7]]
    assert targets.tolist() == [[-1, 7, -1]]


def test_rows_are_counted_exactly_for_few_units_and_estimated_for_many():
    assert look_at_epoch(NumberedRows(4), as_units([3, 0, 5])) == EpochFacts(rows=8, fill=1.0, cropped=0.0)
    many = as_units([4] * 1000)
    assert look_at_epoch(NumberedRows(4), many).rows == 4000


def test_an_epoch_tells_how_full_its_rows_are_and_what_they_had_no_room_for():
    class Rows:
        def rows(self, unit):
            cropped, padding = np.array([6, 0], np.int32), np.array([0, 2 * unit.row_group], np.int32)
            return UnitRows(np.zeros((2, 10), np.int32), cropped, padding)

    facts = look_at_epoch(Rows(), as_units([1, 2]))
    assert facts == EpochFacts(rows=4, fill=pytest.approx(34 / 40), cropped=pytest.approx(12 / 46))
