"""One optimizer step: forward and backward over this worker's micro-batches, agreement with the others, update.

Workers agree through one all-reduce of a table of integers in which each micro-batch's line is written by the worker
that ran it and zero elsewhere: row ids, digest, loss bits, target count. Below them each worker has a line of its own:
what it asks for, and how long it waited. So every worker sees the same losses in the same order, bit for bit, whatever
the world size; and rows of a unit that are missing, repeated or exchanged, or units out of order, are noticed at the
step where it happens.
"""

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.distributed as dist

from nanochat_ray.errors import UserError
from nanochat_ray.model.optim import MuonAdamW
from nanochat_ray.plan import Plan, lr_multiplier, muon_momentum, weight_decay
from nanochat_ray.stream.cursor import Cursor, RowId
from nanochat_ray.stream.order import micro_batches_of
from nanochat_ray.stream.rows import IGNORED_TARGET, MicroBatch, stream_hash, to_inputs_and_targets

# (inputs int64 [m, T], targets int64 [m, T]) → summed loss in nats, a scalar that can be differentiated
SummedLoss = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]

_FIRST, _LAST, _DIGEST, _LOSS_BITS, _TARGETS, _CROPPED, _PADDING, _COLUMNS = slice(0, 3), slice(3, 6), *range(6, 12)
_REQUEST, _INFINITE, _WAITED_US = 0, 1, 2  # of the lines of workers, which follow those of micro-batches
_NAMED_AT_MOST = 8


@dataclass(frozen=True)
class World:
    """The workers of this moment. With one worker nothing is communicated."""

    rank: int
    size: int
    device: torch.device

    def meet(self) -> None:
        """Return when all workers have come here."""
        self.sum(torch.zeros(1))

    def sum(self, table: torch.Tensor) -> torch.Tensor:
        """Sum a tensor over all workers."""
        if self.size == 1:
            return table
        on_device = table.to(self.device)
        dist.all_reduce(on_device)
        return on_device.to(table.device)


@dataclass(frozen=True)
class StepResult:
    """What one step did; equal on every worker."""

    step: int
    loss: float  # mean nats per target token of the global batch
    targets: int
    stream_hash: str
    cropped_tokens: int
    padding_tokens: int  # positions of the global batch that hold nothing
    last_row: RowId
    request: int  # the sum of what the workers passed as `request`
    data_wait_s: float  # of the worker that waited longest for its micro-batches, and so for that long of all


