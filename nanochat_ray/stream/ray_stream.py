"""RAY SHELL: the row sequence of `stream.rows` through Ray Data, one block per micro-batch, in order.

Units are read, tokenized and packed by tasks anywhere in the cluster, ahead of the trainers, with Ray Data's
back-pressure. Three things together keep the order (tests/test_ray_stream.py leans on all of them):
- one input block per unit and `batch_size=1`: larger batches are coalesced and lose the unit's boundary;
- `repartition(strict=True)` to exactly one micro-batch per block, carrying remainders from unit to unit;
- `preserve_order`, and Ray Train's equal split, which deals block j to worker j mod W.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import ray
from ray import cloudpickle
from ray.data import Dataset, ExecutionOptions
from ray.train import DataConfig

from nanochat_ray.data.corpus import Unit
from nanochat_ray.stream.cursor import RowId
from nanochat_ray.stream.rows import MicroBatch, RowSource, unit_columns, visits_from

# A unit visit is planned for every this many bytes of text still needed, as if packing lost half and a token were
# 8 bytes long; far more than any real corpus needs. Running out is not an error: the stream is then planned anew.
BYTES_PER_TOKEN_MARGIN = 16
MIN_VISITS = 16


@dataclass(frozen=True)
class StreamPlan:
    """All that the stream depends on besides where it starts. Plain data, sent to the controller and to tasks."""

    source: RowSource
    units: tuple[Unit, ...]
    micro_batch_rows: int
    seed: int

    def visits(self, start: RowId, tokens: int) -> list[tuple[int, int, int]]:
        """Unit visits from `start` on that surely hold `tokens` tokens."""
        wanted_bytes, visits = tokens * BYTES_PER_TOKEN_MARGIN, []
        for visit in visits_from(len(self.units), start):
            visits.append(visit)
            wanted_bytes -= self.units[visit[1]].bytes
            if wanted_bytes <= 0 and len(visits) >= MIN_VISITS:
                return visits
        raise AssertionError("visits_from never ends")


def micro_batch_dataset(plan: StreamPlan, start: RowId, tokens: int, cpus_per_task: float) -> Dataset:
    """A Ray dataset whose j-th block is the j-th micro-batch from `start` on; long enough for `tokens` tokens."""
    plan_ref = ray.put(cloudpickle.dumps(plan))
    items = [{"visit": np.array(visit)} for visit in plan.visits(start, tokens)]

    def read_tokenize_pack(batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        plan = _cached_plan(ray.get(plan_ref), plan_ref.hex())
        epoch, position, skip = map(int, batch["visit"][0])
        return unit_columns(plan.source, plan.units, epoch, position, skip, plan.seed)

    return (
        ray.data.from_items(items, override_num_blocks=len(items))
        .map_batches(read_tokenize_pack, batch_size=1, num_cpus=cpus_per_task)
        .repartition(target_num_rows_per_block=plan.micro_batch_rows, strict=True)
    )


_PLANS: dict[str, StreamPlan] = {}


def _cached_plan(pickled: bytes, key: str) -> StreamPlan:
    """The plan, unpickled once per worker process: a tokenizer takes longer to build than a unit to read."""
    if key not in _PLANS:
        _PLANS.clear()
        _PLANS[key] = cloudpickle.loads(pickled)
    return _PLANS[key]


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
