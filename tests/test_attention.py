import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from nanochat_ray.model import attention
from nanochat_ray.model.attention import RotaryTables, cached_attention, causal_attention, rotate, window_mask
from tests import reference_model

CPU = torch.device("cpu")


def random_qkv(rows, length, heads, kv_heads, size, seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(rows, length, n, size, generator=generator).to(dtype) for n in (heads, kv_heads, kv_heads)]


@pytest.mark.parametrize(("window", "kv_heads"), [(0, 4), (1, 2), (4, 1), (4, 4), (7, 2), (11, 1), (100, 2)])
def test_attention_agrees_with_the_position_by_position_reference(window, kv_heads):
    q, k, v = random_qkv(2, 12, 4, kv_heads, 8)
    y = causal_attention(q, k, v, window)
    for row in range(2):
        expected = reference_model.attend(q[row], k[row], v[row], window)
        torch.testing.assert_close(y[row], expected, atol=2e-6, rtol=1e-5)


@given(
    blocks=st.integers(2, 5),
    window=st.integers(1, 9),
    rows=st.integers(1, 3),
    kv_heads=st.sampled_from([1, 2, 4]),
    seed=st.integers(0, 100),
)
def test_banded_attention_and_its_gradients_equal_masked_attention(blocks, window, rows, kv_heads, seed):
    inputs = [x.requires_grad_() for x in random_qkv(rows, blocks * window, 4, kv_heads, 4, seed)]
    q, k, v = (x.transpose(1, 2) for x in inputs)
    banded = attention._banded_attention(q, k, v, window)
    mask = window_mask(blocks * window, blocks * window, window, CPU)
    masked = attention._sdpa(q, k, v, mask=mask)
    torch.testing.assert_close(banded, masked, atol=1e-5, rtol=1e-4)
    direction = torch.randn(banded.shape, generator=torch.Generator().manual_seed(seed))
    for a, b in zip(
        torch.autograd.grad(banded, inputs, direction), torch.autograd.grad(masked, inputs, direction), strict=True
    ):
        torch.testing.assert_close(a, b, atol=2e-5, rtol=1e-4)


def test_a_sliding_window_layer_does_not_compute_far_blocks(monkeypatch):
    seen = []
    sdpa = attention._sdpa
    monkeypatch.setattr(attention, "_sdpa", lambda q, k, v, **rest: seen.append((q, k)) or sdpa(q, k, v, **rest))
    causal_attention(*random_qkv(1, 64, 2, 2, 4), window=8)
    scores = sum(q.shape[0] * q.shape[1] * q.shape[2] * k.shape[2] for q, k in seen)
    assert scores <= 2 * 64 * 16  # heads · positions · two windows, where all pairs would be 2 · 64 · 64


@given(keys=st.integers(1, 20), new=st.integers(1, 20), window=st.integers(0, 25), kv_heads=st.sampled_from([1, 2]))
def test_cached_attention_is_the_end_of_attention_over_everything(keys, new, window, kv_heads):
    new = min(new, keys)
    q, k, v = random_qkv(2, keys, 2, kv_heads, 4)
    whole = causal_attention(q, k, v, window)
    last = cached_attention(q[:, -new:], k.transpose(1, 2), v.transpose(1, 2), window)
    torch.testing.assert_close(last, whole[:, -new:], atol=1e-5, rtol=1e-4)


def test_decoding_reads_only_the_keys_of_the_window(monkeypatch):
    seen = []
    sdpa = attention._sdpa
    monkeypatch.setattr(attention, "_sdpa", lambda q, k, v, **rest: seen.append(k.shape[2]) or sdpa(q, k, v, **rest))
    q, k, v = random_qkv(1, 100, 2, 2, 4)
    cached_attention(q[:, -1:], k.transpose(1, 2), v.transpose(1, 2), window=16)
    assert seen == [17]


def test_bf16_attention_stays_near_fp32():
    q, k, v = random_qkv(1, 32, 2, 2, 8, dtype=torch.bfloat16)
    y = causal_attention(q, k, v, window=8)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.float(), causal_attention(q.float(), k.float(), v.float(), 8), atol=1e-2, rtol=1e-2)


def test_rotation_turns_each_pair_of_channels_backwards():
    x = torch.randn(1, 5, 1, 6)
    cos, sin = RotaryTables(6)(5, CPU, torch.float32)
    turned = rotate(x, cos, sin)
    for t in range(5):
        torch.testing.assert_close(turned[0, t, 0], reference_model.rotate(x[0, t, 0], t), atol=1e-5, rtol=1e-5)


def test_rotary_tables_grow_and_keep_their_beginning():
    tables = RotaryTables(8)
    short, _ = tables(10, CPU, torch.float32)
    long, _ = tables(1000, CPU, torch.float32)
    assert long.shape == (1000, 4)
    assert torch.equal(long[:10], short)
    assert tables(10, CPU, torch.bfloat16)[0].dtype == torch.bfloat16


def test_the_flash_kernel_needs_cuda_and_says_so():
    assert attention.flash_reason(CPU, torch.bfloat16) == (False, "SDPA: the flash kernel needs CUDA, this is cpu")
