"""The Polar Express iteration of Muon, with the tiles of its symmetric products computed once and mirrored.

Not run on a GPU. The reference is `nanochat_ray.model.updates.polar_express`, whose signature this has.

Reason: of the three products of an iteration, X·Xᵀ and G·G are symmetric, and cuBLAS computes both halves. One half of
each saves a third of the FLOPs of square matrices (4 instead of 6 · m³) and 28 % for the 1 : 4 ones of an MLP (13
instead of 18 · m³). With b·G + c·G·G as the epilogue, G is not read and written once more either. One kernel does
both. It pays where Triton's product reaches more than half of cuBLAS's rate.
"""

import torch
import triton
import triton.language as tl

from nanochat_ray.model.updates import POLAR_EXPRESS

BLOCK, BLOCK_K = 128, 64
WARPS, STAGES = 8, 3


@triton.jit
def symmetric_product_kernel(
    x_ptr,
    out_ptr,
    M,
    N,
    x_batch_stride,
    x_row_stride,
    x_column_stride,
    b,
    c,
    ADD_X: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """out (K, M, M) = c · x·xᵀ [+ b · x, if that is square and symmetric]; out is contiguous.

    Program p computes tile (i, j) of the lower triangle, p = i·(i + 1)/2 + j, and writes its mirror image, too.
    """
    program = tl.program_id(0)
    i = ((tl.sqrt(8.0 * program.to(tl.float32) + 1.0) - 1.0) / 2.0).to(tl.int32)
    i = tl.where(i * (i + 1) // 2 > program, i - 1, i)  # the square root may be off by a rounding
    i = tl.where((i + 1) * (i + 2) // 2 <= program, i + 1, i)
    j = program - i * (i + 1) // 2
    batch = tl.program_id(1).to(tl.int64)
    x_ptr += batch * x_batch_stride
    out_ptr += batch * M * M

    rows, columns = i * BLOCK + tl.arange(0, BLOCK), j * BLOCK + tl.arange(0, BLOCK)
    channels = tl.arange(0, BLOCK_K)
    left = x_ptr + rows[:, None] * x_row_stride + channels[None, :] * x_column_stride
    right = x_ptr + columns[None, :] * x_row_stride + channels[:, None] * x_column_stride
    sums = tl.zeros((BLOCK, BLOCK), tl.float32)
    for start in range(0, N, BLOCK_K):
        inside = channels < N - start
        a = tl.load(left, mask=(rows < M)[:, None] & inside[None, :], other=0.0)
        a_transposed = tl.load(right, mask=(columns < M)[None, :] & inside[:, None], other=0.0)
        sums = tl.dot(a, a_transposed, sums, input_precision=PRECISION)
        left += BLOCK_K * x_column_stride
        right += BLOCK_K * x_column_stride
    inside = (rows < M)[:, None] & (columns < M)[None, :]
    sums *= c
    if ADD_X:
        places = rows[:, None] * x_row_stride + columns[None, :] * x_column_stride
        sums += b * tl.load(x_ptr + places, mask=inside, other=0.0).to(tl.float32)
    tile = sums.to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + rows[:, None] * M + columns[None, :], tile, mask=inside)
    if i != j:
        tl.store(out_ptr + columns[:, None] * M + rows[None, :], tl.trans(tile), mask=tl.trans(inside))


@torch.library.custom_op("nanochat_ray::symmetric_product", mutates_args=())
def symmetric_product(x_KMN: torch.Tensor, add_x: bool, b: float, c: float) -> torch.Tensor:
    """c · x·xᵀ, plus b · x if `add_x` (then x must be symmetric); contiguous (K, M, M), of x with any strides."""
    stacks, rows, columns = x_KMN.shape
    out_KMM = x_KMN.new_empty(stacks, rows, rows)
    if out_KMM.numel():
        tiles = triton.cdiv(rows, BLOCK)
        symmetric_product_kernel[(tiles * (tiles + 1) // 2, stacks)](
            x_KMN, out_KMM, rows, columns, *x_KMN.stride(), b, c,
            ADD_X=add_x, PRECISION="ieee" if x_KMN.dtype == torch.float32 else "tf32",
            BLOCK=BLOCK, BLOCK_K=BLOCK_K, num_warps=WARPS, num_stages=STAGES,
        )  # fmt: skip
    return out_KMM


@symmetric_product.register_fake
def _(x_KMN: torch.Tensor, add_x: bool, b: float, c: float) -> torch.Tensor:
    return x_KMN.new_empty(x_KMN.shape[0], x_KMN.shape[1], x_KMN.shape[1])


def polar_express(x_KMN: torch.Tensor) -> torch.Tensor:
    """Approximately the nearest semi-orthogonal matrices: UVᵀ of each X = UΣVᵀ, in the dtype of x."""
    tall = x_KMN.shape[-2] > x_KMN.shape[-1]
    x = x_KMN.mT if tall else x_KMN  # so that XXᵀ is the smaller of the two products
    norm_K11 = x.float().norm(dim=(-2, -1), keepdim=True)
    x = x / (norm_K11.to(x.dtype) * 1.01 + 1e-6)  # singular values ≤ 1, with a margin for rounding
    for a, b, c in POLAR_EXPRESS:
        gram_KMM = symmetric_product(x, False, 0.0, 1.0)
        x = torch.baddbmm(x, symmetric_product(gram_KMM, True, b, c), x, beta=a)
    return x.mT if tall else x
