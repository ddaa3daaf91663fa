"""Packing is checked against the plain scan it replaces, which is slow and obvious."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from nanochat_ray.stream.packing import best_fit, pack


def scanning_best_fit(lengths, capacity):
    """The rule, word by word: a scan over all remaining documents per pick."""
    remaining = list(range(len(lengths)))
    rows, row, space = [], [], capacity
    while remaining:
        fitting = [i for i in remaining if lengths[i] <= space]
        pick = (
            max(fitting, key=lambda i: (lengths[i], -i)) if fitting else min(remaining, key=lambda i: (lengths[i], i))
        )
        remaining.remove(pick)
        row.append(pick)
        space -= lengths[pick]
        if space <= 0:
            rows.append(row)
            row, space = [], capacity
    return rows, row


lengths_and_capacity = st.tuples(st.lists(st.integers(1, 80), max_size=60), st.integers(2, 40))


@given(lengths_and_capacity)
def test_best_fit_makes_the_picks_of_a_plain_scan(case):
    lengths, capacity = case
    rows, leftover = best_fit(lengths, capacity)
    expected_rows, expected_leftover = scanning_best_fit(lengths, capacity)
    assert (rows, leftover) == (expected_rows, expected_leftover)


@given(lengths_and_capacity)
def test_every_document_is_used_once_and_every_row_is_full(case):
    lengths, capacity = case
    rows, leftover = best_fit(lengths, capacity)
    assert sorted([i for row in rows for i in row] + leftover) == list(range(len(lengths)))
    assert all(sum(lengths[i] for i in row) >= capacity for row in rows)
    assert all(sum(lengths[i] for i in row[:-1]) < capacity for row in rows)  # only the last of a row is cropped


@given(st.lists(st.integers(1, 50), max_size=40), st.integers(4, 30))
def test_tokens_are_conserved_and_rows_begin_with_bos(lengths, sequence_len):
    bos = 7
    documents = [np.array([bos, *range(100, 100 + n)], dtype=np.int32) for n in lengths]
    packed = pack(documents, sequence_len)
    assert packed.tokens_NT.shape[1] == sequence_len + 1
    assert (packed.tokens_NT[:, 0] == bos).all()
    assert packed.tokens_NT.size + packed.cropped_N.sum() + packed.leftover_tokens == sum(map(len, documents))
    assert (packed.cropped_N >= 0).all()


def test_ties_go_to_the_earlier_document():
    assert best_fit([3, 3, 3, 3], 6) == ([[0, 1], [2, 3]], [])


def test_a_document_longer_than_a_row_is_cropped_shortest_first():
    rows, leftover = best_fit([50, 30, 40], 10)
    assert rows == [[1], [2], [0]]
    assert leftover == []
