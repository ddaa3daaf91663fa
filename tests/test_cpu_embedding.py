"""The CPU's embedding beside the reference."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kernels import cpu_embedding
from kernels.cpu_embedding import CpuEmbedding
from nanochat_ray.model.gpt import GPT, GPTConfig
from nanochat_ray.model.operations import Operations

ROWS = 40


def trained(operations, ids, weight, dtype, times=1):
    weight = weight.clone().requires_grad_()
    draw = torch.Generator().manual_seed(1)
    for _ in range(times):
        values = operations.embedding(ids, weight, dtype)
        values.backward(torch.randn(values.shape, generator=draw).to(dtype))
    return values.detach(), weight.grad


@given(
    seed=st.integers(0, 100),
    shape=st.sampled_from([(1,), (9,), (3, 50), (130,)]),
    width=st.sampled_from([16, 48, 80]),
    dtype=st.sampled_from(cpu_embedding.DTYPES),
)
def test_values_and_accumulated_gradients_equal_the_references(seed, shape, width, dtype):
    draw = torch.Generator().manual_seed(seed)
    ids, weight = torch.randint(ROWS, shape, generator=draw), torch.randn(ROWS, width, generator=draw)
    values, gradient = trained(CpuEmbedding(), ids, weight, dtype, times=3)
    expected, expected_gradient = trained(Operations(), ids, weight, dtype, times=3)
    assert torch.equal(values, expected)
    assert values.dtype == expected.dtype
    torch.testing.assert_close(gradient, expected_gradient, atol=1e-5, rtol=1e-5)


def test_gradients_are_summed_in_the_order_of_the_tokens_on_any_number_of_threads():
    ids, weight = torch.randint(3, (200,)), torch.zeros(3, 96)
    results = []
    for threads in (1, 4):
        torch.set_num_threads(threads)
        try:
            results.append(trained(CpuEmbedding(), ids, weight, torch.float32)[1])
        finally:
            torch.set_num_threads(1)
    more = torch.randn(200, 96, generator=torch.Generator().manual_seed(1))
    expected = torch.zeros(3, 96)
    for row, each in zip(ids.tolist(), more, strict=True):
        expected[row] += each
    assert torch.equal(results[0], expected)
    assert torch.equal(results[1], expected)


@pytest.mark.parametrize("dtype", cpu_embedding.DTYPES)
def test_a_whole_network_gets_the_same_gradients(dtype):
    config = GPTConfig(16, 90, 3, 2, 1, 64, "SL")
    draw = torch.Generator().manual_seed(0)
    ids, targets = torch.randint(90, (2, 2, 16), generator=draw)
    gradients = []
    for operations in (Operations(), CpuEmbedding()):
        model = GPT(config)
        model.init_weights(0)
        model.set_dtype(dtype).use_operations(operations)
        for block in model.blocks:
            torch.nn.init.normal_(block.attn.c_proj.weight, std=0.1, generator=torch.Generator().manual_seed(1))
        for row in range(2):
            model(ids[row : row + 1], targets[row : row + 1], "sum").backward()
        gradients.append({name: parameter.grad for name, parameter in model.named_parameters()})
    assert gradients[0].keys() == gradients[1].keys()
    for name, expected in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], expected, atol=1e-5, rtol=1e-5, msg=name)


def test_what_it_does_not_know_is_left_to_torch():
    ids, bf16, odd = torch.tensor([2, 0]), torch.randn(4, 16).bfloat16(), torch.randn(4, 7)
    assert torch.equal(CpuEmbedding().embedding(ids, bf16, torch.bfloat16), bf16[ids])
    assert torch.equal(CpuEmbedding().embedding(ids, odd, torch.float32), odd[ids])
    _, gradient = trained(CpuEmbedding(), ids, odd, torch.float32)
    assert gradient.any(dim=1).tolist() == [True, False, True, False]


def test_a_frozen_table_has_no_gradient():
    weight = torch.randn(4, 16)
    assert not CpuEmbedding().embedding(torch.tensor([1]), weight, torch.float32).requires_grad
    assert weight.grad is None


@pytest.mark.filterwarnings("ignore:grad and param do not obey")  # which is the point
@pytest.mark.parametrize("before", [torch.zeros(16, 4).T, torch.zeros(4, 16).to_sparse()])
def test_a_gradient_that_lies_otherwise_is_added_to_by_autograd(before):
    weight = torch.randn(4, 16, requires_grad=True)
    weight.grad = before
    CpuEmbedding().embedding(torch.tensor([1, 2, 1]), weight, torch.float32).sum().backward()
    assert weight.grad.to_dense().sum(dim=1).tolist() == [0, 32, 16, 0]


def test_hooks_of_a_table_are_called_with_its_whole_gradient():
    weight, called = torch.randn(4, 16, requires_grad=True), []
    weight.register_hook(lambda grad: 2 * grad)
    weight.register_post_accumulate_grad_hook(called.append)
    CpuEmbedding().embedding(torch.tensor([1, 2, 1]), weight, torch.float32).sum().backward()
    assert weight.grad.sum(dim=1).tolist() == [0, 64, 32, 0]
    assert len(called) == 1


def test_a_table_that_was_frozen_after_the_look_up_gets_no_gradient():
    weight = torch.randn(4, 16, requires_grad=True)
    values = CpuEmbedding().embedding(torch.tensor([1]), weight, torch.float32)
    weight.requires_grad_(False)
    values.sum().backward()
    assert weight.grad is None


@pytest.mark.parametrize("bad", [-1, ROWS])
def test_ids_that_do_not_exist_are_refused(bad):
    with pytest.raises(IndexError, match="ids must lie in 0 … 39"):
        CpuEmbedding().embedding(torch.tensor([3, bad]), torch.zeros(ROWS, 16), torch.float32)


def test_models_it_cannot_train_are_named():
    shape = GPTConfig(16, 90, 3, 4, 2, 24, "SL")
    assert "multiples of 16, not 24 and 12" in cpu_embedding.why_not(shape, torch.float32)
    assert "not torch.float16" in cpu_embedding.why_not(shape, torch.float16)
    assert cpu_embedding.why_not(GPTConfig(16, 90, 3, 2, 1, 64, "SL"), torch.bfloat16) is None
