"""Unembedding, softcap and cross-entropy in chunks of tokens: products by cuBLAS, all between them in one kernel.

    loss = linear_cross_entropy(x_ND, weight_VD, targets_N, vocab_size, "sum", GpuLoss())

Not run on a GPU. The reference is `nanochat_ray.model.loss.ChunkedLoss`; the autograd wrapper is there, too.

Reason: with torch's own operations a chunk of logits passes through memory some twelve times between the products (the
softcap, its derivative, exponentials, sums, the gradient), half of them in fp32 scratch twice as large as the chunk.
This kernel reads the bf16 logits twice and writes their gradient over them once: 6 bytes per logit, the second read
mostly from the L2 cache. The three products take 2·D FLOPs each per logit and are left to cuBLAS, which no Triton code
of ours would beat. Whole logits never exist: 256 MiB of them do at a time, no more than the reference's chunk and
scratch together.
"""

import torch
import triton
import triton.language as tl

from nanochat_ray.model.loss import IGNORED, SOFTCAP, ChunkedLoss
from nanochat_ray.plan.shape import LOGITS_CHUNK_BYTES, round_up

CHUNK_BYTES = 4 * LOGITS_CHUNK_BYTES  # 4096 tokens in bf16 at a vocabulary of 32768: products large enough for a GPU
BLOCK = 2048  # logits of a row that a program works on at once
WARPS = 8
_ROW_MULTIPLE = 64  # rows of the buffer start at multiples of this, whatever the vocabulary: cuBLAS wants 16 bytes


