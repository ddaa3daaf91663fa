"""Documents → rows of T+1 tokens, best fit, without padding.

A row is filled with the longest document that still fits, again and again; when none fits, the shortest remaining
document is cropped to fill the rest, and what was cut off is lost (and counted). This is the packing of the public
nanochat, over a whole unit instead of a rolling buffer, and without its scan per pick: lengths that fit in a row are
bits of one integer, so the best fit is the highest bit below a limit and the shortest the lowest bit.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class PackedRows:
    """Rows of one unit.

    tokens_NT: int32 [rows, T+1].
    cropped_N: int32 [rows]; tokens cut off the document that fills the end of each row.
    leftover_tokens: tokens of the last, never filled row, which is dropped.
    """

    tokens_NT: np.ndarray
    cropped_N: np.ndarray
    leftover_tokens: int


def best_fit(lengths: Sequence[int], capacity: int) -> tuple[list[list[int]], list[int]]:
    """Which documents go into which row.

    Args:
        lengths: tokens of each document, at least 1.
        capacity: tokens of a row.

    Returns:
        One list of document indices per full row, in the order in which they are laid out (only the last of a row may
        be cropped), and the indices that were left for a row that could not be filled.

    O(n log n) for the documents longer than a row, and O(capacity / 64) machine words per pick for the others.
    """
    buckets: list[list[int]] = [[] for _ in range(capacity + 1)]
    too_long = []
    for index, length in enumerate(lengths):
        if length <= capacity:
            buckets[length].append(index)
        else:
            too_long.append(index)
    for bucket in buckets:
        bucket.reverse()  # pop() then takes equal lengths in document order
    too_long.sort(key=lambda index: (-lengths[index], -index))
    present = 0  # bit n is set while some document of length n remains
    for length, bucket in enumerate(buckets):
        if bucket:
            present |= 1 << length

    rows, row, space = [], [], capacity
    while present or too_long:
        fitting = present & ((2 << space) - 1)
        if fitting:
            length = fitting.bit_length() - 1
        elif present:
            length = (present & -present).bit_length() - 1
        else:
            length = capacity + 1
        if length > capacity:
            row.append(too_long.pop())
        else:
            row.append(buckets[length].pop())
            if not buckets[length]:
                present ^= 1 << length
        space -= length
        if space <= 0:
            rows.append(row)
            row, space = [], capacity
    return rows, row


def passages(ids: Sequence[int], bos: int, sequence_len: int) -> list[np.ndarray]:
    """A document's tokens as passages that each fit in a row, each behind a BOS of its own; int32 arrays.

    Packing alone would keep only the first row of a long document: at T = 256 that throws away three quarters of
    ordinary web or book text, at T = 2048 a tenth.
    """
    length = sequence_len  # of the text in a row of T+1 tokens, after its BOS
    pieces = [ids[begin : begin + length] for begin in range(0, max(len(ids), 1), length)]
    return [np.array([bos, *piece], dtype=np.int32) for piece in pieces]


def pack(documents: Sequence[np.ndarray], sequence_len: int) -> PackedRows:
    """Pack tokenized documents, each starting with BOS, into rows of `sequence_len + 1` tokens.

    Args:
        documents: int32 arrays; empty ones are ignored.
        sequence_len: T; a row holds T inputs and the T targets shifted by one.
    """
    capacity = sequence_len + 1
    documents = [document for document in documents if len(document)]
    lengths = [len(document) for document in documents]
    rows, leftover = best_fit(lengths, capacity)
    tokens_NT = np.empty((len(rows), capacity), dtype=np.int32)
    cropped_N = np.zeros(len(rows), dtype=np.int32)
    for n, row in enumerate(rows):
        tokens_NT[n] = np.concatenate([documents[index] for index in row])[:capacity]
        cropped_N[n] = sum(lengths[index] for index in row) - capacity
    return PackedRows(tokens_NT, cropped_N, leftover_tokens=sum(lengths[index] for index in leftover))
