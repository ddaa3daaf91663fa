"""Chats become padded rows: each whole, each once, in an order that depends on the chats alone."""

import time

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nanochat_ray.stream.chat_packing import pack_chats

T = 32
PAD = 7


def chats_of_lengths(lengths):
    """Chat i is tokens 100·i+8, 100·i+9, …, so that a token says where it came from; the last half is trained on."""
    return [
        (list(range(100 * i + 8, 100 * i + 8 + n)), [0] * (n // 2) + [1] * (n - n // 2)) for i, n in enumerate(lengths)
    ]


def next_fit_rows(lengths, width):
    rows, space = 0, 0
    for length in lengths:
        if length > space:
            rows, space = rows + 1, width
        space -= length
    return rows


fitting = st.lists(st.integers(1, T + 1), max_size=60)


@given(fitting)
def test_every_chat_appears_once_and_whole_with_its_mask(lengths):
    chats = chats_of_lengths(lengths)
    packed = pack_chats(chats, T, PAD)
    seen = []
    for tokens, mask, members in zip(packed.tokens_NT, packed.mask_NT, packed.chats, strict=True):
        start = 0
        for chat in members:
            ids, chat_mask = chats[chat]
            assert tokens[start : start + len(ids)].tolist() == ids
            assert mask[start : start + len(ids)].tolist() == chat_mask
            start += len(ids)
            seen.append(chat)
        assert (tokens[start:] == PAD).all()
        assert not mask[start:].any()
    assert sorted(seen) == list(range(len(lengths)))
    assert not packed.cropped_N.any()


@given(fitting)
def test_rows_have_width_t_plus_1_and_the_padding_is_counted(lengths):
    packed = pack_chats(chats_of_lengths(lengths), T, PAD)
    assert packed.tokens_NT.shape == packed.mask_NT.shape == (len(packed.chats), T + 1)
    assert packed.tokens_NT.dtype == np.int32
    assert packed.mask_NT.dtype == np.uint8
    assert packed.padding_N.tolist() == [T + 1 - sum(lengths[chat] for chat in row) for row in packed.chats]
    assert 0 <= packed.fill <= 1


@given(fitting)
def test_no_two_rows_could_be_one(lengths):
    packed = pack_chats(chats_of_lengths(lengths), T, PAD)
    used = sorted(sum(lengths[chat] for chat in row) for row in packed.chats)
    assert len(used) < 2 or used[0] + used[1] > T + 1


@given(fitting)
def test_packing_again_gives_the_same_rows(lengths):
    first, second = (pack_chats(chats_of_lengths(lengths), T, PAD) for _ in range(2))
    assert first.chats == second.chats
    assert (first.tokens_NT == second.tokens_NT).all()


@given(st.integers(0, 2**32 - 1))
def test_it_needs_no_more_rows_than_next_fit_on_chat_like_lengths(seed):
    lengths = np.clip(np.random.default_rng(seed).lognormal(2.3, 0.7, size=300).astype(int), 1, T + 1).tolist()
    packed = pack_chats(chats_of_lengths(lengths), T, PAD)
    assert len(packed.chats) <= next_fit_rows(lengths, T + 1)
    assert packed.fill > 0.95


def test_a_chat_longer_than_a_row_keeps_its_start_and_the_loss_is_counted():
    packed = pack_chats(chats_of_lengths([5, T + 11, 3]), T, PAD)
    long_row = packed.chats.index((1,))
    assert packed.tokens_NT[long_row].tolist() == list(range(108, 108 + T + 1))
    assert packed.cropped_N.tolist() == [10 if row == long_row else 0 for row in range(2)]


def test_rows_are_not_in_order_of_length():
    lengths = [10, T + 1, 12, 30, 11, 31]
    packed = pack_chats(chats_of_lengths(lengths), T, PAD)
    assert [row[0] for row in packed.chats] == sorted(row[0] for row in packed.chats)


@pytest.mark.parametrize("lengths", [[], [0, 0]])
def test_nothing_to_pack_gives_no_rows(lengths):
    packed = pack_chats(chats_of_lengths(lengths), T, PAD)
    assert packed.tokens_NT.shape == (0, T + 1)
    assert packed.fill == 1.0


def test_packing_time_grows_no_faster_than_the_number_of_chats():
    def seconds(count):
        lengths = np.random.default_rng(0).integers(1, 17, size=count).tolist()
        chats = [([1] * n, [1] * n) for n in lengths]
        started = time.process_time()
        pack_chats(chats, 2048, PAD)
        return time.process_time() - started

    assert seconds(40_000) < 10 * max(seconds(10_000), 0.01)  # a scan per pick would take 16 times as long