@triton.jit
def softcapped_losses_kernel(
    z_ptr,
    row_stride,
    targets_ptr,
    scale_ptr,
    losses_ptr,
    vocab_size,
    SOFTCAP: tl.constexpr,
    IGNORED: tl.constexpr,
    WITH_GRADIENT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One row (token) per program. With s = sigmoid(2z/cap), the soft-capped logit is 2·cap·s − cap.

    The cap bounds it, so the exponentials need no maximum; they are taken of 2·cap·(s − 1) ≤ 0.
    """
    row = tl.program_id(0).to(tl.int64)
    z_ptr += row * row_stride
    target = tl.load(targets_ptr + row)
    counted = target != IGNORED
    columns = tl.arange(0, BLOCK)

    # Read before the reduction, whose barrier all warps pass: after it, some may already write gradients over logits.
    target_z = tl.load(z_ptr + target, mask=counted, other=0.0).to(tl.float32)
    target_sigmoid = 1.0 / (1.0 + tl.exp(-2.0 / SOFTCAP * target_z))

    sums = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, vocab_size, BLOCK):
        inside = start + columns < vocab_size
        z = tl.load(z_ptr + start + columns, mask=inside, other=0.0).to(tl.float32)
        sigmoid = 1.0 / (1.0 + tl.exp(-2.0 / SOFTCAP * z))
        sums += tl.where(inside, tl.exp(2.0 * SOFTCAP * (sigmoid - 1.0)), 0.0)
    total = tl.sum(sums, axis=0)
    loss = tl.log(total) - 2.0 * SOFTCAP * (target_sigmoid - 1.0)
    tl.store(losses_ptr + row, tl.where(counted, loss, 0.0))

    if WITH_GRADIENT:
        # d loss / d z = (softmax − [v = y]) · 4·s·(1 − s)
        scale = 4.0 * tl.where(counted, tl.load(scale_ptr + row), 0.0)
        for start in range(0, vocab_size, BLOCK):
            inside = start + columns < vocab_size
            z = tl.load(z_ptr + start + columns, mask=inside, other=0.0).to(tl.float32)
            sigmoid = 1.0 / (1.0 + tl.exp(-2.0 / SOFTCAP * z))
            probability = tl.exp(2.0 * SOFTCAP * (sigmoid - 1.0)) / total
            error = probability - tl.where(start + columns == target, 1.0, 0.0)
            gradient = scale * error * sigmoid * (1.0 - sigmoid)
            tl.store(z_ptr + start + columns, gradient.to(z_ptr.dtype.element_ty), mask=inside)


@torch.library.custom_op("nanochat_ray::softcapped_losses", mutates_args={"z_CV"})
def softcapped_losses(z_CV: torch.Tensor, targets_C: torch.Tensor, scale_C: torch.Tensor | None) -> torch.Tensor:
    """Losses (C,) fp32 of raw logits, whose rows are contiguous.

    With a scale, the logits become the gradient of Σ scale·loss.
    """
    assert z_CV.stride(1) == 1, "gradients are written in place"
    losses_C = torch.empty(len(z_CV), dtype=torch.float32, device=z_CV.device)
    if len(z_CV):
        softcapped_losses_kernel[(len(z_CV),)](
            z_CV, z_CV.stride(0), targets_C, losses_C if scale_C is None else scale_C, losses_C, z_CV.shape[1],
            SOFTCAP=SOFTCAP, IGNORED=IGNORED, WITH_GRADIENT=scale_C is not None, BLOCK=BLOCK, num_warps=WARPS,
        )  # fmt: skip
    return losses_C


@softcapped_losses.register_fake
def _(z_CV: torch.Tensor, targets_C: torch.Tensor, scale_C: torch.Tensor | None) -> torch.Tensor:
    return torch.empty(len(z_CV), dtype=torch.float32, device=z_CV.device)


class GpuLoss(ChunkedLoss):
    """Losses and gradients of `nanochat_ray.model.loss.linear_cross_entropy` on a GPU."""

    def losses(
        self, x_ND: torch.Tensor, weight_VD: torch.Tensor, targets_N: torch.Tensor, vocab_size: int
    ) -> torch.Tensor:
        cast_VD, targets_N = weight_VD[:vocab_size].to(x_ND.dtype), targets_N.contiguous()
        losses_N = torch.empty(len(x_ND), dtype=torch.float32, device=x_ND.device)
        buffer_CV = _buffer(x_ND, vocab_size)
        for part in _chunks(len(x_ND), len(buffer_CV)):
            z_CV = torch.mm(x_ND[part], cast_VD.T, out=buffer_CV[: part.stop - part.start])
            losses_N[part] = softcapped_losses(z_CV, targets_N[part], None)
        return losses_N

    def losses_and_gradients(
        self,
        x_ND: torch.Tensor,
        weight_VD: torch.Tensor,
        targets_N: torch.Tensor,
        vocab_size: int,
        scale_N: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        cast_VD, targets_N = weight_VD[:vocab_size].to(x_ND.dtype), targets_N.contiguous()
        scale_N = scale_N.float().contiguous()
        losses_N, grad_x_ND = torch.empty_like(scale_N), torch.empty_like(x_ND)
        grad_weight_VD = torch.zeros_like(weight_VD, dtype=torch.float32)
        buffer_CV = _buffer(x_ND, vocab_size)
        for part in _chunks(len(x_ND), len(buffer_CV)):
            x_CD = x_ND[part]
            z_CV = torch.mm(x_CD, cast_VD.T, out=buffer_CV[: len(x_CD)])
            losses_N[part] = softcapped_losses(z_CV, targets_N[part], scale_N[part])
            torch.mm(z_CV, cast_VD, out=grad_x_ND[part])  # z is its own gradient by now
            _add_product_(grad_weight_VD[:vocab_size], z_CV.T, x_CD)
        return losses_N, grad_x_ND, grad_weight_VD


def _add_product_(sum_VD: torch.Tensor, a_VC: torch.Tensor, b_CD: torch.Tensor) -> None:
    """Add a·b to an fp32 sum, which cuBLAS does inside the product of half-precision factors; torch's CPU does not.

    On CUDA, torch takes an output that is its own summand for an in-place sum: nothing is copied.
    """
    if a_VC.dtype == torch.float32:
        sum_VD.addmm_(a_VC, b_CD)
    elif sum_VD.device.type == "cpu":
        sum_VD += a_VC.float() @ b_CD.float()
    else:
        torch.addmm(sum_VD, a_VC, b_CD, out_dtype=torch.float32, out=sum_VD)


def _buffer(x_ND: torch.Tensor, vocab_size: int) -> torch.Tensor:
    """Uninitialised logits (C, vocab_size) of one chunk, in the dtype of x."""
    stride = round_up(vocab_size, _ROW_MULTIPLE)
    tokens = max(1, min(len(x_ND), CHUNK_BYTES // (stride * x_ND.dtype.itemsize)))
    return x_ND.new_empty(tokens, stride)[:, :vocab_size]


def _chunks(tokens: int, chunk: int) -> list[slice]:
    return [slice(start, min(start + chunk, tokens)) for start in range(0, tokens, chunk)]
