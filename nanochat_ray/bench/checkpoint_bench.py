"""What a checkpoint costs the loop: the step that triggers one beside its neighbours, by the code training runs."""

import os
import time
from collections.abc import Iterator
from statistics import median
from typing import Any

import numpy as np
import torch

from nanochat_ray.bench.measurement import Line, Watch, in_fresh_process
from nanochat_ray.device import pick_device, pick_dtype
from nanochat_ray.model.optim import build_optimizer
from nanochat_ray.plan import Plan
from nanochat_ray.storage import Folder
from nanochat_ray.stream.cursor import Cursor, StreamIdentity
from nanochat_ray.stream.rows import MicroBatch
from nanochat_ray.train.checkpoint import Checkpoints, TrainState, build_model
from nanochat_ray.train.saver import Saver
from nanochat_ray.train.step import World, run_step

GOAL = 0.05
WARMUP_STEPS = 4
STEPS_BETWEEN = 8  # saves, so that one is committed before the next
KEEP = 2


def measure_checkpoints(plan: Plan, dtype: str | None, storage: Folder) -> dict[str, Any]:
    """Train the plan's steps on noise and save after every STEPS_BETWEEN of them.

    Args:
        storage: where the checkpoints go, and are deleted from.
    """
    with Watch() as watch:
        figures = in_fresh_process(_train_and_save, plan, dtype, storage)
    return {**figures, "machine": watch.to_dict()}


def _train_and_save(plan: Plan, dtype_name: str | None, storage: Folder) -> dict[str, Any]:
    device, _ = pick_device()
    dtype, _ = pick_dtype(device, dtype_name)
    if device.type == "cpu":
        torch.set_num_threads(os.cpu_count() or 1)
    model = build_model(plan).to(device).set_dtype(dtype)
    optimizer = build_optimizer(model, plan.rates, dtype)
    stage = storage / f"checkpoint_bench_{os.getpid()}"
    saver = Saver(Checkpoints.of(stage), KEEP, 0, lambda: None)
    identity = StreamIdentity("noise", "none", plan.model.sequence_len, plan.micro_batch_rows, 1, plan.seed)
    stream, cursor, world = _noise(plan), Cursor(identity), World(0, 1, device)

    def summed_loss(inputs_BT: torch.Tensor, targets_BT: torch.Tensor) -> torch.Tensor:
        return model(inputs_BT, targets_BT, reduction="sum")

    seconds: dict[str, list[float]] = {"plain": [], "saving": [], "writing": []}
    try:
        for step in range(WARMUP_STEPS + plan.steps):
            began, kind = time.monotonic(), "writing" if saver.busy else "plain"
            result = run_step(plan, summed_loss, optimizer, cursor, 0, stream, world)
            cursor = cursor.advanced(result.last_row, plan.batch_tokens)
            if step % STEPS_BETWEEN == 0:
                kind, now = "saving", time.monotonic()
                saver.save(TrainState(plan, cursor), model.state_dict(), optimizer.state_dict(), now)
            if step >= WARMUP_STEPS:
                seconds[kind].append(time.monotonic() - began)
        saver.wait()
        saved = saver.finished()
    finally:
        stage.delete()
    plain = median(seconds["plain"])
    return {
        "depth": plan.depth,
        "vocab_size": plan.model.vocab_size,
        "device": str(device),
        "dtype": str(dtype),
        "bytes": saved[0].bytes,
        "checkpoints": len(saved) - 1,  # the first one is part of the warm-up
        "step_s": round(plain, 4),
        "saving_step_s": round(median(seconds["saving"]), 4),
        "saving_step_slower": round(median(seconds["saving"]) / plain - 1, 4),
        "steps_beside_writing": len(seconds["writing"]),
        "step_beside_writing_slower": round(median(seconds["writing"]) / plain - 1, 4) if seconds["writing"] else None,
        "stall_s": round(median(each.stall_s for each in saved[1:]), 4),
        "first_stall_s": round(saved[0].stall_s, 4),
        "committed_s": round(median(each.seconds for each in saved[1:]), 3),
    }


def _noise(plan: Plan) -> Iterator[MicroBatch]:
    """Rows of random tokens, numbered as one endless unit."""
    random, rows, row = np.random.default_rng(plan.seed), plan.micro_batch_rows, 0
    while True:
        row_ids = np.zeros((rows, 3), dtype=np.int64)
        row_ids[:, 2] = np.arange(row, row + rows)
        shape = (rows, plan.model.sequence_len + 1)
        tokens = random.integers(0, plan.model.vocab_size, shape, dtype=np.int32)
        yield MicroBatch(row_ids, tokens, *np.zeros((2, rows), dtype=np.int32))
        row += rows


def checkpoint_lines(figures: dict[str, Any]) -> list[Line]:
    """The figures for people."""
    slower, beside = figures["saving_step_slower"], figures["step_beside_writing_slower"]
    lines = [
        Line("a step", f"{figures['step_s'] * 1e3:.0f} ms", f"{figures['device']}, {figures['dtype']}"),
        Line("… that triggers a checkpoint", f"{slower:+.1%}", f"goal ≤ {GOAL:.0%}; of {figures['checkpoints']}"),
    ]
    if beside is not None:
        lines.append(Line("… beside one being written", f"{beside:+.1%}", f"of {figures['steps_beside_writing']}"))
    first = f"the first one {figures['first_stall_s'] * 1e3:.0f} ms: memory to copy to"
    return [
        *lines,
        Line("the loop stands still for", f"{figures['stall_s'] * 1e3:.0f} ms", first),
        Line("committed after", f"{figures['committed_s']:.2f} s", f"{figures['bytes'] / 1e6:.0f} MB"),
    ]
