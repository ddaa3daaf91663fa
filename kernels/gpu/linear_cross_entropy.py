"""Unembedding, softcap and cross-entropy in chunks of tokens: products by cuBLAS, all between them in one kernel.

Not run on a GPU. The reference is `nanochat_ray.model.loss.linear_cross_entropy`, whose contract this keeps.

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
from torch.autograd.function import once_differentiable

from nanochat_ray.errors import UsageError
from nanochat_ray.model.loss import IGNORED, SOFTCAP
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

    sums = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, vocab_size, BLOCK):
        inside = start + columns < vocab_size
        z = tl.load(z_ptr + start + columns, mask=inside, other=0.0).to(tl.float32)
        sigmoid = 1.0 / (1.0 + tl.exp(-2.0 / SOFTCAP * z))
        sums += tl.where(inside, tl.exp(2.0 * SOFTCAP * (sigmoid - 1.0)), 0.0)
    total = tl.sum(sums, axis=0)

    target_z = tl.load(z_ptr + target, mask=counted, other=0.0).to(tl.float32)
    target_sigmoid = 1.0 / (1.0 + tl.exp(-2.0 / SOFTCAP * target_z))
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


def linear_cross_entropy(
    x_ND: torch.Tensor, weight_VD: torch.Tensor, targets_N: torch.Tensor, vocab_size: int, reduction: str = "mean"
) -> torch.Tensor:
    """As `nanochat_ray.model.loss.linear_cross_entropy`: fp32, −1 ignored, an fp32 gradient for an fp32 weight."""
    if reduction not in ("mean", "sum", "none"):
        raise UsageError(f"reduction {reduction!r} is not one of mean, sum, none")
    targets_N = targets_N.contiguous()
    if reduction == "none":
        return _TokenLosses.apply(x_ND, weight_VD, targets_N, vocab_size)
    if torch.is_grad_enabled() and (x_ND.requires_grad or weight_VD.requires_grad):
        total = _SummedLoss.apply(x_ND, weight_VD, targets_N, vocab_size)
    else:
        total = _losses(x_ND, weight_VD, targets_N, vocab_size).sum()
    return total / (targets_N != IGNORED).sum() if reduction == "mean" else total


class _SummedLoss(torch.autograd.Function):
    """The sum of all losses; the gradients are ready when the forward pass ends."""

    @staticmethod
    def forward(ctx, x_ND, weight_VD, targets_N, vocab_size):  # type: ignore[no-untyped-def,override]
        scale_N = torch.ones(len(x_ND), dtype=torch.float32, device=x_ND.device)
        losses_N, *ctx.gradients = _losses_and_gradients(x_ND, weight_VD, targets_N, vocab_size, scale_N)
        return losses_N.sum()

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):  # type: ignore[no-untyped-def,override]
        if ctx.gradients is None:
            raise RuntimeError("a summed loss can be differentiated once: its gradients are scaled in place")
        (grad_x_ND, grad_weight_VD), ctx.gradients = ctx.gradients, None
        return grad_x_ND.mul_(grad), grad_weight_VD.mul_(grad), None, None


class _TokenLosses(torch.autograd.Function):
    """The loss of every token; gradients need the weight of each loss, so the backward pass starts from x again."""

    @staticmethod
    def forward(ctx, x_ND, weight_VD, targets_N, vocab_size):  # type: ignore[no-untyped-def,override]
        ctx.save_for_backward(x_ND, weight_VD, targets_N)
        ctx.vocab_size = vocab_size
        return _losses(x_ND, weight_VD, targets_N, vocab_size)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_N):  # type: ignore[no-untyped-def,override]
        x_ND, weight_VD, targets_N = ctx.saved_tensors
        gradients = _losses_and_gradients(x_ND, weight_VD, targets_N, ctx.vocab_size, grad_N.float().contiguous())[1:]
        return *gradients, None, None


def _losses(x_ND: torch.Tensor, weight_VD: torch.Tensor, targets_N: torch.Tensor, vocab_size: int) -> torch.Tensor:
    weight_VD = weight_VD[:vocab_size].to(x_ND.dtype)
    losses_N = torch.empty(len(x_ND), dtype=torch.float32, device=x_ND.device)
    buffer_CV = _buffer(x_ND, vocab_size)
    for part in _chunks(len(x_ND), len(buffer_CV)):
        z_CV = torch.mm(x_ND[part], weight_VD.T, out=buffer_CV[: part.stop - part.start])
        losses_N[part] = softcapped_losses(z_CV, targets_N[part], None)
    return losses_N


def _losses_and_gradients(
    x_ND: torch.Tensor, weight_VD: torch.Tensor, targets_N: torch.Tensor, vocab_size: int, scale_N: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Losses (N,) fp32, and the gradients of Σ scale·loss: for x in its dtype, for the weight in fp32."""
    cast_VD = weight_VD[:vocab_size].to(x_ND.dtype)
    losses_N, grad_x_ND = torch.empty_like(scale_N), torch.empty_like(x_ND)
    grad_weight_VD = torch.zeros_like(weight_VD, dtype=torch.float32)
    buffer_CV = _buffer(x_ND, vocab_size)
    for part in _chunks(len(x_ND), len(buffer_CV)):
        x_CD = x_ND[part]
        z_CV = torch.mm(x_CD, cast_VD.T, out=buffer_CV[: len(x_CD)])
        losses_N[part] = softcapped_losses(z_CV, targets_N[part], scale_N[part])  # from here on z is its own gradient
        torch.mm(z_CV, cast_VD, out=grad_x_ND[part])
        _add_product_(grad_weight_VD[:vocab_size], z_CV.T, x_CD)
    return losses_N, grad_x_ND, grad_weight_VD


def _add_product_(sum_VD: torch.Tensor, a_VC: torch.Tensor, b_CD: torch.Tensor) -> None:
    """Add a·b to an fp32 sum, which cuBLAS does inside the product of half-precision factors; torch's CPU does not."""
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
