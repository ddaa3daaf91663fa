"""Packing against a plain scan over a rolling buffer of documents, which is how the public nanochat packs."""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

import numpy as np

from nanochat_ray.stream.packing import pack

BUFFER_DOCUMENTS = 1000


@dataclass(frozen=True)
class PackingFigures:
    """Tokens per second, and the fraction of all tokens that was cropped away, of each way to pack."""

    tokens: int
    tokens_per_s: float
    crop_waste: float
    scan_tokens_per_s: float
    scan_crop_waste: float

    @property
    def speedup(self) -> float:
        return self.tokens_per_s / self.scan_tokens_per_s


def measure_packing(units: Sequence[Sequence[np.ndarray]], sequence_len: int, repeats: int = 3) -> PackingFigures:
    """Pack the same tokenized documents both ways, in turn, and take medians.

    Args:
        units: documents of each unit, int32 arrays that start with BOS.
    """
    documents = [document for unit in units for document in unit]
    tokens = sum(map(len, documents))
    ours, scans = [], []
    for _ in range(repeats):
        began = time.perf_counter()
        packed = [pack(unit, sequence_len) for unit in units]
        ours.append(time.perf_counter() - began)
        began = time.perf_counter()
        scan_rows = scan_pack(documents, sequence_len)
        scans.append(time.perf_counter() - began)
    kept = sum(unit.tokens_NT.size + unit.leftover_tokens for unit in packed)
    return PackingFigures(
        tokens=tokens,
        tokens_per_s=tokens / median(ours),
        crop_waste=1 - kept / tokens,
        scan_tokens_per_s=tokens / median(scans),
        scan_crop_waste=1 - len(scan_rows) * (sequence_len + 1) / tokens,
    )


def scan_pack(documents: Sequence[np.ndarray], sequence_len: int) -> list[np.ndarray]:
    """Rows of T+1 tokens from a buffer that is scanned for the best fit at every pick and refilled after it.

    The rolling buffer ends with the documents; its last, unfilled row is dropped.
    """
    capacity = sequence_len + 1
    stream = iter(documents)
    buffer: list[np.ndarray] = []
    rows: list[np.ndarray] = []
    row, used = np.empty(capacity, dtype=np.int32), 0
    while True:
        while len(buffer) < BUFFER_DOCUMENTS and (document := next(stream, None)) is not None:
            buffer.append(document)
        if not buffer:
            return rows
        space = capacity - used
        best, best_length = -1, 0
        for index, document in enumerate(buffer):
            if best_length < len(document) <= space:
                best, best_length = index, len(document)
        if best < 0:
            best = min(range(len(buffer)), key=lambda index: len(buffer[index]))
        document = buffer.pop(best)[:space]
        row[used : used + len(document)] = document
        used += len(document)
        if used == capacity:
            rows.append(row)
            row, used = np.empty(capacity, dtype=np.int32), 0
