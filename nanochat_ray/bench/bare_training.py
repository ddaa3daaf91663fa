"""The bare training loop: a plan's steps in one process, with nothing imported that it does not need.

So its peak memory is that of training, and not of Ray and what comes with it.
"""

import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch

from nanochat_ray.device import FP8, gemm_peak, pick_device, pick_dtype
from nanochat_ray.model.execution import prepare_for_training
from nanochat_ray.model.optim import MuonAdamW, build_optimizer
from nanochat_ray.plan import Plan
from nanochat_ray.stream.cursor import Cursor, StreamIdentity
from nanochat_ray.stream.rows import MicroBatch, to_inputs_and_targets
from nanochat_ray.train.checkpoint import build_model
from nanochat_ray.train.step import World, run_step

WARMUP_STEPS = 3


@dataclass(frozen=True)
class BareRun:
    """What one process measured without Ray: per warm step its seconds, and beside them the machine's own speed."""

    process: int
    device: str
    dtype: str
    mode: str
    threads: int
    gemm_flops: list[float]
    forward_backward_s: list[float]  # of one micro-batch
    update_s: list[float]  # of a step
    step_s: list[float]  # of `micro_batches` forward and backward passes and the update


class _TimedOptimizer:
    """An optimizer, and how long each of its updates took."""

    def __init__(self, optimizer: MuonAdamW):
        self.seconds: list[float] = []
        self._optimizer = optimizer
        self.zero_grad = optimizer.zero_grad

    def has_finite_gradients(self) -> bool:
        self._began = time.perf_counter()
        return self._optimizer.has_finite_gradients()

    def step(self, **settings: Any) -> None:
        self._optimizer.step(**settings)
        self.seconds.append(time.perf_counter() - self._began)


def bare_loop(
    plan: Plan,
    batches: Sequence[MicroBatch],
    identity: StreamIdentity,
    dtype_name: str | None,
    kernels: str,
    compile: str,
) -> BareRun:
    """The plan's steps in this process, without Ray, on all its micro-batches.

    Before each: the speed of matrix multiplication, and one micro-batch forward and backward without an update.
    """
    device, _ = pick_device()
    dtype, _ = pick_dtype(device, dtype_name)
    if device.type == "cpu":
        torch.set_num_threads(os.cpu_count() or 1)
    model = build_model(plan)
    model.to(device).set_dtype(dtype)
    losses, mode = prepare_for_training(model, kernels, compile, plan.flops, dtype_name == FP8)
    optimizer = build_optimizer(model, plan.rates, dtype)

    def summed_loss(inputs_BT: torch.Tensor, targets_BT: torch.Tensor) -> torch.Tensor:
        return losses(inputs_BT, targets_BT, reduction="sum")

    def forward_backward(micro_batch: MicroBatch) -> None:
        inputs_BT, targets_BT = map(torch.from_numpy, to_inputs_and_targets(micro_batch.tokens_MT))
        summed_loss(inputs_BT.to(device), targets_BT.to(device)).backward()
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    stream, cursor, world = iter(batches), Cursor(identity), World(0, 1, device)
    timed = _TimedOptimizer(optimizer)
    gemms, passes, steps = [], [], []
    for _ in range(plan.steps):
        gemm_peak.cache_clear()
        gemms.append(gemm_peak(device, dtype))
        began = time.perf_counter()
        forward_backward(batches[0])
        passes.append(time.perf_counter() - began)
        optimizer.zero_grad(set_to_none=True)
        began = time.perf_counter()
        result = run_step(plan, summed_loss, cast(MuonAdamW, timed), cursor, 0, stream, world)
        steps.append(time.perf_counter() - began)
        cursor = cursor.advanced(result.last_row, plan.batch_tokens)
    warm = slice(WARMUP_STEPS, None)
    measured = (gemms[warm], passes[warm], timed.seconds[warm], steps[warm])
    return BareRun(os.getpid(), str(device), str(dtype), mode, torch.get_num_threads(), *measured)
