"""What training on a CPU computes with: our kernels where they are faster than torch."""

import torch

from nanochat_ray.model.operations import Operations
from nanochat_ray.plan.shape import ModelShape


class CpuOperations(Operations):
    """Torch's operations, but for those that a kernel does faster."""


def why_not(shape: ModelShape, dtype: torch.dtype) -> str | None:
    """Why such a model cannot be trained with our kernels on this machine, in words; None if it can."""
    return "there is no kernel for training on a CPU yet"
