"""Each of our kernels beside what torch does for the same operation, and beside the roofline of this machine.

One process, the variants by turns, medians. A kernel's limit is the slower of two: its FLOPs at the speed of a large
matrix product, and the bytes it cannot avoid to move at the speed of main memory, both measured in the same run. Small
operands stay in caches, so that a figure above 100 % of the memory's limit is possible.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from statistics import median
from typing import Any

import torch

from nanochat_ray.bench.measurement import Line, Watch
from nanochat_ray.device import gemm_peak, memory_bandwidth, pick_device, pick_dtype
from nanochat_ray.machine import describe_machine
from nanochat_ray.model.attention import RotaryTables
from nanochat_ray.model.operations import Operations
from nanochat_ray.plan import Plan

IGNORED_SHARE = 16  # one of so many targets is ignored
Variant = Callable[[], object]


@dataclass(frozen=True)
class Case:
    """One operation, forward and backward unless its name says otherwise.

    Attributes:
        method: of `Operations`, which our kernels may override.
        run: calls it on given operations.
        flops, moved: that no implementation can avoid; bytes.
    """

    name: str
    method: str
    run: Callable[[Operations], object]
    flops: float
    moved: float


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


def cases(plan: Plan, device: torch.device, dtype: torch.dtype) -> list[Case]:
    """All operations of a training step on one micro-batch of the plan."""
    shape, rows = plan.model, plan.micro_batch_rows
    length, width, heads, size = shape.sequence_len, shape.n_embd, shape.n_head, shape.head_size
    tokens, vocab, item = rows * length, shape.padded_vocab_size, dtype.itemsize
    draw = torch.Generator(device).manual_seed(0)

    def random(*sizes: int, of: torch.dtype = dtype, scale: float = 1.0) -> torch.Tensor:
        tensor = torch.randn(sizes, generator=draw, device=device) * scale
        return tensor.to(of).requires_grad_()

    x_ND = random(tokens, width)
    q_BTHK, k_BTGK, v_BTGK = (random(rows, length, n, size) for n in (heads, shape.n_kv_head, shape.n_kv_head))
    rotary = RotaryTables(size, shape.rotary_base)(length, device, dtype)
    up = random(4 * width, width, of=torch.float32, scale=width**-0.5)
    head = random(vocab, width, of=torch.float32, scale=width**-0.5)
    table = random(vocab, width, of=torch.float32)
    ids_N = torch.randint(shape.vocab_size, (tokens,), generator=draw, device=device)
    targets_N = ids_N.where(torch.arange(tokens, device=device) % IGNORED_SHARE > 0, -1)
    matrices = random(4, 4 * width, width).detach()

    def trained(run: Callable[[Operations], torch.Tensor]) -> Callable[[Operations], object]:
        """Forward and backward, with gradients that are added to those of an earlier micro-batch."""
        shape_of_result = run(Operations()).shape
        grad = torch.randn(shape_of_result, generator=draw, device=device).to(dtype)

        def both(operations: Operations) -> object:
            result = run(operations)
            result.backward(grad if result.dim() else None)
            return None

        return both

    found = [
        Case("norm", "norm", trained(lambda o: o.norm(x_ND)), 0, 5 * tokens * width * item),
        Case(
            "rotation and norm of queries",
            "rotated_norm",
            trained(lambda o: o.rotated_norm(q_BTHK, rotary, 1.2)),
            0,
            5 * tokens * width * item,
        ),
        Case(
            "linear and squared ReLU",
            "linear_squared_relu",
            trained(lambda o: o.linear_squared_relu(x_ND, up)),
            3 * 2 * tokens * width * 4 * width,
            3 * (5 * tokens * width + 4 * width * width) * item,
        ),
        Case(
            f"softcapped cross-entropy of {tokens:,} tokens",
            "linear_cross_entropy",
            trained(lambda o: o.linear_cross_entropy(x_ND, head, targets_N, shape.vocab_size, "sum")),
            3 * 2 * tokens * width * vocab,
            3 * (tokens * width + vocab * width) * item,
        ),
        Case(
            "gradient of an embedding",
            "embedding",
            trained(lambda o: o.embedding(ids_N, table, dtype)),
            0,
            4 * tokens * width * 4,
        ),
        Case(
            f"Polar Express, 4 of {4 * width} × {width}",
            "polar_express",
            lambda o: o.polar_express(matrices),
            4 * 5 * (4 * width * width * 4 * width + 2 * width**3),
            2 * matrices.numel() * matrices.element_size(),
        ),
    ]
    for window in sorted(set(shape.windows)):
        found.append(
            Case(
                f"attention, T = {length}, window {window}",
                "attention",
                trained(lambda o, window=window: o.attention(q_BTHK, k_BTGK, v_BTGK, window)),  # type: ignore[misc]
                12 * width * rows * _pairs(length, window),
                (3 * 2 * width + 3 * 2 * shape.kv_width) * tokens * item,
            )
        )
    return [case for case in found if hasattr(Operations, case.method)]


def _pairs(length: int, window: int) -> int:
    """Of a query and a key that it sees."""
    return sum(min(position, window) + 1 for position in range(length))


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
        "limit_s": round(limit, 6),
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
    lines = [Line("kernels", figures["kernels"], f"{figures['why']}; {figures['dtype']}, {figures['threads']} threads")]
    for case in figures["cases"]:
        beside = (
            f"{case['of_limit']:.0%} of the {case['limit']}'s limit; torch {case['torch_s'] * 1e3:,.2f} ms "
            f"({case['times']:.1f} x)"
        )
        lines.append(Line(case["name"], f"{case['own_s'] * 1e3:,.2f} ms", beside))
    return lines
