"""What the layers compute between their matrix products on a CPU, in compiled code: forward, backward and fused.

    model.use_operations(CpuLayers()); model(ids_BT, targets_BT).backward()

Matrix products are torch's (oneDNN), but those of attention. Arithmetic is fp32 whatever the dtype of the tensors;
every sum is made in one order, so results depend neither on the number of threads nor on timing. What a method does not
know (another device, dtype, or a size that is no multiple of 16) it leaves to the plain operation. The code is in
kernels/cpu_layers/, which kernels/cpu_build.py compiles. torch.compile cannot look into it.

Measured on two Zen 4 cores, 8 rows × 512 tokens, bf16, forward and backward of all layers: at depth 4, 316 ms against
576 of torch and 419 of torch.compile; at depth 6, 1.01 s against 1.76 and 1.65. Attention alone is 3.3 to 5 times as
fast as torch's at 512 tokens and 2.4 to 4 times at 2048 (in fp32, 1.3 to 3.4 times); the activations that are kept for
the backward pass take 110 MB instead of 306 at depth 4, 249 instead of 674 at depth 6.
"""

import ctypes
import sys
from collections.abc import Callable
from ctypes import Structure, byref, c_float, c_int, c_int32, c_int64, c_size_t, c_void_p
from typing import Any

import torch
from torch.autograd.function import once_differentiable

from kernels import cpu_build
from kernels.cpu_crew import address, crew_of
from nanochat_ray.model.operations import Operations
from nanochat_ray.plan.shape import ModelShape

SOURCES = "cpu_layers"
LANES = 16  # numbers that are worked on at once
TOKENS_PER_PIECE = 32  # as in kernels/cpu_layers/layers.cpp
DTYPES = (torch.bfloat16, torch.float32)

# A gradient that may be missing: autograd hands out None for results that nothing was made of.
Gradient = torch.Tensor | None


class _Attention(Structure):
    _fields_ = [
        *((name, c_int32) for name in ("rows", "length", "heads", "kv_heads", "size", "window")),
        *((name, c_void_p) for name in ("q", "k", "v")),
        *((name, c_size_t) for name in ("q_stride", "k_stride", "v_stride")),
        *((name, c_void_p) for name in ("y", "log_sums", "dy", "dq", "dk", "dv")),
    ]


class _Mix(Structure):
    _fields_ = [
        ("width", c_int),
        *((name, c_float) for name in ("x_weight", "y_weight")),
        *((name, c_void_p) for name in ("x", "y", "mix", "normed", "inverse", "dmix", "dnormed", "dx", "dy")),
        *((name, c_void_p) for name in ("x_sums", "y_sums")),
    ]


class _Rotation(Structure):
    _fields_ = [
        *((name, c_int) for name in ("heads", "size")),
        ("scale", c_float),
        ("table_rows", c_int64),
        *((name, c_void_p) for name in ("cosines", "sines", "x")),
        ("x_stride", c_int64),
        *((name, c_void_p) for name in ("y", "inverse", "dy", "dx")),
    ]


def why_not(shape: ModelShape, dtype: torch.dtype) -> str | None:
    """Why this machine cannot train such a model with `CpuLayers`, in words; None if it can. May compile: seconds."""
    if sys.byteorder != "little" or ctypes.sizeof(c_void_p) != 8:
        return "the CPU kernels need a 64-bit little-endian processor"
    if dtype not in DTYPES:
        return f"the CPU kernels compute in bfloat16 or float32, not {dtype}"
    if shape.head_size % LANES:
        return f"the CPU kernels need a head size that is a multiple of {LANES}, not {shape.head_size}"
    return cpu_build.why_not(SOURCES)


