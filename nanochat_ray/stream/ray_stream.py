"""RAY SHELL: the row sequence of `stream.rows` through Ray Data, one block per micro-batch, in order.

Units are read, tokenized and packed by tasks anywhere in the cluster, ahead of the trainers, with Ray Data's
back-pressure. Three things together keep the order (tests/test_ray_stream.py leans on all of them):
- one input block per unit and `batch_size=1`: larger batches are coalesced and lose the unit's boundary;
- `repartition(strict=True)` to exactly one micro-batch per block, carrying remainders from unit to unit;
- `preserve_order`, and Ray Train's equal split, which deals block j to worker j mod W.
"""

from collections.abc import Iterator, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
import ray
from ray.data import Dataset, ExecutionOptions
from ray.train import DataConfig

from nanochat_ray.data.corpus import Unit
from nanochat_ray.stream.cursor import RowId
from nanochat_ray.stream.rows import MicroBatch, RowSource, Visit, visit_rows, visits_from

# Text is planned for as if packing lost half and a token were 8 bytes long, plus some so that a short run does not end
# in the stream's last rows; far more than any real corpus needs. Running out is not an error: the stream is then
# planned anew. More would cost: Ray Data reads ahead as far as its memory goes, on cores that could train.
BYTES_PER_TOKEN_MARGIN = 16
SPARE_BYTES = 2**21


def micro_batch_dataset(
    source: RowSource,
    units: Sequence[Unit],
    micro_batch_rows: int,
    seed: int,
    start: RowId,
    tokens: int,
    cpus_per_task: float,
) -> Dataset:
    """A Ray dataset whose j-th block is the j-th micro-batch from `start` on; long enough for `tokens` tokens."""
    source_ref = ray.put(source)  # once for all tasks: it carries the tokenizer

    def read_tokenize_pack(item: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        visit = Visit(*(int(item[name][0]) for name in Visit._fields))
        unit = Unit(str(item["shard"][0]), *(int(item[name][0]) for name in ("row_group", "documents", "bytes")))
        return visit_rows(ray.get(source_ref), unit, visit, seed)

    items = [{**visit._asdict(), **asdict(units[visit.unit])} for visit in _enough_visits(units, start, seed, tokens)]
    return (
        ray.data.from_items(items, override_num_blocks=len(items))
        .map_batches(read_tokenize_pack, batch_size=1, num_cpus=cpus_per_task)
        .repartition(target_num_rows_per_block=micro_batch_rows, strict=True)
    )


def _enough_visits(units: Sequence[Unit], start: RowId, seed: int, tokens: int) -> list[Visit]:
    visits, wanted_bytes = [], tokens * BYTES_PER_TOKEN_MARGIN + SPARE_BYTES
    for visit in visits_from(len(units), start, seed):
        visits.append(visit)
        wanted_bytes -= units[visit.unit].bytes
        if wanted_bytes <= 0:
            break
    return visits


def ordered_data_config() -> DataConfig:
    """How Ray Train must split the dataset so that block j goes to worker j mod W."""
    options = ExecutionOptions(preserve_order=True)
    return DataConfig(execution_options=options, enable_shard_locality=False)


def read_micro_batches(shard: Any, micro_batch_rows: int, prefetch: int = 2) -> Iterator[MicroBatch]:
    """This worker's micro-batches, in order, from `ray.train.get_dataset_shard(...)` or any `DataIterator`."""
    for columns in shard.iter_batches(
        batch_size=micro_batch_rows, batch_format="numpy", prefetch_batches=prefetch, drop_last=True
    ):
        yield MicroBatch(columns["row_id"], columns["tokens"], columns["cropped"])
