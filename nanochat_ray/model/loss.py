"""Unembedding, softcap and cross-entropy in chunks of tokens, so that the logits of a batch never exist at once."""

import torch
import torch.nn.functional as F

from nanochat_ray.plan.shape import LOSS_CHUNK_TOKENS

SOFTCAP = 15.0
IGNORED = -1


def softcap(z: torch.Tensor) -> torch.Tensor:
    """15·tanh(z/15): bounds fp32 logits smoothly."""
    return SOFTCAP * torch.tanh(z / SOFTCAP)


def linear_cross_entropy(
    x_ND: torch.Tensor, weight_VD: torch.Tensor, targets_N: torch.Tensor, vocab_size: int, reduction: str = "mean"
) -> torch.Tensor:
    logits = softcap(F.linear(x_ND, weight_VD.to(x_ND.dtype))[:, :vocab_size].float())
    return F.cross_entropy(logits, targets_N, ignore_index=IGNORED, reduction=reduction)
