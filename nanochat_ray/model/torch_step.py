"""A `StepModel` of torch operations, for every device and machine; the CPU's fused step is `kernels/cpu_step.py`.

Not run on a GPU.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F

from nanochat_ray.model.gpt import GPT
from nanochat_ray.model.ragged import BLOCK, RaggedBatch, window_groups


@dataclass(frozen=True)
class _Rows:
    """Sequences of a step whose tokens attend together, padded to the longest.

    tokens     (S, T) indices into the step's tokens
    slots      (S, K) where in the blocks the keys are
    mask       (S, 1, T, K) which key each token sees
    """

    tokens_ST: torch.Tensor
    slots_SK: torch.Tensor
    mask_S1TK: torch.Tensor


class TorchStep:
    """A network and the blocks of its sequences.

    Args:
        context: positions a sequence may have; None: as many as in training.
    """

    def __init__(self, model: GPT, context: int | None = None) -> None:
        self.model = model
        self.vocab_size = model.config.vocab_size
        self.context = context or model.config.sequence_len
        self.groups = window_groups(model.config)
        self._place = {
            layer: (group, index)
            for group, of_group in enumerate(self.groups)
            for index, layer in enumerate(of_group.layers)
        }
        self._keys: list[torch.Tensor] = []  # per group (layers, slots, G, K)
        self._values: list[torch.Tensor] = []

    def block_bytes(self, group: int) -> int:
        """Memory of one block of a group, in bytes."""
        return 2 * len(self.groups[group].layers) * BLOCK * self.model.config.kv_width * self.model.dtype.itemsize

    def allocate(self, blocks: Sequence[int]) -> None:
        """Make room for so many blocks per group; whatever was stored is lost."""
        config = self.model.config
        shapes = [
            (len(group.layers), count * BLOCK, config.n_kv_head, config.head_size)
            for group, count in zip(self.groups, blocks, strict=True)
        ]
        self._keys = [torch.zeros(shape, dtype=self.model.dtype, device=self.model.device) for shape in shapes]
        self._values = [torch.zeros_like(keys) for keys in self._keys]

    @torch.inference_mode()
    def forward(self, batch: RaggedBatch) -> np.ndarray:
        """Soft-capped logits (R, vocab_size) in float32 after the wanted tokens."""
        new_slots = [self._tensor(_slots_of_tokens(batch, table)) for table in batch.tables]
        rows = [self._rows(batch, group) for group in range(len(self.groups))]

        def attend(
            layer: int, q_BTHK: torch.Tensor, k_BTGK: torch.Tensor, v_BTGK: torch.Tensor, window: int
        ) -> torch.Tensor:
            group, index = self._place[layer]
            keys, values = self._keys[group][index], self._values[group][index]
            keys[new_slots[group]], values[new_slots[group]] = k_BTGK[0], v_BTGK[0]
            y_BTHK = torch.empty_like(q_BTHK)
            for part in rows[group]:
                y_BTHK[0, part.tokens_ST] = _attend(q_BTHK[0, part.tokens_ST], keys, values, part)
            return y_BTHK

        ids, previous, positions = map(self._tensor, (batch.ids, batch.previous, batch.positions))
        rotary = self.model.rotary(self.context, self.model.device, self.model.dtype)
        x_ND = self.model.hidden_ragged(ids, previous, positions, rotary, attend)
        return self.model.logits(x_ND[self._tensor(batch.wanted)]).cpu().numpy()

    def _rows(self, batch: RaggedBatch, group: int) -> list[_Rows]:
        """Sequences with one token make one part; each with more makes a part of its own."""
        counts = np.diff(batch.starts)
        single = np.flatnonzero(counts == 1)
        parts = [single] if single.size else []
        parts += [np.array([sequence]) for sequence in np.flatnonzero(counts > 1)]
        return [self._part(batch, group, part) for part in parts]

    def _part(self, batch: RaggedBatch, group: int, sequences: np.ndarray) -> _Rows:
        window = self.groups[group].window
        tokens_ST = batch.starts[sequences][:, None] + np.arange(np.diff(batch.starts)[sequences[0]])
        positions_ST = batch.positions[tokens_ST]
        first_S1 = np.maximum(0, positions_ST[:, :1] - window)
        keys_SK = first_S1 + np.arange((positions_ST[:, -1:] - first_S1).max() + 1)
        inside_SK = np.minimum(keys_SK, positions_ST[:, -1:])  # padding reads some valid key, and is masked
        blocks_SK = np.take_along_axis(batch.tables[group][sequences], inside_SK // BLOCK, axis=1)
        query_ST1, key_S1K = positions_ST[:, :, None], keys_SK[:, None, :]
        mask_STK = (key_S1K <= query_ST1) & (key_S1K >= query_ST1 - window)
        return _Rows(
            self._tensor(tokens_ST),
            self._tensor(blocks_SK * BLOCK + inside_SK % BLOCK),
            torch.from_numpy(mask_STK).unsqueeze(1).to(self.model.device),
        )

    def _tensor(self, values: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(values.astype(np.int64)).to(self.model.device)


def _slots_of_tokens(batch: RaggedBatch, table: np.ndarray) -> np.ndarray:
    """(N,) where in a group's blocks each token's key and value go."""
    sequence_N = np.repeat(np.arange(len(batch.starts) - 1), np.diff(batch.starts))
    return table[sequence_N, batch.positions // BLOCK].astype(np.int64) * BLOCK + batch.positions % BLOCK


def _attend(q_STHK: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, rows: _Rows) -> torch.Tensor:
    k_SGKK, v_SGKK = keys[rows.slots_SK].transpose(1, 2), values[rows.slots_SK].transpose(1, 2)
    q_SHTK = q_STHK.transpose(1, 2)
    grouped = q_SHTK.shape[1] != k_SGKK.shape[1]
    y_SHTK = F.scaled_dot_product_attention(q_SHTK, k_SGKK, v_SGKK, attn_mask=rows.mask_S1TK, enable_gqa=grouped)
    return y_SHTK.transpose(1, 2)
