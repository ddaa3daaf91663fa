"""Layers in fp8: the products of what was rounded, on a CPU, through the operation that GPUs use."""

import pytest
import torch

from kernels.gpu.fp8_linear import E4M3, E5M2, Fp8Linear, fp8_linear, quantize, use_fp8, why_not_fp8
from nanochat_ray.errors import UserError
from nanochat_ray.model.gpt import GPT, GPTConfig, Linear

# Half a unit in the last place, relative to the number: 3 and 2 bits of mantissa.
ROUNDING = {E4M3: 2**-4, E5M2: 2**-3}


def example(tokens=32, inputs=48, outputs=64, dtype=torch.bfloat16):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(tokens, inputs, generator=generator).to(dtype).requires_grad_()
    weight = (0.02 * torch.randn(outputs, inputs, generator=generator)).requires_grad_()
    incoming = (1e-6 * torch.randn(tokens, outputs, generator=generator)).to(dtype)
    return x, weight, incoming


def rounded(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    numbers, factor = quantize(x, dtype)
    return numbers.double() * factor.double()


@pytest.mark.parametrize("dtype", [E4M3, E5M2])
@pytest.mark.parametrize("size", [1e-30, 1e-3, 1.0, 1e30])
def test_a_tensor_of_any_size_is_rounded_relative_to_its_largest_element(dtype, size):
    x = size * torch.randn(40, 30, generator=torch.Generator().manual_seed(1))
    error = (rounded(x, dtype) - x).abs()
    smallest = x.abs().max() / torch.finfo(dtype).max * torch.finfo(dtype).tiny  # below, steps are equal
    assert (error <= ROUNDING[dtype] * x.abs().clamp(min=smallest) * 1.0001).all()
    assert rounded(x, dtype).abs().max().item() == pytest.approx(x.abs().max().item(), rel=1e-6)


def test_zeros_stay_zeros_and_what_is_no_number_is_not_hidden():
    assert not rounded(torch.zeros(4, 4), E4M3).any()
    assert rounded(torch.tensor([1.0, torch.nan]), E4M3).isnan().any()
    assert rounded(torch.tensor([1.0, torch.inf]), E5M2).isnan().any()


def test_forward_and_backward_are_products_of_rounded_factors():
    x, weight, incoming = example()
    y = fp8_linear(x, weight)
    grad_x, grad_weight = torch.autograd.grad(y, (x, weight), incoming)
    x8, weight8, incoming8 = rounded(x.detach(), E4M3), rounded(weight.detach(), E4M3), rounded(incoming, E5M2)
    for found, expected, tolerance in (
        (y, x8 @ weight8.T, 2**-8),  # bf16
        (grad_x, incoming8 @ weight8, 2**-8),
        (grad_weight, incoming8.T @ x8, 1e-5),  # fp32
    ):
        assert (found.double() - expected).abs().max() <= tolerance * expected.abs().max()
    assert (y.dtype, grad_x.dtype, grad_weight.dtype) == (torch.bfloat16, torch.bfloat16, torch.float32)


def test_the_cost_in_exactness_is_that_of_the_formats():
    x, weight, incoming = example(256, 256, 256)
    y = fp8_linear(x, weight)
    grad_x, grad_weight = torch.autograd.grad(y, (x, weight), incoming)
    exact_x, exact_weight = x.detach().double().requires_grad_(), weight.detach().double().requires_grad_()
    exact = exact_x @ exact_weight.T
    gradients = torch.autograd.grad(exact, (exact_x, exact_weight), incoming.double())
    for found, expected, seen in ((y, exact, 0.037), (grad_x, gradients[0], 0.06), (grad_weight, gradients[1], 0.06)):
        assert (found.double() - expected).norm() / expected.norm() <= 1.1 * seen


def test_leading_axes_are_kept_and_odd_numbers_of_tokens_are_refused_with_words():
    x, weight, _ = example(32)
    assert fp8_linear(x.view(4, 8, 48), weight).shape == (4, 8, 64)
    with pytest.raises(UserError, match="multiple of 16 tokens in a micro-batch, not 30; change --micro-batch-rows"):
        fp8_linear(x[:30], weight)


@pytest.mark.slow
def test_torch_compile_sees_through_it():
    x, weight, incoming = example()
    eager = torch.autograd.grad(fp8_linear(x, weight), (x, weight), incoming)
    compiled = torch.compile(fp8_linear, backend="aot_eager", fullgraph=True)
    for found, expected in zip(torch.autograd.grad(compiled(x, weight), (x, weight), incoming), eager, strict=True):
        assert torch.equal(found, expected)


def network() -> GPT:
    model = GPT(GPTConfig(16, 300, n_layer=2, n_head=2, n_kv_head=1, n_embd=128, window_pattern="L"))
    model.init_weights(0)
    return model


def test_large_matrices_of_the_layers_are_replaced_and_parameters_stay_the_same_objects():
    model = network()
    before = dict(model.named_parameters())
    replaced = use_fp8(model)
    assert set(replaced) == {
        f"transformer.h.{layer}.{name}"
        for layer in (0, 1)
        for name in ("attn.c_q", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
    }  # keys and values have 64 columns here, gates fewer
    after = dict(model.named_parameters())
    assert list(before) == list(after)
    assert all(before[name] is after[name] for name in before)
    assert type(model.lm_head) is Linear
    assert all(isinstance(model.get_submodule(name), Fp8Linear) for name in replaced)


def test_evaluation_is_not_in_fp8_and_training_is_close_to_what_it_was():
    model, ids = network(), torch.randint(0, 300, (2, 17), generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        for block in model.blocks:
            for matrix in (block.attn.c_proj, block.mlp.c_proj):
                matrix.weight.normal_(0, 0.05, generator=torch.Generator().manual_seed(3))
    exact = model(ids[:, :-1], ids[:, 1:])
    exact.backward()
    gradients = {name: weight.grad for name, weight in model.named_parameters()}
    model.zero_grad()
    use_fp8(model)
    with torch.no_grad():
        assert torch.equal(model(ids[:, :-1], ids[:, 1:]), exact)
    loss = model(ids[:, :-1], ids[:, 1:])
    assert loss != exact
    assert loss.item() == pytest.approx(exact.item(), rel=1e-3)
    loss.backward()
    name = "transformer.h.0.attn.c_q.weight"
    weight = dict(model.named_parameters())[name]
    assert torch.cosine_similarity(weight.grad.flatten(), gradients[name].flatten(), dim=0) > 0.98


def test_why_a_cpu_does_not_train_in_fp8():
    assert why_not_fp8(torch.device("cpu")) == "fp8 needs a GPU with tensor cores for it, this is cpu"
