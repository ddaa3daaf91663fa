"""The operations of the network that a device may have a better way to do than torch: the plain ones, and their seam.

A `GPT` computes with `model.operations`, which are `Operations()` until `use_operations` is called: these here, of
torch, on every device and differentiable by autograd. They are the reference: what `kernels/` puts in their place is a
subclass that overrides some, and is tested against them. `kernels/dispatch.py` chooses.
"""

import torch
import torch.nn.functional as F

from nanochat_ray.model.attention import causal_attention, rotate
from nanochat_ray.model.loss import linear_cross_entropy
from nanochat_ray.model.updates import polar_express


class Operations:
    """Pure functions of tensors; results have the dtype of their first argument unless said otherwise."""

    def embedding(self, ids: torch.Tensor, weight_VD: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """Rows of a table, (*ids, D) in `dtype`."""
        return F.embedding(ids, weight_VD).to(dtype)

    def norm(self, x: torch.Tensor) -> torch.Tensor:
        """RMS norm over the last axis, without weights."""
        return F.rms_norm(x, (x.shape[-1],))

    def mixed_norm(
        self,
        x: torch.Tensor,
        y: torch.Tensor,
        x_weight: torch.Tensor | None = None,
        y_weight: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """x_weight·x + y_weight·y and its norm; weights are scalars of any dtype, None is 1."""
        mix = (x if x_weight is None else x_weight * x) + (y if y_weight is None else y_weight * y)
        return mix, self.norm(mix)

    def rotated_norm(
        self, x_BTHK: torch.Tensor, rotary: tuple[torch.Tensor, torch.Tensor], scale: float
    ) -> torch.Tensor:
        """Queries or keys (B, T, heads, K), turned by their positions, RMS-normed per head, times `scale`.

        Args:
            rotary: cosines and sines, each (T, K/2) or (B, T, K/2).
        """
        return scale * self.norm(rotate(x_BTHK, *rotary))

    def linear_squared_relu(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """relu(x·Wᵀ)², (…, outputs); the weight is cast to the dtype of x."""
        return F.relu(F.linear(x, weight.to(x.dtype))).square()

    def attention(self, q_BTHK: torch.Tensor, k_BTGK: torch.Tensor, v_BTGK: torch.Tensor, window: int) -> torch.Tensor:
        """Causal attention of whole rows: position i sees i−window … i; (B, T, H, K)."""
        return causal_attention(q_BTHK, k_BTGK, v_BTGK, window)

    def linear_cross_entropy(
        self, x_ND: torch.Tensor, weight_VD: torch.Tensor, targets_N: torch.Tensor, vocab_size: int, reduction: str
    ) -> torch.Tensor:
        """Cross-entropy of softcap(x·Wᵀ); see `nanochat_ray.model.loss`."""
        return linear_cross_entropy(x_ND, weight_VD, targets_N, vocab_size, reduction)

    def polar_express(self, x_KMN: torch.Tensor) -> torch.Tensor:
        """Nearly the nearest semi-orthogonal matrices, for the optimizer; see `nanochat_ray.model.updates`."""
        return polar_express(x_KMN)
