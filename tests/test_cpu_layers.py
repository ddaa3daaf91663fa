import os
import platform
from collections.abc import Callable
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels.cpu_layers import CpuLayers, _by_token, why_not
from nanochat_ray.model.attention import RotaryTables, window_mask
from nanochat_ray.model.gpt import GPT, GPTConfig
from nanochat_ray.model.operations import Operations

FP32, BF16, FP64 = torch.float32, torch.bfloat16, torch.float64
# Short windows of 128 positions, grouped heads, every extra of the network.
SHAPE = GPTConfig(sequence_len=512, vocab_size=90, n_layer=3, n_head=4, n_kv_head=2, n_embd=128, window_pattern="SSL")
OTHER_MACHINES = [
    pytest.param(("-DPORTABLE",), id="portable"),
    pytest.param(
        ("-march=x86-64-v3",),
        id="avx2",
        marks=pytest.mark.skipif(platform.machine() != "x86_64", reason="code for x86"),
    ),
    pytest.param(
        ("-mno-avx512bf16",), id="fp32", marks=pytest.mark.skipif(platform.machine() != "x86_64", reason="code for x86")
    ),
]


class Exact(Operations):
    """The plain operations in fp64, with the ε that torch's norm takes for fp32 and bf16."""

    def norm(self, x: torch.Tensor) -> torch.Tensor:
        return F.rms_norm(x, (x.shape[-1],), eps=torch.finfo(FP32).eps)


class InDtype(Operations):
    """The plain operations, but attention in the dtype of its inputs: the plain one computes bf16's in fp32."""

    def attention(self, q_BTHK: torch.Tensor, k_BTGK: torch.Tensor, v_BTGK: torch.Tensor, window: int) -> torch.Tensor:
        mask = window_mask(q_BTHK.shape[1], q_BTHK.shape[1], window, q_BTHK.device)
        heads = (x.transpose(1, 2) for x in (q_BTHK, k_BTGK, v_BTGK))
        return F.scaled_dot_product_attention(*heads, attn_mask=mask, enable_gqa=True).transpose(1, 2)


PLAIN, OWN, EXACT, IN_DTYPE = Operations(), CpuLayers(), Exact(), InDtype()
Results = list[torch.Tensor]
Case = tuple[Callable[..., torch.Tensor], Results]  # of the operations and tensors; and the tensors, in fp64

