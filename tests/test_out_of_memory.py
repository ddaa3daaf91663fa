"""Running out of memory is told apart from other errors and answered with the number to lower."""

from dataclasses import replace

import pytest
import torch

from nanochat_ray.plan import SFT, make_plan
from nanochat_ray.train.out_of_memory import killed_advice, out_of_memory_advice

PLAN = make_plan(depth=20, micro_batch_rows=16)


class OutOfMemoryError(Exception):
    """As Ray's is called."""


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.\nGPU 0 has a total of 79 GiB"),
        RuntimeError("[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory: you tried …"),
        RuntimeError("CUDA error: out of memory"),
        RuntimeError("std::bad_alloc"),
        OSError(12, "Cannot allocate memory"),
        MemoryError(),
        OutOfMemoryError("Task was killed due to the node running low on memory."),
    ],
)
def test_the_line_names_the_flag_its_value_and_the_estimate(error):
    advice = out_of_memory_advice(error, PLAN)
    assert "\n" not in advice
    assert "lower --micro-batch-rows from 16 to 8, with --fresh" in advice
    assert f"{PLAN.model.worker_bytes(16) / 2**30:.1f} GiB for one worker" in advice


@pytest.mark.parametrize(
    "error", [RuntimeError("Connection closed by peer"), ValueError("out of memory"), KeyError("memory"), OSError("x")]
)
def test_other_errors_are_none_of_its_business(error):
    assert out_of_memory_advice(error, PLAN) is None


def test_what_the_cpu_allocator_really_raises_is_recognized():
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**60)
    assert "--micro-batch-rows" in out_of_memory_advice(caught.value, PLAN)


def test_one_row_and_finetuning_have_another_way_out():
    assert "is 1 already, so lower --depth" in out_of_memory_advice(MemoryError(), replace(PLAN, micro_batch_rows=1))
    finetuning = out_of_memory_advice(MemoryError(), replace(PLAN, stage=SFT))
    assert "give each worker more memory" in finetuning
    assert "--fresh" not in finetuning


def test_processes_that_were_killed_get_the_same_advice():
    assert "lower --micro-batch-rows from 16 to 8" in killed_advice(PLAN, None)


def test_what_the_other_workers_saw_is_said_before_memory_is_blamed():
    said = killed_advice(PLAN, "NCCL error: invalid usage,\n run with NCCL_DEBUG=WARN")
    assert "what the other workers saw: NCCL error: invalid usage, run with NCCL_DEBUG=WARN" in said
    assert said.index("NCCL_DEBUG") < said.index("memory was full")
