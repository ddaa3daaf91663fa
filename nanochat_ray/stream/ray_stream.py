"""RAY SHELL: the row sequence of `stream.rows` through Ray Data, one block per micro-batch, in order.

Units are read, tokenized and packed by tasks anywhere in the cluster, ahead of the trainers, with Ray Data's
back-pressure. Three things together keep the order (tests/test_ray_stream.py leans on all of them):
- one task per unit, which learns from its number which one: larger batches are coalesced and lose the boundary;
- `repartition(strict=True)` to exactly one micro-batch per block, carrying remainders from unit to unit;
- `preserve_order`, and Ray Train's equal split, which deals block j to worker j mod W.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import ray
from ray.data import DataContext, Dataset, ExecutionOptions

# Private, for `_equal_blocks` and the number of a task; the version is pinned and tests hold them.
from ray.data._internal.execution.interfaces.task_context import TaskContext
from ray.data._internal.logical.interfaces import LogicalPlan
from ray.data._internal.logical.operators.from_operators import FromItems
from ray.data._internal.stats import DatasetStats
from ray.data.block import BlockMetadataWithSchema
from ray.data.dataset import MaterializedDataset
from ray.train import DataConfig

from nanochat_ray.data.corpus import Unit
from nanochat_ray.stream.cursor import RowId
from nanochat_ray.stream.rows import MicroBatch, RowSource, Visit, visit_rows, visits_from

# Text is planned for as if packing lost half and a token were 8 bytes long, plus some so that a short run does not end
# in the stream's last rows; far more than any real corpus needs. Running out is not an error: the stream is then
# planned anew. More would cost: Ray Data reads ahead as far as its memory goes, on cores that could train.
BYTES_PER_TOKEN_MARGIN = 16
SPARE_BYTES = 2**21


def load() -> None:
    """For `cluster.preloading`: a process that has this module is ready to read, tokenize, pack and hand out."""


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
    visits = _enough_visits(units, start, seed, tokens)
    plan = ray.put((source, tuple(units), np.array(visits)))  # once for all tasks: the source carries the tokenizer

    def read_tokenize_pack(_: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        source, units, visits = ray.get(plan)
        context = TaskContext.get_current()
        assert context is not None, "Ray Data numbers its tasks"
        visit = Visit(*visits[context.task_idx].tolist())
        return visit_rows(source, units[visit.unit], visit, seed)

    return (
        _equal_blocks(len(visits))
        .map_batches(read_tokenize_pack, batch_size=1, num_cpus=cpus_per_task)
        .repartition(target_num_rows_per_block=micro_batch_rows, strict=True)
    )


def _equal_blocks(number: int) -> Dataset:
    """A dataset of so many blocks that are one and the same object, for tasks that only need their number.

    `ray.data.from_items` stores an object for each, which takes 8 ms: minutes for the units of a long run, at every
    restart. So this makes the same dataset by the same private classes.
    """
    block = pa.table({"item": [0]})
    reference: Any = ray.put(block)
    facts = BlockMetadataWithSchema.from_block(block)
    context = DataContext.get_current().copy()
    plan = LogicalPlan(FromItems([reference] * number, [facts] * number), context)
    return MaterializedDataset(plan, context, DatasetStats(metadata={"FromItems": [facts]}, parent=None))


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
        yield MicroBatch.from_columns(columns)
