"""The construction that keeps Ray Data in order: block j is micro-batch j and goes to worker j mod W."""

import threading
from itertools import islice

import pytest

from nanochat_ray.data.corpus import Unit
from nanochat_ray.stream.cursor import RowId
from nanochat_ray.stream.ray_stream import micro_batch_dataset, read_micro_batches
from nanochat_ray.stream.rows import micro_batches
from tests.stream_fakes import NumberedRows

pytestmark = [pytest.mark.ray, pytest.mark.slow]

ROWS_PER_UNIT = (7, 0, 23, 40, 1, 16, 5, 31, 12, 9)
UNITS = tuple(Unit(str(number), rows, 1, 2000) for number, rows in enumerate(ROWS_PER_UNIT))
MICRO_BATCH_ROWS, COUNT, SEED = 8, 24, 7  # goes into the second epoch, whose order is a permutation


@pytest.mark.parametrize("workers", [1, 2, 3])
@pytest.mark.parametrize("start", [RowId(0, 0, 0), RowId(0, 3, 11), RowId(1, 2, 99)])
def test_workers_get_their_micro_batches_in_the_order_of_the_sequence(ray_cluster, workers, start):
    source = NumberedRows(16)
    sequence = micro_batches(source, UNITS, MICRO_BATCH_ROWS, start, SEED)
    expected = [batch.digest() for batch in islice(sequence, COUNT)]

    tokens = COUNT * MICRO_BATCH_ROWS * 16
    dataset = micro_batch_dataset(source, UNITS, MICRO_BATCH_ROWS, SEED, start, tokens, cpus_per_task=0.5)
    dataset.context.execution_options.preserve_order = True
    shards = dataset.streaming_split(workers, equal=True)
    got: dict[int, int] = {}

    def consume(rank: int) -> None:
        for turn, batch in enumerate(islice(read_micro_batches(shards[rank], MICRO_BATCH_ROWS), COUNT // workers)):
            got[turn * workers + rank] = batch.digest()

    threads = [threading.Thread(target=consume, args=(rank,)) for rank in range(workers)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [got[index] for index in range(COUNT)] == expected