class CpuLayers(Operations):
    """Operations of the layers for tensors on the CPU, with as many threads as torch has at the time.

    Args:
        extra_flags: for the compiler; tests use them to get the code of other machines.

    Raises:
        UserError: this machine cannot compile it; see `why_not`.
    """

    def __init__(self, extra_flags: tuple[str, ...] = ()):
        self._library = cpu_build.load(SOURCES, extra_flags)

    def norm(self, x: torch.Tensor) -> torch.Tensor:
        if not _known(x) or x.shape[-1] % LANES:
            return super().norm(x)
        return _Norm.apply(self._call, x)  # type: ignore[no-untyped-call]

    def mixed_norm(
        self,
        x: torch.Tensor,
        y: torch.Tensor,
        x_weight: torch.Tensor | None = None,
        y_weight: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if not _known(x, y) or x.shape != y.shape or x.shape[-1] % LANES:
            return super().mixed_norm(x, y, x_weight, y_weight)
        return _MixedNorm.apply(self._call, x, y, x_weight, y_weight)  # type: ignore[no-untyped-call]

    def rotated_norm(
        self, x_BTHK: torch.Tensor, rotary: tuple[torch.Tensor, torch.Tensor], scale: float
    ) -> torch.Tensor:
        if not _known(x_BTHK, *rotary) or x_BTHK.shape[-1] % (2 * LANES) or not _turns(x_BTHK, *rotary):
            return super().rotated_norm(x_BTHK, rotary, scale)
        return _RotatedNorm.apply(self._call, x_BTHK, *rotary, scale)  # type: ignore[no-untyped-call]

    def linear_squared_relu(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        if not _known(x) or len(weight) % LANES:
            return super().linear_squared_relu(x, weight)
        return _SquaredReLU.apply(self._call, x @ weight.to(x.dtype).T)  # type: ignore[no-untyped-call]

    def attention(self, q_BTHK: torch.Tensor, k_BTGK: torch.Tensor, v_BTGK: torch.Tensor, window: int) -> torch.Tensor:
        if not _known(q_BTHK, k_BTGK, v_BTGK) or q_BTHK.shape[-1] % LANES or not _grouped(q_BTHK, k_BTGK, v_BTGK):
            return super().attention(q_BTHK, k_BTGK, v_BTGK, window)
        return _CausalAttention.apply(self._call, q_BTHK, k_BTGK, v_BTGK, window)  # type: ignore[no-untyped-call]

    def _call(self, name: str, dtype: torch.dtype, *arguments: Any) -> None:
        """Run a function of the library."""
        team = crew_of(self._library, "cpu_layers_new")
        if getattr(self._library, f"cpu_layers_{name}")(team, dtype == torch.bfloat16, *arguments):
            raise MemoryError(f"no memory for {name} on the CPU")


Call = Callable[..., None]


def _known(*tensors: torch.Tensor) -> bool:
    first = tensors[0]
    return first.dtype in DTYPES and all(
        x.device.type == "cpu" and x.dtype == first.dtype and x.numel() > 0 for x in tensors
    )


def _turns(x_BTHK: torch.Tensor, cosines: torch.Tensor, sines: torch.Tensor) -> bool:
    rows, length, _, size = x_BTHK.shape
    return cosines.shape == sines.shape and cosines.shape in ((length, size // 2), (rows, length, size // 2))


def _grouped(q_BTHK: torch.Tensor, k_BTGK: torch.Tensor, v_BTGK: torch.Tensor) -> bool:
    rows, length, heads, size = q_BTHK.shape
    kv_heads = k_BTGK.shape[2]
    return k_BTGK.shape == v_BTGK.shape == (rows, length, kv_heads, size) and heads % kv_heads == 0


def _by_token(x: torch.Tensor) -> torch.Tensor:
    """(B, T, heads, K) with tokens at equal distances and contiguous heads; a view if it is so already."""
    rows, length, heads, size = x.shape
    stride = x.stride()
    equal = 1 in (rows, length) or stride[0] == length * stride[1]
    return x if stride[3] == 1 and (heads == 1 or stride[2] == size) and equal else x.contiguous()


def _distance(x: torch.Tensor) -> int:
    """From one token to the next of what `_by_token` returned; the stride of an axis of length 1 means nothing."""
    return x.stride(0 if x.shape[1] == 1 else 1)


class _Norm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, call: Call, x: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        x = x.contiguous()
        y, inverse = torch.empty_like(x), x.new_empty(x.shape[:-1], dtype=torch.float32)
        call("norm", x.dtype, c_int64(inverse.numel()), x.shape[-1], address(x), address(y), address(inverse))
        ctx.call = call
        ctx.save_for_backward(y, inverse)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: torch.Tensor) -> tuple[None, torch.Tensor]:  # type: ignore[override]
        y, inverse = ctx.saved_tensors
        dy, dx = dy.contiguous(), torch.empty_like(y)
        addresses = map(address, (y, inverse, dy, dx))
        ctx.call("norm_backward", y.dtype, c_int64(inverse.numel()), y.shape[-1], *addresses)
        return None, dx


class _MixedNorm(torch.autograd.Function):
    """Of the inputs only those are kept whose weights learn."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any,
        call: Call,
        x: torch.Tensor,
        y: torch.Tensor,
        x_weight: torch.Tensor | None,
        y_weight: torch.Tensor | None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        x, y = x.contiguous(), y.contiguous()
        mix, normed = torch.empty_like(x), torch.empty_like(x)
        inverse = x.new_empty(x.shape[:-1], dtype=torch.float32)
        weights = tuple(1.0 if weight is None else weight.item() for weight in (x_weight, y_weight))
        arguments = _Mix(x.shape[-1], *weights, *map(address, (x, y, mix, normed, inverse)))
        call("mix", x.dtype, c_int64(inverse.numel()), byref(arguments))
        ctx.call, ctx.weights = call, weights
        learn_x, learn_y = ctx.needs_input_grad[3:]
        ctx.save_for_backward(normed, inverse, x if learn_x else None, y if learn_y else None, x_weight, y_weight)
        ctx.set_materialize_grads(False)
        return mix, normed

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dmix: Gradient, dnormed: Gradient) -> tuple[Gradient, ...]:  # type: ignore[override]
        normed, inverse, x, y, x_weight, y_weight = ctx.saved_tensors
        dmix, dnormed = (None if g is None else g.contiguous() for g in (dmix, dnormed))
        dx = torch.empty_like(normed)
        dy = dx if ctx.weights[0] == ctx.weights[1] else torch.empty_like(normed)
        count = inverse.numel()
        sums = inverse.new_empty(2, -(-count // TOKENS_PER_PIECE))
        arguments = _Mix(
            normed.shape[-1], *ctx.weights,
            *map(address, (x, y, None, normed, inverse, dmix, dnormed, dx, None if dy is dx else dy)),
            address(None if x is None else sums[0]), address(None if y is None else sums[1]),
        )  # fmt: skip
        ctx.call("mix_backward", normed.dtype, c_int64(count), byref(arguments))
        totals = sums.sum(dim=1, dtype=torch.float64)
        return (
            None, dx, dy,
            None if x is None else totals[0].to(x_weight.dtype).view_as(x_weight),
            None if y is None else totals[1].to(y_weight.dtype).view_as(y_weight),
        )  # fmt: skip


class _RotatedNorm(torch.autograd.Function):
    """Only the result is kept, which attention keeps as well, and 1/RMS."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, call: Call, x: torch.Tensor, cosines: torch.Tensor, sines: torch.Tensor, scale: float
    ) -> torch.Tensor:
        x, cosines, sines = _by_token(x), cosines.contiguous(), sines.contiguous()
        y, inverse = x.new_empty(x.shape), x.new_empty(x.shape[:-1], dtype=torch.float32)
        table = cosines.numel() // cosines.shape[-1], address(cosines), address(sines)
        arguments = _Rotation(*x.shape[2:], scale, *table, address(x), _distance(x), address(y), address(inverse))
        call("rotate", x.dtype, c_int64(x.shape[0] * x.shape[1]), byref(arguments))
        ctx.call, ctx.scale = call, scale
        ctx.save_for_backward(y, inverse, cosines, sines)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: torch.Tensor) -> tuple[Gradient, ...]:  # type: ignore[override]
        y, inverse, cosines, sines = ctx.saved_tensors
        dy, dx = dy.contiguous(), torch.empty_like(y)
        table = cosines.numel() // cosines.shape[-1], address(cosines), address(sines)
        arguments = _Rotation(*y.shape[2:], ctx.scale, *table, None, 0, *map(address, (y, inverse, dy, dx)))
        ctx.call("rotate_backward", y.dtype, c_int64(y.shape[0] * y.shape[1]), byref(arguments))
        return None, dx, None, None, None


class _SquaredReLU(torch.autograd.Function):
    """In place: the result is what the next matrix keeps anyway, and its root is the ReLU."""

    @staticmethod
    def forward(ctx: Any, call: Call, x: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        call("squared_relu", x.dtype, c_int64(x.numel()), address(x))
        ctx.mark_dirty(x)
        ctx.call = call
        ctx.save_for_backward(x)
        return x

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: torch.Tensor) -> tuple[None, torch.Tensor]:  # type: ignore[override]
        (y,) = ctx.saved_tensors
        dy, dx = dy.contiguous(), torch.empty_like(y)
        ctx.call("squared_relu_backward", y.dtype, c_int64(y.numel()), *map(address, (y, dy, dx)))
        return None, dx


class _CausalAttention(torch.autograd.Function):
    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, call: Call, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, window: int
    ) -> torch.Tensor:
        q, k, v = map(_by_token, (q, k, v))
        rows, length, heads, _ = q.shape
        y, log_sums = q.new_empty(q.shape), q.new_empty(rows, heads, length, dtype=torch.float32)
        call("attention", q.dtype, byref(_attention(q, k, v, window, y, log_sums)))
        ctx.call, ctx.window = call, window
        ctx.save_for_backward(q, k, v, y, log_sums)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: torch.Tensor) -> tuple[Gradient, ...]:  # type: ignore[override]
        q, k, v, y, log_sums = ctx.saved_tensors
        dy = dy.contiguous()
        dq, dk, dv = (x.new_empty(x.shape) for x in (q, k, v))
        ctx.call("attention_backward", q.dtype, byref(_attention(q, k, v, ctx.window, y, log_sums, dy, dq, dk, dv)))
        return None, dq, dk, dv, None


def _attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, window: int, *others: torch.Tensor) -> _Attention:
    rows, length, heads, size = q.shape
    strides = map(_distance, (q, k, v))
    sizes = rows, length, heads, k.shape[2], size, min(window, length)
    return _Attention(*sizes, *map(address, (q, k, v)), *strides, *map(address, others))
