"""Linear layers whose three matrix products run in fp8, through torch's scaled matrix product.

    use_fp8(model); model.use_operations(GpuOperations(fp8=True))

Not run on a GPU; the same code runs on a CPU, where the tests compare it with products of what was rounded. Inputs and
weights are rounded to e4m3 (3 bits of mantissa), gradients to e5m2 (2 bits, wider range), each tensor with one factor
that maps its largest magnitude to the type's, computed anew every time. The public nanochat does the same.

Reason: tensor cores multiply fp8 twice as fast as bf16 (1,979 against 989 TFLOP/s on an H100, by its data sheet). What
this costs: a pass over each operand for its maximum and one to round it, which torch.compile fuses with what stands
before; and transposed copies in fp8, since the hardware wants both operands contiguous along the summed axis. Queries,
keys and values round the same input; compiled, that is one computation. It is no kernel of ours: cuBLAS multiplies.
"""

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable
from torch.nn.functional import ScalingType

from nanochat_ray.errors import UserError
from nanochat_ray.model.gpt import GPT, Linear

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
SIZE_MULTIPLE = 16  # of every axis of a product, which cuBLAS demands
MIN_SIZE = 128  # below this, rounding costs more than the product


def quantize(x: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """x rounded to an fp8 type after division by a factor, and that factor, an fp32 scalar."""
    largest = torch.finfo(dtype).max
    factor = x.abs().amax().float().clamp_min(torch.finfo(torch.float32).tiny * largest) / largest
    return (x.float() / factor).clamp(-largest, largest).to(dtype), factor


class _Fp8Linear(torch.autograd.Function):
    """x (N, I) · Wᵀ (I, O); keeps both operands in fp8."""

    @staticmethod
    def forward(ctx, x_NI, weight_OI):  # type: ignore[no-untyped-def,override]
        x8_NI, x_factor = quantize(x_NI, E4M3)
        weight8_OI, weight_factor = quantize(weight_OI, E4M3)
        ctx.save_for_backward(x8_NI, x_factor, weight8_OI, weight_factor)
        ctx.dtypes = x_NI.dtype, weight_OI.dtype
        return _product(x8_NI, weight8_OI.T, x_factor, weight_factor, x_NI.dtype, fast=True)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_NO):  # type: ignore[no-untyped-def,override]
        x8_NI, x_factor, weight8_OI, weight_factor = ctx.saved_tensors
        x_dtype, weight_dtype = ctx.dtypes
        grad8_NO, grad_factor = quantize(grad_NO, E5M2)
        grad_x_NI = _product(grad8_NO, _columns_contiguous(weight8_OI), grad_factor, weight_factor, x_dtype)
        grad_weight_OI = _product(
            grad8_NO.T.contiguous(), _columns_contiguous(x8_NI), grad_factor, x_factor, weight_dtype
        )
        return grad_x_NI, grad_weight_OI


def _product(
    a: torch.Tensor,
    b: torch.Tensor,
    a_factor: torch.Tensor,
    b_factor: torch.Tensor,
    dtype: torch.dtype,
    fast: bool = False,
) -> torch.Tensor:
    """a · b times both factors. `fast` sums in the tensor cores' own precision (about 22 bits on an H100)."""
    whole = ScalingType.TensorWise
    return F.scaled_mm(a, b, a_factor, whole, b_factor, whole, output_dtype=dtype, use_fast_accum=fast)


def _columns_contiguous(matrix: torch.Tensor) -> torch.Tensor:
    return matrix.T.contiguous().T


def fp8_linear(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """x·Wᵀ, (…, outputs), in the dtype of x; the gradient of the weight has the weight's dtype.

    Raises:
        UserError: the tokens are no multiple of 16; they are the summed axis of the weight's gradient.
    """
    x_NI = x.flatten(0, -2)
    if len(x_NI) % SIZE_MULTIPLE:
        raise UserError(
            f"fp8 training needs a multiple of {SIZE_MULTIPLE} tokens in a micro-batch, not {len(x_NI)}; "
            "change --micro-batch-rows, or train in bf16"
        )
    return _Fp8Linear.apply(x_NI, weight).unflatten(0, x.shape[:-1])


def takes_fp8(weight: torch.Tensor) -> bool:
    """Whether a layer's sizes allow and repay fp8."""
    return all(size % SIZE_MULTIPLE == 0 and size >= MIN_SIZE for size in weight.shape)


class Fp8Linear(Linear):
    """A `Linear` in fp8 while gradients are wanted; without, as in evaluation, it is the layer it was."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return fp8_linear(x, self.weight) if torch.is_grad_enabled() else super().forward(x)


def use_fp8(model: GPT) -> list[str]:
    """Put `Fp8Linear` in place of the layers' matrices that are large enough; parameters stay the same objects.

    The unembedding stays as it is: its loss multiplies by itself, and its gradients decide most. The first matrix of
    each MLP is multiplied by `model.operations`, which must know about fp8: `GpuOperations(fp8=True)`.

    Returns:
        Names of the modules that were replaced.
    """
    replaced = []
    for name, module in list(model.named_modules()):
        if name.startswith("transformer.h.") and isinstance(module, Linear) and takes_fp8(module.weight):
            parent, _, own = name.rpartition(".")
            with torch.device("meta"):
                layer = Fp8Linear(module.in_features, module.out_features)
            layer.weight = module.weight
            setattr(model.get_submodule(parent), own, layer)
            replaced.append(name)
    return replaced


def why_not_fp8(device: torch.device) -> str | None:
    """Why this device cannot multiply fp8, in words; None if it can."""
    if device.type != "cuda":
        return f"fp8 needs a GPU with tensor cores for it, this is {device.type}"
    capability: tuple[int, int] = torch.cuda.get_device_capability(device)
    if capability < (8, 9):
        return f"fp8 needs SM 8.9 or newer (H100, L4, B200), this is SM {capability[0]}.{capability[1]}"
    return None
