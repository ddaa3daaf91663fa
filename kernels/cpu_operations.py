"""What training on a CPU computes with: our kernels for everything between the matrix products, which are torch's."""

import torch

from kernels import cpu_embedding, cpu_layers, cpu_loss
from kernels.cpu_embedding import CpuEmbedding
from kernels.cpu_layers import CpuLayers
from kernels.cpu_loss import CpuLoss
from nanochat_ray.model.loss import linear_cross_entropy
from nanochat_ray.model.operations import Operations
from nanochat_ray.plan.shape import ModelShape


class CpuOperations(CpuLayers, CpuEmbedding, Operations):
    """Results as those of `Operations`, up to rounding."""

    def __init__(self) -> None:
        super().__init__()
        self._loss = CpuLoss()

    def linear_cross_entropy(
        self, x_ND: torch.Tensor, weight_VD: torch.Tensor, targets_N: torch.Tensor, vocab_size: int, reduction: str
    ) -> torch.Tensor:
        known = x_ND.dtype in cpu_loss.DTYPES
        if not known or any(tensor.device.type != "cpu" for tensor in (x_ND, weight_VD, targets_N)):
            return super().linear_cross_entropy(x_ND, weight_VD, targets_N, vocab_size, reduction)
        return linear_cross_entropy(x_ND, weight_VD, targets_N, vocab_size, reduction, self._loss)


def why_not(shape: ModelShape, dtype: torch.dtype) -> str | None:
    """Why such a model cannot be trained with our kernels on this machine, in words; None if it can. May compile."""
    return cpu_layers.why_not(shape, dtype) or cpu_embedding.why_not(shape, dtype) or cpu_loss.why_not(dtype)
