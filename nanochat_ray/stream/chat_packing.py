"""Rendered chats → padded rows of T+1 tokens: best fit, nothing cropped, nothing split over two rows.

Pure: the rows are a function of the chats alone.
"""

from bisect import bisect_left, insort
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

Rendered = tuple[list[int], list[int]]  # token ids; mask, 1 where the token is a trained target


@dataclass(frozen=True)
class PackedChats:
    """Rows ready for training, and what packing them cost.

    tokens_NT: int32 [rows, T+1].
    mask_NT: uint8 [rows, T+1], 1 where that token is a trained target, 0 on padding.
    cropped_N: int32 [rows]; tokens cut off the end of a chat that is longer than a row, and so has it to itself.
    chats: row by row the indices of the chats in it, from left to right.
    padding_N: int32 [rows]; positions at the row's end that hold no chat.
    """

    tokens_NT: np.ndarray
    mask_NT: np.ndarray
    cropped_N: np.ndarray
    chats: tuple[tuple[int, ...], ...]
    padding_N: np.ndarray

    @property
    def fill(self) -> float:
        """Fraction of the token positions that hold a chat; 1 when there are no rows."""
        return 1 - int(self.padding_N.sum()) / self.tokens_NT.size if self.tokens_NT.size else 1.0


def pack_chats(rendered: Sequence[Rendered], sequence_len: int, pad_id: int) -> PackedChats:
    """Pack chats into rows of sequence_len + 1 tokens, longest first, each into the fullest row that still holds it.

    Best-fit decreasing: no two rows could be merged into one. A chat longer than a row is cut at the row's end; that
    is counted in cropped_N, and the caller should say so. Rows are in the order of their longest chats' places in the
    input, so a shuffled input gives rows in no order of length. O(n log n): the free spaces that there are, at most
    T+1 distinct ones, are kept sorted and found by bisection.
    """
    width = sequence_len + 1
    lengths = [min(len(ids), width) for ids, _ in rendered]
    rows = _best_fit(lengths, width)
    tokens_NT = np.full((len(rows), width), pad_id, dtype=np.int32)
    mask_NT = np.zeros((len(rows), width), dtype=np.uint8)
    cropped_N = np.zeros(len(rows), dtype=np.int32)
    padding_N = np.zeros(len(rows), dtype=np.int32)
    for row, chats in enumerate(rows):
        start = 0
        for chat in chats:
            ids, mask = rendered[chat]
            end = start + lengths[chat]
            tokens_NT[row, start:end] = ids[: lengths[chat]]
            mask_NT[row, start:end] = mask[: lengths[chat]]
            cropped_N[row] += len(ids) - lengths[chat]
            start = end
        padding_N[row] = width - start
    return PackedChats(
        tokens_NT=tokens_NT,
        mask_NT=mask_NT,
        cropped_N=cropped_N,
        chats=tuple(tuple(chats) for chats in rows),
        padding_N=padding_N,
    )


def _best_fit(lengths: list[int], width: int) -> list[list[int]]:
    """Indices of the items of each row. Zero-length items are left out."""
    rows: list[list[int]] = []
    spaces: list[int] = []  # the distinct free spaces there are, ascending; never more than `width` of them
    rows_with: dict[int, list[int]] = {}  # free space → its rows
    for item in sorted(range(len(lengths)), key=lambda index: -lengths[index]):
        if lengths[item] == 0:
            continue
        place = bisect_left(spaces, lengths[item])
        if place == len(spaces):
            row, space = len(rows), width
            rows.append([])
        else:
            space = spaces[place]
            row = rows_with[space].pop()
            if not rows_with[space]:
                del spaces[place], rows_with[space]
        rows[row].append(item)
        left = space - lengths[item]
        if left not in rows_with:
            rows_with[left] = []
            insort(spaces, left)
        rows_with[left].append(row)
    return sorted(rows, key=lambda items: items[0])
