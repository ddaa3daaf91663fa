"""relu(x·Wᵀ)² with the activation in the matrix product's epilogue, and a backward pass that needs only the result.

Not run on a GPU. The reference is `nanochat_ray.model.operations.Operations.linear_squared_relu`.

Reason: autograd keeps z = x·Wᵀ, relu(z) and the result y, three tensors of 4 widths in each layer; here y is kept, and
z never exists. relu(z) = sqrt(y) is as exact as a kept bf16 z, since a square root halves the relative error of
rounding y. (In fp16 y overflows where |z| > 256, with or without this.) The epilogue also saves 4 bytes per element
of traffic: by an H100's data sheet 0.26 ms beside the product's 0.73 ms, for 32,768 tokens at depth 26. Whether this
Triton product comes within that of cuBLAS's is the first thing to measure on a GPU: if not, `squared_relu` below after
F.linear keeps the saving of memory and gives up only the epilogue. It is what runs after an fp8 product.
"""

import torch
import triton
import triton.language as tl
from torch.autograd.function import once_differentiable

BLOCK_M, BLOCK_N, BLOCK_K = 128, 256, 64
WARPS, STAGES = 8, 3
GROUP_M = 8  # row tiles that go over the weight together, so that its tiles are found in the L2 cache
ELEMENTS = 1024  # per program of the elementwise kernels


@triton.jit
def matmul_squared_relu_kernel(
    x_ptr,
    w_ptr,
    y_ptr,
    M,
    N,
    K,
    x_stride,
    w_stride,
    y_stride,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    """y (M, N) = relu(x (M, K) · wᵀ (K, N))², a tile per program; the last axis of each is contiguous."""
    program = tl.program_id(0)
    tiles_m, tiles_n = tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N)
    group = program // (GROUP_M * tiles_n)
    group_rows = min(tiles_m - group * GROUP_M, GROUP_M)
    in_group = program % (GROUP_M * tiles_n)
    tile_m, tile_n = group * GROUP_M + in_group % group_rows, in_group // group_rows

    rows = (tile_m * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)
    columns = (tile_n * BLOCK_N + tl.arange(0, BLOCK_N)).to(tl.int64)
    channels = tl.arange(0, BLOCK_K)
    x_ptrs = x_ptr + rows[:, None] * x_stride + channels[None, :]
    w_ptrs = w_ptr + columns[None, :] * w_stride + channels[:, None]
    sums = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(0, K, BLOCK_K):
        inside = channels < K - start
        x = tl.load(x_ptrs, mask=(rows < M)[:, None] & inside[None, :], other=0.0)
        w = tl.load(w_ptrs, mask=(columns < N)[None, :] & inside[:, None], other=0.0)
        sums = tl.dot(x, w, sums, input_precision=PRECISION)
        x_ptrs += BLOCK_K
        w_ptrs += BLOCK_K
    positive = tl.maximum(sums, 0.0, propagate_nan=tl.PropagateNan.ALL)
    y_ptrs = y_ptr + rows[:, None] * y_stride + columns[None, :]
    inside = (rows < M)[:, None] & (columns < N)[None, :]
    tl.store(y_ptrs, (positive * positive).to(y_ptr.dtype.element_ty), mask=inside)


@triton.jit
def squared_relu_kernel(z_ptr, y_ptr, count, BLOCK: tl.constexpr):
    places = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    z = tl.load(z_ptr + places, mask=places < count, other=0.0).to(tl.float32)
    positive = tl.maximum(z, 0.0, propagate_nan=tl.PropagateNan.ALL)
    tl.store(y_ptr + places, (positive * positive).to(y_ptr.dtype.element_ty), mask=places < count)


@triton.jit
def squared_relu_gradient_kernel(y_ptr, grad_y_ptr, grad_z_ptr, count, BLOCK: tl.constexpr):
    """d y / d z = 2·relu(z) = 2·sqrt(y)."""
    places = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    y = tl.load(y_ptr + places, mask=places < count, other=0.0).to(tl.float32)
    grad_y = tl.load(grad_y_ptr + places, mask=places < count, other=0.0).to(tl.float32)
    grad_z = 2.0 * tl.sqrt(y) * grad_y
    tl.store(grad_z_ptr + places, grad_z.to(grad_z_ptr.dtype.element_ty), mask=places < count)


