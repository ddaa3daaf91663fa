"""Row sources without text, for tests of the stream; importable on Ray's workers."""

import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from nanochat_ray.data.corpus import Unit
from nanochat_ray.stream.rows import RowSource, UnitRows


@dataclass(frozen=True)
class NumberedRows:
    """A unit called "7" with row_group=3 has three rows of tokens made from 7 and the row's number."""

    sequence_len: int
    vocab_size: int = 100

    def rows(self, unit: Unit) -> UnitRows:
        random = np.random.default_rng(int(unit.shard))
        tokens = random.integers(0, self.vocab_size, (unit.row_group, self.sequence_len + 1), dtype=np.int32)
        return UnitRows(tokens, *np.zeros((2, unit.row_group), dtype=np.int32))


@dataclass(frozen=True)
class HangingRows:
    """The rows of another source, but whoever asks for one of the units waits until a file or folder appears."""

    source: RowSource
    unit: Unit
    until: Path

    def rows(self, unit: Unit) -> UnitRows:
        while unit == self.unit and not self.until.exists():
            time.sleep(0.1)
        return self.source.rows(unit)
