"""Row sources without text, for tests of the stream; importable on Ray's workers."""

from dataclasses import dataclass

import numpy as np

from nanochat_ray.data.corpus import Unit


@dataclass(frozen=True)
class NumberedRows:
    """A unit called "7" with row_group=3 has three rows of tokens made from 7 and the row's number."""

    sequence_len: int
    vocab_size: int = 100

    def rows(self, unit: Unit) -> tuple[np.ndarray, np.ndarray]:
        random = np.random.default_rng(int(unit.shard))
        tokens = random.integers(0, self.vocab_size, (unit.row_group, self.sequence_len + 1), dtype=np.int32)
        return tokens, np.zeros(unit.row_group, dtype=np.int32)
