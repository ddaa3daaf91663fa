"""Each of our kernels beside what torch does for the same operation, and beside the roofline of this machine.

One process, the variants by turns, medians. A kernel's limit is the slower of two: its FLOPs at the speed of a large
matrix product (measured in the same run; on known GPUs the data sheet's), and the bytes it cannot avoid to move at the
measured speed of main memory. Small operands stay in caches, so that a figure above 100 % of the memory's limit is
possible. The CPU's other kernel, the fused step of decoding, is what `jobs.bench decode` measures.
"""

import time
from collections.abc import Callable
from datetime import UTC, datetime
from statistics import median
from typing import Any

import torch

from nanochat_ray.bench.kernel_cases import Case, cases
from nanochat_ray.bench.measurement import Line, Watch
from nanochat_ray.device import gemm_peak, memory_bandwidth, pick_device, pick_dtype
from nanochat_ray.machine import describe_machine
from nanochat_ray.model.operations import Operations
from nanochat_ray.plan import Plan

Variant = Callable[[], object]


def measure_kernels(plan: Plan, dtype_name: str | None, repeats: int) -> dict[str, Any]:
    """Every operation that our kernels for this machine override, at the sizes of one micro-batch of the plan.

    Raises:
        UserError: there are no kernels for this machine; says why.
    """
    from kernels import dispatch

    device, _ = pick_device()
    dtype, _ = pick_dtype(device, dtype_name)
    with Watch() as watch:
        choice = dispatch.training_operations(plan.model, device, dtype, wanted=True)
        plain = Operations()
        own = [case for case in cases(plan, device, dtype) if overrides(choice.operations, case.method)]
        figures = [_measure(case, choice.operations, plain, device, dtype, repeats) for case in own]
    return {
        "device": str(device),
        "dtype": str(dtype),
        "threads": torch.get_num_threads(),
        "kernels": choice.name,
        "why": choice.why,
        "cases": figures,
        "provenance": {"date": datetime.now(UTC).date().isoformat(), **dict(describe_machine())},
        "machine": watch.to_dict(),
    }


def overrides(operations: Operations, method: str) -> bool:
    return getattr(type(operations), method) is not getattr(Operations, method)


def _measure(
    case: Case, own: Operations, plain: Operations, device: torch.device, dtype: torch.dtype, repeats: int
) -> dict[str, Any]:
    variants: dict[str, Variant] = {"own": lambda: case.run(own), "torch": lambda: case.run(plain)}
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    limits = []
    for repeat in range(repeats + 1):
        gemm_peak.cache_clear()
        memory_bandwidth.cache_clear()
        compute, memory = case.flops / gemm_peak(device, dtype), case.moved / memory_bandwidth(device)
        for name, variant in variants.items():
            taken = _seconds(variant, device)
            if repeat:  # the first one allocates and compiles
                seconds[name].append(taken)
        limits.append((max(compute, memory), "compute" if compute > memory else "memory"))
    limit, kind = sorted(limits)[len(limits) // 2]
    middle = {name: median(values) for name, values in seconds.items()}
    return {
        "name": case.name,
        "method": case.method,
        "own_s": round(middle["own"], 6),
        "torch_s": round(middle["torch"], 6),
        "times": round(middle["torch"] / middle["own"], 3),
        "limit_s": round(limit, 9),
        "limit": kind,
        "of_limit": round(limit / middle["own"], 4),
    }


def _seconds(variant: Variant, device: torch.device) -> float:
    _wait(device)
    began = time.perf_counter()
    variant()
    _wait(device)
    return time.perf_counter() - began


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def kernel_lines(figures: dict[str, Any]) -> list[Line]:
    """The figures as a table for people."""
    faster = sum(case["times"] > 1 for case in figures["cases"])
    verdict = f"{faster} of {len(figures['cases'])} faster than torch here"
    lines = [Line("kernels", figures["kernels"], f"{verdict}; {figures['dtype']}, {figures['threads']} threads")]
    for case in figures["cases"]:
        beside = (
            f"{case['of_limit']:.0%} of the {case['limit']}'s limit; torch {case['torch_s'] * 1e3:,.2f} ms "
            f"({case['times']:.1f} x)"
        )
        lines.append(Line(case["name"], f"{case['own_s'] * 1e3:,.2f} ms", beside))
    return lines
