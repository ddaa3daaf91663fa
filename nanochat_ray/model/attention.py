"""Rotary positions and causal attention with sliding windows, each computed where it is fastest.

A window w lets position i see the keys i−w … i. Grouped queries: head h reads key/value head h // (H / G).
"""

from typing import cast

import torch
import torch.nn.functional as F

from nanochat_ray.plan.shape import STANDARD_ROTARY_BASE


class RotaryTables:
    """Cosines and sines of the rotary angles; grown on demand, never stored with the weights.

    Angle of position t and channel pair c: t · base^(−2c/K) (arXiv:2104.09864).
    """

    def __init__(self, head_size: int, base: float = STANDARD_ROTARY_BASE):
        self._head_size = head_size
        self._base = base
        self._tables: tuple[torch.Tensor, torch.Tensor] | None = None

    def __call__(self, length: int, device: torch.device, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        """Cosines and sines of positions 0 … length−1, each (length, K/2)."""
        if (
            self._tables is None
            or len(self._tables[0]) < length
            or self._tables[0].device != device
            or self._tables[0].dtype != dtype
        ):
            self._tables = self._compute(max(length, 256), device, dtype)
        cos_SP, sin_SP = self._tables
        return cos_SP[:length], sin_SP[:length]

    def _compute(self, length: int, device: torch.device, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        length = 1 << (length - 1).bit_length()  # powers of two: a growing conversation rarely recomputes
        with torch.inference_mode(False):  # tables that inference made first must serve training, too
            return self._cosines_and_sines(length, device, dtype)

    def _cosines_and_sines(
        self, length: int, device: torch.device, dtype: torch.dtype
    ) -> tuple[torch.Tensor, torch.Tensor]:
        channels = torch.arange(0, self._head_size, 2, dtype=torch.float32, device=device)
        frequencies = self._base ** (-channels / self._head_size)
        angles = torch.outer(torch.arange(length, dtype=torch.float32, device=device), frequencies)
        return angles.cos().to(dtype), angles.sin().to(dtype)


def rotate(x_BTHK: torch.Tensor, cos_BTP: torch.Tensor, sin_BTP: torch.Tensor) -> torch.Tensor:
    """Turn each channel pair (c, c + K/2) by minus its angle. Tables are (T, K/2) or (B, T, K/2)."""
    cos, sin = cos_BTP.unsqueeze(-2), sin_BTP.unsqueeze(-2)
    first, second = x_BTHK.chunk(2, dim=-1)
    return torch.cat((first * cos + second * sin, second * cos - first * sin), dim=-1)


def causal_attention(q_BTHK: torch.Tensor, k_BTGK: torch.Tensor, v_BTGK: torch.Tensor, window: int) -> torch.Tensor:
    """Attention of positions 0 … T−1 to themselves, in the inputs' dtype; (B, T, H, K)."""
    if flash_reason(q_BTHK.device, q_BTHK.dtype)[0]:
        return flash_attention(q_BTHK, k_BTGK, v_BTGK, window)
    # torch's CPU attention kernel is faster in fp32 than in bf16, casts included: 4 to 9 times, forward and backward at
    # T = 512, on a CPU without bf16 units; not measured on one with them.
    dtype = torch.promote_types(q_BTHK.dtype, torch.float32) if q_BTHK.device.type == "cpu" else q_BTHK.dtype
    q_BHTK, k_BGTK, v_BGTK = (x.to(dtype).transpose(1, 2) for x in (q_BTHK, k_BTGK, v_BTGK))
    length = q_BTHK.shape[1]
    if window >= length - 1:
        y_BHTK = _sdpa(q_BHTK, k_BGTK, v_BGTK, causal=True)
    elif 0 < 2 * window <= length and length % window == 0:
        y_BHTK = _banded_attention(q_BHTK, k_BGTK, v_BGTK, window)
    else:
        y_BHTK = _sdpa(q_BHTK, k_BGTK, v_BGTK, mask=window_mask(length, length, window, q_BTHK.device))
    return y_BHTK.transpose(1, 2).to(q_BTHK.dtype)


def cached_attention(q_BTHK: torch.Tensor, k_BGSK: torch.Tensor, v_BGSK: torch.Tensor, window: int) -> torch.Tensor:
    """Attention of the last T of S positions to all of them; reads only the keys some window reaches; (B, T, H, K)."""
    length, keys = q_BTHK.shape[1], k_BGSK.shape[2]
    first = max(0, keys - length - window)
    k_BGSK, v_BGSK = k_BGSK[:, :, first:], v_BGSK[:, :, first:]
    keys -= first
    q_BHTK = q_BTHK.transpose(1, 2)
    mask = None if length == 1 else window_mask(length, keys, window, q_BTHK.device)
    return _sdpa(q_BHTK, k_BGSK, v_BGSK, mask=mask).transpose(1, 2)


def window_mask(queries: int, keys: int, window: int, device: torch.device) -> torch.Tensor:
    """bool (queries, keys), True where query i, which stands at keys − queries + i, may look."""
    position_Q1 = torch.arange(keys - queries, keys, device=device).unsqueeze(1)
    key_S = torch.arange(keys, device=device)
    return (key_S <= position_Q1) & (key_S >= position_Q1 - window)


def _sdpa(
    q_BHTK: torch.Tensor,
    k_BGSK: torch.Tensor,
    v_BGSK: torch.Tensor,
    mask: torch.Tensor | None = None,
    causal: bool = False,
) -> torch.Tensor:
    grouped = q_BHTK.shape[1] != k_BGSK.shape[1]
    return F.scaled_dot_product_attention(q_BHTK, k_BGSK, v_BGSK, attn_mask=mask, is_causal=causal, enable_gqa=grouped)


def _banded_attention(q_BHTK: torch.Tensor, k_BGTK: torch.Tensor, v_BGTK: torch.Tensor, window: int) -> torch.Tensor:
    """Blocks of `window` queries see their own block of keys and the one before; nothing else is computed.

    Work is T · 2w instead of T². Needs T to be a multiple of the window. The first block has none before it and is
    plain causal attention; the others differ only in their place, so they become rows of one batch.
    """
    rows, heads, length, head_size = q_BHTK.shape
    blocks = length // window
    first_BHWK = _sdpa(q_BHTK[:, :, :window], k_BGTK[:, :, :window], v_BGTK[:, :, :window], causal=True)

    def by_block(x_BHLK: torch.Tensor, size: int) -> torch.Tensor:
        x_BHJKL = x_BHLK.unfold(2, size, window)
        return x_BHJKL.permute(0, 2, 1, 4, 3).reshape(rows * (blocks - 1), -1, size, head_size)

    rest_RHWK = _sdpa(
        by_block(q_BHTK[:, :, window:], window),
        by_block(k_BGTK, 2 * window),
        by_block(v_BGTK, 2 * window),
        mask=window_mask(window, 2 * window, window, q_BHTK.device),
    )
    rest_BHTK = rest_RHWK.view(rows, blocks - 1, heads, window, head_size).transpose(1, 2).flatten(2, 3)
    return torch.cat((first_BHWK, rest_BHTK), dim=2)


def flash_reason(device: torch.device, dtype: torch.dtype) -> tuple[bool, str]:
    """Whether training attention runs through torch's variable-length flash kernel, and why or why not."""
    if device.type != "cuda":
        return False, f"SDPA: the flash kernel needs CUDA, this is {device.type}"
    if dtype not in (torch.bfloat16, torch.float16):
        return False, f"SDPA: the flash kernel needs bf16 or fp16, this is {dtype}"
    if torch.cuda.get_device_capability(device) < (8, 0):
        return False, "SDPA: the flash kernel needs an SM 8.0 GPU or newer"
    return True, "flash attention (torch.nn.attention.varlen)"


def flash_attention(q_BTHK: torch.Tensor, k_BTGK: torch.Tensor, v_BTGK: torch.Tensor, window: int) -> torch.Tensor:
    """The rows as equally long documents of one packed sequence. Written from its documentation, not run on a GPU."""
    from torch.nn.attention.varlen import varlen_attn

    rows, length, heads, _ = q_BTHK.shape
    starts = torch.arange(0, (rows + 1) * length, length, dtype=torch.int32, device=q_BTHK.device)
    left = window if window < length - 1 else -1
    y_NHK = cast(
        torch.Tensor,
        varlen_attn(
            q_BTHK.flatten(0, 1),
            k_BTGK.flatten(0, 1),
            v_BTGK.flatten(0, 1),
            starts,
            starts,
            length,
            length,
            window_size=(left, 0),
            enable_gqa=heads != k_BTGK.shape[2],
        ),
    )
    return y_NHK.view_as(q_BTHK)