if reason := why_not(SHAPE, FP32):
    assert not os.environ.get("CI"), f"no CPU kernels here: {reason}; CI must not skip what needs them"
    pytest.skip(f"no CPU kernels here: {reason}", allow_module_level=True)


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    """Numbers that bf16 has exactly, in fp64: every dtype computes with the same."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=FP32).to(BF16).to(FP64)


def attention(operations: Operations, window: int) -> Callable[..., torch.Tensor]:
    return lambda q, k, v: operations.attention(q, k, v, window)


def turning(tokens: int, half: int) -> Results:
    """Cosines and sines, as bf16 has them."""
    return [x.double() for x in RotaryTables(2 * half)(tokens, torch.device("cpu"), BF16)]


def cases(operations: Operations) -> dict[str, Case]:
    """Each operation at sizes that fill no piece or tile; the results of one are stacked where it has two."""

    def mixed(x: torch.Tensor, y: torch.Tensor, *weights: torch.Tensor) -> torch.Tensor:
        weighted = [weight.reshape(()) for weight in weights]
        return torch.stack(operations.mixed_norm(x, y, *weighted))

    def rotated(x: torch.Tensor, cosines: torch.Tensor, sines: torch.Tensor) -> torch.Tensor:
        return operations.rotated_norm(x, (cosines.detach(), sines.detach()), 1.2)

    x, y = normal(3, 37, 112), normal(3, 37, 112, seed=1)
    q, k, v = normal(2, 101, 6, 48), normal(2, 101, 2, 48, seed=1), normal(2, 101, 2, 48, seed=2)
    heads = normal(2, 33, 3, 64)
    return {
        "norm": (operations.norm, [x]),
        "norm of something small": (operations.norm, [x * 2.0**-12]),
        "mixed norm": (mixed, [x, y]),
        "mixed norm with weights": (mixed, [x, y, torch.tensor([1.25]).double(), torch.tensor([0.3125]).double()]),
        "only the norm of a mix": (lambda x, y: operations.mixed_norm(x, y)[1], [x, y]),
        "only the mix": (lambda x, y: operations.mixed_norm(x, y)[0], [x, y]),
        "rotated norm": (rotated, [heads, *turning(33, 32)]),
        "rotated norm by row": (rotated, [heads, *(x.unflatten(0, (2, 33)) for x in turning(66, 32))]),
        "squared ReLU": (operations.linear_squared_relu, [x, normal(80, 112, seed=2) / 8]),
        "full attention": (attention(operations, 1000), [q, k, v]),
        "attention with a window": (attention(operations, 23), [q, k, v]),
        "attention to the own position": (attention(operations, 0), [q, k, v]),
    }


NAMES = list(cases(PLAIN))


def run(case: Case, dtype: torch.dtype) -> Results:
    """The result and the gradient of each tensor, for a fixed random gradient of the result."""
    function, tensors = case
    leaves = [tensor.to(dtype).requires_grad_() for tensor in tensors]
    result = function(*leaves)
    result.backward(normal(*result.shape, seed=7).to(dtype))
    return [result.detach(), *(leaf.grad for leaf in leaves if leaf.grad is not None)]


def errors(got: Results, exact: Results) -> list[float]:
    """Relative, in the Euclidean norm; absolute where the exact result is zero."""
    assert len(got) == len(exact)
    return [
        ((a.double() - b).norm() / b.norm().clamp(min=1e-30 if b.norm() > 1e-9 else 1.0)).item()
        for a, b in zip(got, exact, strict=True)
    ]


@pytest.mark.parametrize("name", NAMES)
def test_in_fp32_results_and_gradients_are_exact_but_for_rounding(name):
    exact = run(cases(EXACT)[name], FP64)
    own, plain = (errors(run(cases(operations)[name], FP32), exact) for operations in (OWN, PLAIN))
    for ours, theirs in zip(own, plain, strict=True):
        assert ours <= max(4 * theirs, 1e-6)


@pytest.mark.parametrize("name", NAMES)
def test_in_bf16_results_and_gradients_are_no_worse_than_torchs(name):
    exact = run(cases(EXACT)[name], FP64)
    own, plain = (errors(run(cases(operations)[name], BF16), exact) for operations in (OWN, IN_DTYPE))
    for ours, theirs in zip(own, plain, strict=True):
        assert ours <= max(1.05 * theirs, 0.0018)  # rounding of the result itself: 0.0017


@settings(max_examples=40)
@given(
    rows=st.integers(1, 2),
    length=st.integers(1, 90),
    kv_heads=st.integers(1, 2),
    group=st.integers(1, 3),
    size=st.sampled_from([16, 32, 48, 80]),
    window=st.integers(0, 100),
    dtype=st.sampled_from([FP32, BF16]),
)
def test_attention_of_any_shape_is_that_of_the_plain_operation(rows, length, kv_heads, group, size, window, dtype):
    q = normal(rows, length, kv_heads * group, size)
    k, v = normal(2, rows, length, kv_heads, size, seed=1)
    own, exact = (attention(operations, window) for operations in (OWN, PLAIN))
    bound = 2e-6 if dtype == FP32 else 0.01
    for a, b in zip(run((own, [q, k, v]), dtype), run((exact, [q, k, v]), FP64), strict=True):
        scale = max(b.norm().item(), b.numel() ** 0.5)  # where one weight is nearly 1, gradients of scores vanish
        assert (a.double() - b).norm() < bound * scale


def test_long_rows_are_attended_to_in_blocks():
    tensors = [normal(1, 700, 1, 32, seed=seed) for seed in range(3)]
    for window in (130, 400, 10_000):
        own, exact = (run((attention(operations, window), tensors), FP32) for operations in (OWN, PLAIN))
        assert max(errors(own, [x.double() for x in exact])) < 2e-6


@pytest.mark.parametrize("name", NAMES)
def test_views_are_read_as_they_lie(name):
    function, tensors = cases(OWN)[name]
    views = [torch.stack((t, t.flip(0)), dim=-1).unbind(-1)[0] for t in tensors]  # every second number of memory
    assert not any(view.is_contiguous() for view in views if view.numel() > 1)
    for own, expected in zip(run((function, views), BF16), run((function, tensors), BF16), strict=True):
        assert torch.equal(own, expected)


def test_heads_of_one_wider_product_are_read_without_a_copy():
    both = normal(2, 40, 3 * 64).to(BF16)
    q, k, v = (part.unflatten(-1, (2, 32)) for part in both.chunk(3, dim=-1))
    expected = OWN.attention(q.contiguous(), k.contiguous(), v.contiguous(), 20)
    assert torch.equal(OWN.attention(q, k, v, 20), expected)
    assert all(_by_token(part).data_ptr() == part.data_ptr() for part in (q, k, v))


@pytest.mark.parametrize(("rows", "length"), [(4, 1), (1, 4), (1, 1), (3, 5)])
def test_views_with_time_first_are_read_as_they_lie(rows, length):
    q, k, v = (normal(length, rows, 2, 32, seed=seed).transpose(0, 1) for seed in range(3))
    tables = normal(2, length, 16).float().unbind()
    for function, tensors in (
        (lambda o, q, k, v: o.attention(q, k, v, 5), [q, k, v]),
        (lambda o, q: o.rotated_norm(q, tables, 1.2), [q]),
    ):
        own, plain = (run((partial(function, o), tensors), FP32) for o in (OWN, PLAIN))
        for a, b in zip(own, plain, strict=True):
            torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)


def test_shapes_that_torch_broadcasts_are_left_to_it():
    x = normal(2, 5, 2, 32).float()
    one, tables = x[:, :, :1], normal(2, 1, 16).float().unbind()
    assert torch.equal(OWN.rotated_norm(x, tables, 1.2), PLAIN.rotated_norm(x, tables, 1.2))
    for k, v in ((x, one), (one, x), (x[:1], x[:1])):
        assert torch.equal(OWN.attention(x, k, v, 5), PLAIN.attention(x, k, v, 5))


def test_torchs_default_dtype_changes_nothing():
    expected = {name: run(cases(OWN)[name], BF16) for name in NAMES}
    torch.set_default_dtype(FP64)
    try:
        results = {name: run(cases(OWN)[name], BF16) for name in NAMES}
    finally:
        torch.set_default_dtype(FP32)
    for name in NAMES:
        assert all(torch.equal(a, b) for a, b in zip(results[name], expected[name], strict=True)), name


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("name", NAMES)
def test_without_gradients_the_results_are_the_same(name, mode):
    function, tensors = cases(OWN)[name]
    expected = run((function, tensors), BF16)[0]
    with mode():
        assert torch.equal(function(*(tensor.to(BF16) for tensor in tensors)), expected)


def test_what_it_does_not_know_is_left_to_the_plain_operations():
    x, heads = normal(2, 9, 24), normal(2, 9, 2, 24)
    assert torch.equal(OWN.norm(x.float()), PLAIN.norm(x.float()))  # no multiple of 16
    assert torch.equal(OWN.attention(heads, heads, heads, 5), PLAIN.attention(heads, heads, heads, 5))  # fp64
    mixed = OWN.mixed_norm(x.to(BF16), x.float())  # two dtypes
    assert torch.equal(mixed[0], PLAIN.mixed_norm(x.to(BF16), x.float())[0])
    tables = normal(2, 9, 12).float().unbind()
    assert torch.equal(OWN.rotated_norm(heads.float(), tables, 1.0), PLAIN.rotated_norm(heads.float(), tables, 1.0))


def test_a_head_size_it_cannot_compute_is_told():
    assert "multiple of 16, not 24" in (why_not(GPTConfig(64, 90, 1, 1, 1, 24, "L"), FP32) or "")
    assert "float16" in (why_not(SHAPE, torch.float16) or "")
    assert why_not(SHAPE, BF16) is None


def lively_model(operations: Operations, dtype: torch.dtype) -> GPT:
    """Nothing is zero, so every part shows in the loss."""
    model = GPT(SHAPE)
    model.init_weights(0)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    return (model.double() if dtype == FP64 else model).set_dtype(dtype).use_operations(operations)


def gradients(model: GPT, length: int = 165) -> dict[str, torch.Tensor]:
    ids = torch.randint(0, 90, (2, length + 1), generator=torch.Generator().manual_seed(2))
    model(ids[:, :-1], ids[:, 1:], reduction="sum").backward()
    return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}


def worst(got: dict[str, torch.Tensor], exact: dict[str, torch.Tensor]) -> float:
    return max(errors([got[name] for name in exact], [gradient.double() for gradient in exact.values()]))


def test_every_gradient_of_a_network_is_that_of_the_plain_one():
    plain = gradients(lively_model(PLAIN, FP32))
    assert worst(gradients(lively_model(OWN, FP32)), plain) < 2e-5
    del plain["smear_lambda"]  # the plain operation in both; in bf16 its sum over all tokens cancels
    own, torchs = (worst(gradients(lively_model(operations, BF16)), plain) for operations in (OWN, PLAIN))
    assert own < 1.1 * torchs


def test_the_number_of_threads_changes_no_bit(monkeypatch):
    def results() -> Results:
        tensors = [tensor for name in NAMES for tensor in run(cases(OWN)[name], BF16)]
        return tensors + list(gradients(lively_model(OWN, BF16)).values())

    alone = results()
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)  # ours; torch's own products may well depend on theirs
    for one, three in zip(alone, results(), strict=True):
        assert torch.equal(one, three)


@pytest.mark.slow
@pytest.mark.parametrize("flags", OTHER_MACHINES)
def test_other_machines_get_the_same_figures(flags):
    other = CpuLayers(flags)
    for name in NAMES:
        for dtype, bound in ((FP32, 1e-6), (BF16, 0.0018)):
            exact = run(cases(EXACT)[name], FP64)
            theirs, ours = (errors(run(cases(operations)[name], dtype), exact) for operations in (other, OWN))
            for there, here in zip(theirs, ours, strict=True):
                assert there <= max(1.5 * here, bound), name
