"""Text without meaning: a corpus of a few shards that is made in a moment."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

WORDS = "the quick brown fox jumps over the lazy dog and then it sleeps for a long while under an old oak tree".split()


def words(random: np.random.Generator, count: int) -> str:
    return " ".join(random.choice(WORDS, size=count))


def write_corpus(folder: Path, documents: int = 90, lengths: tuple[int, int] = (5, 200), per_unit: int = 30) -> None:
    """Three shards of `documents` each, of at least lengths[0] and fewer than lengths[1] words; always the same."""
    folder.mkdir()
    for shard in range(3):
        random = np.random.default_rng(shard)
        texts = [words(random, int(random.integers(*lengths))) for _ in range(documents)]
        pq.write_table(pa.table({"text": texts}), folder / f"shard_{shard}.parquet", row_group_size=per_unit)