def run_step(
    plan: Plan,
    summed_loss: SummedLoss,
    optimizer: MuonAdamW,
    cursor: Cursor,
    first_step: int,
    micro_batches: Iterator[MicroBatch],
    world: World,
    request: int = 0,
) -> StepResult:
    """Train on the global batch of `cursor.step`.

    Args:
        first_step: the step at which the stream behind `micro_batches` began.
        micro_batches: this worker's, in order.
        request: a small number that every worker gets to see summed (worker 0 asks for a checkpoint this way).

    Raises:
        UserError: the loss or the gradient is not finite; the weights are as before the step.
        RuntimeError: a micro-batch does not follow the one before it (a bug in the data pipeline).
    """
    table = torch.zeros(plan.micro_batches + world.size, _COLUMNS, dtype=torch.int64)
    lines, own = table[: plan.micro_batches], table[plan.micro_batches + world.rank]
    waited = 0.0
    for index in micro_batches_of(cursor.step, plan.micro_batches, first_step, world.rank, world.size):
        began = time.perf_counter()
        micro_batch = next(micro_batches)
        waited += time.perf_counter() - began
        if not micro_batch.is_in_order():
            raise RuntimeError(f"rows out of order in micro-batch {index}: {micro_batch.row_ids_M3.tolist()}")
        line = lines[index - cursor.step * plan.micro_batches]
        line[_LOSS_BITS], line[_TARGETS] = _forward_backward(summed_loss, micro_batch, world.device)
        line[_FIRST] = torch.from_numpy(micro_batch.row_ids_M3[0])
        line[_LAST] = torch.from_numpy(micro_batch.row_ids_M3[-1])
        line[_DIGEST] = micro_batch.digest()
        line[_CROPPED], line[_PADDING] = int(micro_batch.cropped_M.sum()), int(micro_batch.padding_M.sum())

    own[_REQUEST], own[_INFINITE], own[_WAITED_US] = request, not optimizer.has_finite_gradients(), int(waited * 1e6)
    table = world.sum(table)
    lines, workers = table[: plan.micro_batches], table[plan.micro_batches :]
    last_row = _check_sequence(cursor, lines)
    losses, targets = lines[:, _LOSS_BITS].view(torch.float64), int(lines[:, _TARGETS].sum())
    loss_sum = math.fsum(losses.tolist())
    if not math.isfinite(loss_sum):
        bad = [i for i, value in enumerate(losses.tolist()) if not math.isfinite(value)]
        raise UserError(
            f"the loss of step {cursor.step} is not finite in {len(bad)} of {plan.micro_batches} micro-batches "
            f"({_rows_of(lines, bad)}); the weights were not updated. See its text with `python -m jobs.data "
            f"--show-step {cursor.step}` and the --run, --storage and --corpus of this run, or lower the rates"
        )
    if infinite := int(workers[:, _INFINITE].sum()):
        raise UserError(
            f"the loss of step {cursor.step} is finite, but its gradient is not on {infinite} of {world.size} "
            f"workers (rows {_row(lines[0, _FIRST])} to {_row(lines[-1, _LAST])} as epoch/unit position/row); "
            "the weights were not updated. Lower the rates, or train with --dtype fp32"
        )
    optimizer.step(
        lr_multiplier=lr_multiplier(plan, cursor.step),
        momentum=muon_momentum(plan, cursor.step),
        weight_decay=weight_decay(plan, cursor.step),
        grad_scale=1.0 / max(targets, 1),
    )
    optimizer.zero_grad(set_to_none=True)
    return StepResult(
        step=cursor.step,
        loss=loss_sum / max(targets, 1),
        targets=targets,
        stream_hash=stream_hash(lines[:, _DIGEST].tolist()),
        cropped_tokens=int(lines[:, _CROPPED].sum()),
        padding_tokens=int(lines[:, _PADDING].sum()),
        last_row=last_row,
        request=int(workers[:, _REQUEST].sum()),
        data_wait_s=int(workers[:, _WAITED_US].max()) / 1e6,
    )


def _forward_backward(
    summed_loss: SummedLoss, micro_batch: MicroBatch, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """Add a micro-batch's gradients to the weights'; the bits of its loss as fp64, and how many targets it has.

    A function of its own, so that one micro-batch's graph is gone before the next one's forward pass.
    """
    inputs_BT, targets_BT = map(torch.from_numpy, to_inputs_and_targets(micro_batch.tokens_MT))
    loss = summed_loss(inputs_BT.to(device), targets_BT.to(device))
    loss.backward()
    return loss.detach().double().cpu().view(torch.int64), (targets_BT != IGNORED_TARGET).sum()


def _rows_of(lines: torch.Tensor, micro_batches: list[int]) -> str:
    """The first and last rows of some micro-batches, for people; of many, which is a diverged model, only a few."""
    named = [
        f"{index}: rows {_row(lines[index, _FIRST])} to {_row(lines[index, _LAST])}"
        for index in micro_batches[:_NAMED_AT_MOST]
    ]
    more = ["…"] if len(micro_batches) > _NAMED_AT_MOST else []
    return ", ".join([*named, *more]) + " as epoch/unit position/row"


def _row(row_id: torch.Tensor) -> str:
    return "/".join(map(str, row_id.tolist()))


def _check_sequence(cursor: Cursor, lines: torch.Tensor) -> RowId:
    """The step's last row, having checked that its micro-batches follow the cursor and each other.

    A unit may fill no row, so that a later unit than the next one may follow.
    """
    expected = cursor.next_row
    for line in lines:
        first, last = RowId(*line[_FIRST].tolist()), RowId(*line[_LAST].tolist())
        next_unit = first.row == 0 and (first.epoch, first.position) > (expected.epoch, expected.position)
        if first != expected and not next_unit:
            raise RuntimeError(f"stream out of order at step {cursor.step}: expected {expected}, got {first}")
        expected = last.next()
    return last
