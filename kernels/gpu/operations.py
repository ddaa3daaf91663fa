"""The network's operations on an NVIDIA GPU: our kernels where they have a reason, torch's elsewhere.

    reason = why_not(device, dtype); model.use_operations(GpuOperations())

Not run on a GPU. Attention is torch's `varlen_attn` (see nanochat_ray/model/attention.py and flash.py), the plain norm
is torch's own fused one.
"""

import torch
import torch.nn.functional as F

from kernels.gpu.fp8_linear import fp8_linear, takes_fp8
from kernels.gpu.linear_cross_entropy import GpuLoss
from kernels.gpu.polar_express import polar_express
from kernels.gpu.rotated_norm import rotated_norm_of_rows
from kernels.gpu.squared_relu import linear_squared_relu, squared_relu
from nanochat_ray.model.attention import flash_attention
from nanochat_ray.model.loss import linear_cross_entropy
from nanochat_ray.model.operations import Operations

MIN_TILED_TOKENS = 2048  # with fewer, our product has too few tiles for the GPU, where cuBLAS splits the sums


class GpuOperations(Operations):
    """Results as those of `Operations`, up to rounding.

    Args:
        fp8: the first product of each MLP is one in fp8 while gradients are wanted; see `fp8_linear.use_fp8`.
    """

    def __init__(self, fp8: bool = False):
        self.fp8 = fp8

    def rotated_norm(
        self, x_BTHK: torch.Tensor, rotary: tuple[torch.Tensor, torch.Tensor], scale: float
    ) -> torch.Tensor:
        return rotated_norm_of_rows(x_BTHK, rotary, scale)

    def linear_squared_relu(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        if self.fp8 and torch.is_grad_enabled() and takes_fp8(weight):
            return squared_relu(fp8_linear(x, weight))
        if x.shape[:-1].numel() < MIN_TILED_TOKENS:
            return squared_relu(F.linear(x, weight.to(x.dtype)))
        return linear_squared_relu(x, weight)

    def attention(self, q_BTHK: torch.Tensor, k_BTGK: torch.Tensor, v_BTGK: torch.Tensor, window: int) -> torch.Tensor:
        return flash_attention(q_BTHK, k_BTGK, v_BTGK, window)

    def linear_cross_entropy(
        self, x_ND: torch.Tensor, weight_VD: torch.Tensor, targets_N: torch.Tensor, vocab_size: int, reduction: str
    ) -> torch.Tensor:
        return linear_cross_entropy(x_ND, weight_VD, targets_N, vocab_size, reduction, GpuLoss())

    def polar_express(self, x_KMN: torch.Tensor) -> torch.Tensor:
        return polar_express(x_KMN)


def why_not(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why this device cannot compute with `GpuOperations`, in words; None if it can."""
    if device.type != "cuda":
        return f"the GPU's kernels need CUDA, this is {device.type}"
    if dtype not in (torch.bfloat16, torch.float16):
        return f"the GPU's kernels are made for bf16 and fp16, not {dtype}"
    capability: tuple[int, int] = torch.cuda.get_device_capability(device)
    if capability < (8, 0):
        return f"the GPU's kernels need SM 8.0 or newer, this is SM {capability[0]}.{capability[1]}"
    return None
