"""Rotation of queries or keys by their positions and their norm per head, in one pass, forward and backward.

Not run on a GPU. The reference is `nanochat_ray.model.operations.Operations.rotated_norm`.

Reason: as single operations the forward pass reads and writes each query some nine times; here once, and one tensor, x
itself, is kept for the backward pass, which is one pass as well. Inside torch.compile Inductor fuses the same chain, so
the gain is that of eager training and of decoding; compiled, this must prove itself on a GPU. The angles are rounded to
the dtype of x as in the reference, all else is computed in fp32.

The plain RMS norm has no kernel here: torch's own is one fused pass in both directions.
"""

import torch
import triton
import triton.language as tl

EPSILON = torch.finfo(torch.float32).eps  # what F.rms_norm adds to the mean square, in every dtype
WARPS = 4


@triton.jit
def rotated_norm_kernel(
    x_ptr, cos_ptr, sin_ptr, y_ptr, token_stride, head_stride, table_rows, heads, scale, EPSILON: tl.constexpr,
    PAIRS: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """All heads of a token per program. y is contiguous; channel c is paired with c + PAIRS."""
    token = tl.program_id(0).to(tl.int64)
    head, pair = tl.arange(0, BLOCK_H), tl.arange(0, BLOCK_P)
    inside = (head < heads)[:, None] & (pair < PAIRS)[None, :]
    table = (token % table_rows) * PAIRS + pair
    cos = tl.load(cos_ptr + table, mask=pair < PAIRS, other=0.0).to(tl.float32)[None, :]
    sin = tl.load(sin_ptr + table, mask=pair < PAIRS, other=0.0).to(tl.float32)[None, :]
    places = token * token_stride + head[:, None] * head_stride + pair[None, :]
    first = tl.load(x_ptr + places, mask=inside, other=0.0).to(tl.float32)
    second = tl.load(x_ptr + places + PAIRS, mask=inside, other=0.0).to(tl.float32)
    turned_first, turned_second = first * cos + second * sin, second * cos - first * sin
    squares = tl.sum(turned_first * turned_first + turned_second * turned_second, axis=1)
    factor = (scale / tl.sqrt(squares / (2 * PAIRS) + EPSILON))[:, None]
    places = token * heads * (2 * PAIRS) + head[:, None] * (2 * PAIRS) + pair[None, :]
    tl.store(y_ptr + places, (turned_first * factor).to(y_ptr.dtype.element_ty), mask=inside)
    tl.store(y_ptr + places + PAIRS, (turned_second * factor).to(y_ptr.dtype.element_ty), mask=inside)


@triton.jit
def rotated_norm_gradient_kernel(
    x_ptr, cos_ptr, sin_ptr, grad_y_ptr, grad_x_ptr, token_stride, head_stride, grad_token_stride, grad_head_stride,
    table_rows, heads, scale, EPSILON: tl.constexpr, PAIRS: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """With r = R·x and m = mean(r²) + ε: grad_x = scale · m^(−1/2) · Rᵀ (g − r · mean(g·r) / m)."""
    token = tl.program_id(0).to(tl.int64)
    head, pair = tl.arange(0, BLOCK_H), tl.arange(0, BLOCK_P)
    inside = (head < heads)[:, None] & (pair < PAIRS)[None, :]
    table = (token % table_rows) * PAIRS + pair
    cos = tl.load(cos_ptr + table, mask=pair < PAIRS, other=0.0).to(tl.float32)[None, :]
    sin = tl.load(sin_ptr + table, mask=pair < PAIRS, other=0.0).to(tl.float32)[None, :]
    places = token * token_stride + head[:, None] * head_stride + pair[None, :]
    first = tl.load(x_ptr + places, mask=inside, other=0.0).to(tl.float32)
    second = tl.load(x_ptr + places + PAIRS, mask=inside, other=0.0).to(tl.float32)
    places = token * grad_token_stride + head[:, None] * grad_head_stride + pair[None, :]
    grad_first = tl.load(grad_y_ptr + places, mask=inside, other=0.0).to(tl.float32)
    grad_second = tl.load(grad_y_ptr + places + PAIRS, mask=inside, other=0.0).to(tl.float32)

    turned_first, turned_second = first * cos + second * sin, second * cos - first * sin
    squares = tl.sum(turned_first * turned_first + turned_second * turned_second, axis=1)
    products = tl.sum(grad_first * turned_first + grad_second * turned_second, axis=1)
    mean_square = squares / (2 * PAIRS) + EPSILON
    along = (products / (2 * PAIRS) / mean_square)[:, None]
    factor = (scale / tl.sqrt(mean_square))[:, None]
    grad_first = factor * (grad_first - turned_first * along)
    grad_second = factor * (grad_second - turned_second * along)

    places = token * heads * (2 * PAIRS) + head[:, None] * (2 * PAIRS) + pair[None, :]
    type = grad_x_ptr.dtype.element_ty
    tl.store(grad_x_ptr + places, (grad_first * cos - grad_second * sin).to(type), mask=inside)
    tl.store(grad_x_ptr + places + PAIRS, (grad_second * cos + grad_first * sin).to(type), mask=inside)


@torch.library.custom_op("nanochat_ray::rotated_norm", mutates_args=())
def rotated_norm(x_NHK: torch.Tensor, cos_RP: torch.Tensor, sin_RP: torch.Tensor, scale: float) -> torch.Tensor:
    """Token n is turned by the angles of row n mod R of contiguous tables; contiguous (N, H, K) in the dtype of x."""
    x_NHK = _with_contiguous_heads(x_NHK)
    y_NHK = torch.empty_like(x_NHK, memory_format=torch.contiguous_format)
    if y_NHK.numel():
        rotated_norm_kernel[(len(x_NHK),)](
            x_NHK, cos_RP, sin_RP, y_NHK, x_NHK.stride(0), x_NHK.stride(1), len(cos_RP), x_NHK.shape[1], scale,
            EPSILON=EPSILON, **_blocks(x_NHK), num_warps=WARPS,
        )  # fmt: skip
    return y_NHK


@torch.library.custom_op("nanochat_ray::rotated_norm_gradient", mutates_args=())
def rotated_norm_gradient(
    x_NHK: torch.Tensor, cos_RP: torch.Tensor, sin_RP: torch.Tensor, grad_y_NHK: torch.Tensor, scale: float
) -> torch.Tensor:
    """The gradient of x from that of `rotated_norm`."""
    x_NHK, grad_y_NHK = _with_contiguous_heads(x_NHK), _with_contiguous_heads(grad_y_NHK)
    grad_x_NHK = torch.empty_like(x_NHK, memory_format=torch.contiguous_format)
    if grad_x_NHK.numel():
        rotated_norm_gradient_kernel[(len(x_NHK),)](
            x_NHK, cos_RP, sin_RP, grad_y_NHK, grad_x_NHK, x_NHK.stride(0), x_NHK.stride(1),
            grad_y_NHK.stride(0), grad_y_NHK.stride(1), len(cos_RP), x_NHK.shape[1], scale,
            EPSILON=EPSILON, **_blocks(x_NHK), num_warps=WARPS,
        )  # fmt: skip
    return grad_x_NHK


@rotated_norm.register_fake
@rotated_norm_gradient.register_fake
def _(x_NHK: torch.Tensor, *_: object) -> torch.Tensor:
    return torch.empty_like(x_NHK, memory_format=torch.contiguous_format)


def _keep(ctx, inputs, output):  # type: ignore[no-untyped-def]
    *tensors, ctx.scale = inputs
    ctx.save_for_backward(*tensors)


def _gradient(ctx, grad_y_NHK):  # type: ignore[no-untyped-def]
    return rotated_norm_gradient(*ctx.saved_tensors, grad_y_NHK, ctx.scale), None, None, None


rotated_norm.register_autograd(_gradient, setup_context=_keep)


def rotated_norm_of_rows(x_BTHK: torch.Tensor, rotary: tuple[torch.Tensor, torch.Tensor], scale: float) -> torch.Tensor:
    """Queries or keys (B, T, heads, K), turned by their positions, RMS-normed per head, times `scale`.

    Args:
        rotary: cosines and sines, each (T, K/2) or (B, T, K/2), without gradients.
    """
    cos_RP, sin_RP = (table.reshape(-1, table.shape[-1]).contiguous() for table in rotary)
    return rotated_norm(x_BTHK.flatten(0, 1), cos_RP, sin_RP, scale).view(x_BTHK.shape)


def _with_contiguous_heads(x_NHK: torch.Tensor) -> torch.Tensor:
    return x_NHK if x_NHK.stride(-1) == 1 else x_NHK.contiguous()


def _blocks(x_NHK: torch.Tensor) -> dict[str, int]:
    heads, pairs = x_NHK.shape[1], x_NHK.shape[2] // 2
    return {"PAIRS": pairs, "BLOCK_H": triton.next_power_of_2(heads), "BLOCK_P": triton.next_power_of_2(pairs)}