@torch.library.custom_op("nanochat_ray::matmul_squared_relu", mutates_args=())
def matmul_squared_relu(x_MK: torch.Tensor, weight_NK: torch.Tensor) -> torch.Tensor:
    """relu(x·Wᵀ)² (M, N) of two matrices of one dtype."""
    x_MK, weight_NK = _with_contiguous_rows(x_MK), _with_contiguous_rows(weight_NK)
    y_MN = x_MK.new_empty(len(x_MK), len(weight_NK))
    if y_MN.numel():
        tiles = triton.cdiv(len(x_MK), BLOCK_M) * triton.cdiv(len(weight_NK), BLOCK_N)
        matmul_squared_relu_kernel[(tiles,)](
            x_MK, weight_NK, y_MN, len(x_MK), len(weight_NK), x_MK.shape[1],
            x_MK.stride(0), weight_NK.stride(0), y_MN.stride(0),
            PRECISION="ieee" if x_MK.dtype == torch.float32 else "tf32",
            BLOCK_M=BLOCK_M, BLOCK_N=BLOCK_N, BLOCK_K=BLOCK_K, GROUP_M=GROUP_M, num_warps=WARPS, num_stages=STAGES,
        )  # fmt: skip
    return y_MN


@matmul_squared_relu.register_fake
def _(x_MK: torch.Tensor, weight_NK: torch.Tensor) -> torch.Tensor:
    return x_MK.new_empty(len(x_MK), len(weight_NK))


@torch.library.custom_op("nanochat_ray::squared_relu", mutates_args=())
def squared_relu(z: torch.Tensor) -> torch.Tensor:
    """relu(z)², any shape; differentiable, and keeps only its result for that."""
    z = z.contiguous()
    y = torch.empty_like(z)
    if z.numel():
        squared_relu_kernel[(triton.cdiv(z.numel(), ELEMENTS),)](z, y, z.numel(), BLOCK=ELEMENTS)
    return y


@torch.library.custom_op("nanochat_ray::squared_relu_gradient", mutates_args=())
def squared_relu_gradient(y: torch.Tensor, grad_y: torch.Tensor) -> torch.Tensor:
    """The gradient of z, from y = relu(z)² and the gradient of y."""
    y, grad_y = y.contiguous(), grad_y.contiguous()
    grad_z = torch.empty_like(y)
    if y.numel():
        squared_relu_gradient_kernel[(triton.cdiv(y.numel(), ELEMENTS),)](y, grad_y, grad_z, y.numel(), BLOCK=ELEMENTS)
    return grad_z


@squared_relu.register_fake
@squared_relu_gradient.register_fake
def _(z: torch.Tensor, *_: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(z, memory_format=torch.contiguous_format)


squared_relu.register_autograd(
    lambda ctx, grad_y: squared_relu_gradient(*ctx.saved_tensors, grad_y),
    setup_context=lambda ctx, inputs, output: ctx.save_for_backward(output),
)


class _LinearSquaredRelu(torch.autograd.Function):
    """Keeps x, the weight and y."""

    @staticmethod
    def forward(ctx, x, weight):  # type: ignore[no-untyped-def,override]
        y = matmul_squared_relu(x.flatten(0, -2), weight.to(x.dtype)).unflatten(0, x.shape[:-1])
        ctx.save_for_backward(x, weight, y)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_y):  # type: ignore[no-untyped-def,override]
        x, weight, y = ctx.saved_tensors
        grad_z_MN = squared_relu_gradient(y, grad_y).flatten(0, -2)
        grad_x = (grad_z_MN @ weight.to(x.dtype)).view(x.shape)
        return grad_x, (grad_z_MN.T @ x.flatten(0, -2)).to(weight.dtype)


def linear_squared_relu(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """relu(x·Wᵀ)², (…, outputs); the weight is cast to the dtype of x, and its gradient has the weight's."""
    return _LinearSquaredRelu.apply(x, weight)


def _with_contiguous_rows(matrix: torch.Tensor) -> torch.Tensor:
    return matrix if matrix.stride(-1) == 1 else matrix.contiguous()
