"""What the network keeps of the positions it has read, so that reading on costs only the new ones."""

import torch

from nanochat_ray.errors import UserError
from nanochat_ray.model.attention import cached_attention, causal_attention


class Cache:
    """Keys and values of every layer for rows of equal length.

    The network asks only for `positions` and `attend`, so rows of different lengths or paged storage can come as
    another class with these methods.

    Attributes:
        length: positions read so far, the same in every row.
        previous_BD: the normed, not yet smeared embedding of the last position; zero before the first.
    """

    def __init__(
        self,
        layers: int,
        rows: int,
        max_len: int,
        kv_heads: int,
        head_size: int,
        width: int,
        dtype: torch.dtype,
        device: torch.device,
    ):
        shape = (layers, rows, kv_heads, max_len, head_size)
        self._keys_LBGSK = torch.zeros(shape, dtype=dtype, device=device)
        self._values_LBGSK = torch.zeros(shape, dtype=dtype, device=device)
        self.previous_BD = torch.zeros(rows, width, dtype=dtype, device=device)
        self.max_len = max_len
        self.length = 0

    def positions(self, count: int) -> slice:
        """Where the next `count` positions stand.

        Raises:
            UserError: there is no room for them.
        """
        if self.length + count > self.max_len:
            raise UserError(
                f"{self.length} tokens and {count} more do not fit a cache of {self.max_len}; shorten the text"
            )
        return slice(self.length, self.length + count)

    def attend(
        self, layer: int, q_BTHK: torch.Tensor, k_BTGK: torch.Tensor, v_BTGK: torch.Tensor, window: int
    ) -> torch.Tensor:
        """Store the new keys and values of a layer and attend to all within the window; (B, T, H, K)."""
        new = self.positions(q_BTHK.shape[1])
        keys_BGSK, values_BGSK = self._keys_LBGSK[layer], self._values_LBGSK[layer]
        keys_BGSK[:, :, new] = k_BTGK.transpose(1, 2)
        values_BGSK[:, :, new] = v_BTGK.transpose(1, 2)
        if new.start == 0 and new.stop > 1:
            return causal_attention(q_BTHK, k_BTGK, v_BTGK, window)
        return cached_attention(q_BTHK, keys_BGSK[:, :, : new.stop], values_BGSK[:, :, : new.stop], window)

    def advance(self, count: int, previous_BD: torch.Tensor) -> None:
        """All layers have read `count` more positions, the last of which embeds as `previous_BD`."""
        self.length += count
        self.previous_BD = previous_BD
