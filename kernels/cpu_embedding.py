"""Look-ups in embedding tables on a CPU, whose gradients are added to the table's own gradient, row by row.

    model.use_operations(CpuEmbedding()); model(ids_BT, targets_BT).backward()

Reference: `Operations.embedding`. Autograd makes a gradient as large as the table, nearly all of it zeros, for each
table and micro-batch, and adds it to the one before; here nothing is touched but the rows of the micro-batch. The sums
are made in the order of the tokens, so they depend neither on the number of threads nor on timing. The code is in
kernels/cpu_embedding/.

Measured on two Zen 4 cores, look-up, gradient and its sum for 4,096 tokens in a table of 32,768 × 256: 2.1 ms against
16 ms of the reference; × 768: 5 ms against 49 ms.
"""

import os
import threading
from ctypes import c_int64
from typing import Any

import torch
from torch.autograd.function import once_differentiable

from kernels import cpu_build
from kernels.cpu_crew import address, crew_of
from nanochat_ray.model.operations import Operations
from nanochat_ray.plan.shape import ModelShape

SOURCES = "cpu_embedding"
DTYPES = (torch.bfloat16, torch.float32)
_LANES = 16
_adding = threading.Lock()  # to a table's gradient


def why_not(shape: ModelShape, dtype: torch.dtype) -> str | None:
    """Why this machine cannot train such a model with `CpuEmbedding`, in words; None if it can. May compile."""
    if dtype not in DTYPES:
        return f"the CPU's embedding computes in bfloat16 or float32, not {dtype}"
    if shape.n_embd % _LANES or shape.kv_width % _LANES:
        return (
            f"the CPU's embedding needs widths that are multiples of {_LANES}, not {shape.n_embd} and {shape.kv_width}"
        )
    return cpu_build.why_not(SOURCES)


class CpuEmbedding(Operations):
    """Operations with the embedding of this machine; what it does not know (other dtypes, devices) is left to torch."""

    def embedding(self, ids: torch.Tensor, weight_VD: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """The backward pass adds to `weight_VD.grad` itself and gives autograd nothing to add.

        So gradients accumulate over micro-batches as always. Where the table has hooks, or a `grad` that is not
        contiguous fp32 on the CPU, autograd gets a gradient as large as the table. torch.autograd.grad gets none (it
        raises, or returns None with allow_unused), and adds to `weight_VD.grad` nevertheless.

        Raises:
            IndexError: an id is not a row of the table.
        """
        known = weight_VD.dtype == torch.float32 and dtype in DTYPES and weight_VD.is_contiguous()
        if not known or weight_VD.device.type != "cpu" or weight_VD.shape[1] % _LANES or not weight_VD.is_leaf:
            return super().embedding(ids, weight_VD, dtype)
        if ids.numel() and (ids.min() < 0 or ids.max() >= len(weight_VD)):
            raise IndexError(f"ids must lie in 0 … {len(weight_VD) - 1}")
        return _Embedding.apply(ids.to(torch.int64).contiguous(), weight_VD, dtype)


class _Embedding(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, ids: torch.Tensor, weight_VD: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        ctx.ids, ctx.weight_VD = ids, weight_VD
        values = weight_VD.new_empty(*ids.shape, weight_VD.shape[1], dtype=dtype)
        _call("gather", weight_VD, ids, values)
        return values

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[None, torch.Tensor | None, None]:
        weight_VD, grad = ctx.weight_VD, grad.contiguous()
        if not weight_VD.requires_grad:  # frozen since the look-up
            return None, None, None
        with _adding:
            if _may_be_added_to(weight_VD):
                if weight_VD.grad is None:
                    weight_VD.grad = torch.zeros_like(weight_VD)
                _call("scatter", weight_VD.grad, ctx.ids, grad)
                return None, None, None
        dense_VD = torch.zeros_like(weight_VD)
        _call("scatter", dense_VD, ctx.ids, grad)
        return None, dense_VD, None


def _may_be_added_to(weight_VD: torch.Tensor) -> bool:
    """Whether nobody would notice that autograd does not add the gradient."""
    grad = weight_VD.grad
    if weight_VD._backward_hooks or weight_VD._post_accumulate_grad_hooks:
        return False
    return grad is None or (
        grad.layout == torch.strided
        and grad.dtype == torch.float32
        and grad.device.type == "cpu"
        and grad.is_contiguous()
    )


def _unlocked_after_a_fork() -> None:
    """The thread that held the lock does not exist in the child."""
    global _adding
    _adding = threading.Lock()


os.register_at_fork(after_in_child=_unlocked_after_a_fork)


def _call(what: str, table_VD: torch.Tensor, ids: torch.Tensor, values: torch.Tensor) -> None:
    """gather: values = rows of the table; scatter: rows of the table += values."""
    library = cpu_build.load(SOURCES)
    function, crew = getattr(library, f"cpu_embedding_{what}"), crew_of(library, "cpu_embedding_crew")
    sizes = c_int64(table_VD.shape[1]), c_int64(ids.numel())
    function(crew, values.dtype == torch.bfloat16, address(table_VD), *sizes, address(ids), address(values))
