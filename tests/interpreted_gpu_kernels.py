"""Figures of the GPU's kernels in Triton's interpreter; run by tests/test_gpu_kernels.py in a process of its own.

Blocks are made tiny, so that odd shapes need several of them and few programs. Every tensor that torch allocates holds
NaN until it is written. bf16 is left out where tl.dot multiplies: the interpreter's result is wrong there.
"""

import pytest
import torch
import torch.nn.functional as F

from kernels.gpu import linear_cross_entropy, polar_express, rotated_norm, squared_relu
from kernels.gpu.operations import GpuOperations
from nanochat_ray.model import loss, updates
from nanochat_ray.model.attention import RotaryTables
from nanochat_ray.model.operations import Operations

# Largest error over the largest magnitude of the exact result. Seen: 4e-7, 9e-4 and 8e-3, each in the loss's gradients.
TOLERANCES = {torch.float32: 1e-6, torch.float16: 1.5e-3, torch.bfloat16: 1.2e-2}
DTYPES = list(TOLERANCES)
DOT_DTYPES = [torch.float32, torch.float16]


@pytest.fixture(autouse=True)
def _tiny_blocks_and_no_stale_memory(monkeypatch):
    monkeypatch.setattr(linear_cross_entropy, "BLOCK", 64)
    for name in ("BLOCK_M", "BLOCK_N", "BLOCK_K"):
        monkeypatch.setattr(squared_relu, name, 16)
    monkeypatch.setattr(squared_relu, "GROUP_M", 2)
    monkeypatch.setattr(squared_relu, "ELEMENTS", 64)
    monkeypatch.setattr(polar_express, "BLOCK", 16)
    monkeypatch.setattr(polar_express, "BLOCK_K", 16)
    torch.manual_seed(0)
    torch.use_deterministic_algorithms(True)  # also fills new memory with NaN
    yield
    torch.use_deterministic_algorithms(False)


def check(found: torch.Tensor, exact: torch.Tensor, dtype: torch.dtype) -> None:
    assert found.shape == exact.shape
    assert found.isfinite().all()
    error = (found.double() - exact.double()).abs().max()
    assert error <= TOLERANCES[dtype] * exact.double().abs().max()


def gpu_loss(x_ND, weight_VD, targets_N, vocab_size, reduction):
    chunks = linear_cross_entropy.GpuLoss()
    return loss.linear_cross_entropy(x_ND, weight_VD, targets_N, vocab_size, reduction, chunks)


def exact_loss(x_ND, weight_VD, targets_N, vocab_size, reduction):
    z_NV = x_ND @ weight_VD[:vocab_size].T
    return F.cross_entropy(loss.softcap(z_NV), targets_N, ignore_index=-1, reduction=reduction)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_loss_and_its_gradients_over_chunks_with_padding_and_ignored_targets(dtype, reduction, monkeypatch):
    tokens, width, vocab, padded = 11, 24, 130, 192
    monkeypatch.setattr(linear_cross_entropy, "CHUNK_BYTES", 5 * padded * dtype.itemsize)  # chunks of 5, 5, 1
    x = (3 * torch.randn(tokens, 2 * width)).to(dtype)[:, ::2].requires_grad_()
    weight = torch.randn(padded, width)
    weight[vocab:] = torch.nan  # takes no part
    weight.requires_grad_()
    targets = torch.randint(0, vocab, (tokens, 2))[:, 0]
    targets[[0, 5, 10]] = -1
    found = gpu_loss(x, weight, targets, vocab, reduction)
    incoming = torch.rand_like(found) + 0.5
    grad_x, grad_weight = torch.autograd.grad(found, (x, weight), incoming)

    exact_x, exact_weight = x.detach().double().requires_grad_(), weight.detach().to(dtype).double().requires_grad_()
    expected = exact_loss(exact_x, exact_weight, targets, vocab, reduction)
    gradients = torch.autograd.grad(expected, (exact_x, exact_weight), incoming.double())
    check(found, expected, dtype)
    check(grad_x, gradients[0], dtype)
    check(grad_weight, gradients[1].nan_to_num(0.0), dtype)
    assert not grad_weight[vocab:].any()
    assert (found.dtype, grad_x.dtype, grad_weight.dtype) == (torch.float32, dtype, torch.float32)
    with torch.inference_mode():
        check(gpu_loss(x, weight, targets, vocab, reduction), expected, dtype)


class OnGpu(torch.Tensor):
    """A tensor that says it were on a GPU, where torch adds products of halves to sums in fp32, as it documents."""

    sums = 0
    device = property(lambda self: torch.device("cuda"))

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        if func not in (torch.addmm, torch.mm) or "out_dtype" not in (kwargs or {}):
            return super().__torch_function__(func, types, args, kwargs)
        assert kwargs.pop("out_dtype") == torch.float32
        *summand, a, b = (argument.as_subclass(torch.Tensor) for argument in args)
        out = kwargs.pop("out").as_subclass(torch.Tensor)
        assert a.dtype == b.dtype == torch.float16
        assert all(tensor.dtype == torch.float32 for tensor in (*summand, out))
        cls.sums += 1
        return func(*summand, a.float(), b.float(), **kwargs, out=out)


def test_on_a_gpu_the_weights_gradient_is_the_sum_of_all_chunks(monkeypatch):
    monkeypatch.setattr(linear_cross_entropy, "CHUNK_BYTES", 2 * 4 * 192)  # chunks of 4, 4 and 3
    x, weight, targets, scale = torch.randn(11, 24).half(), torch.randn(130, 24), torch.arange(11), torch.rand(11)
    expected = linear_cross_entropy.GpuLoss().losses_and_gradients(x, weight, targets, 130, scale)
    zeros_like = torch.zeros_like
    monkeypatch.setattr(torch, "zeros_like", lambda *args, **kwargs: zeros_like(*args, **kwargs).as_subclass(OnGpu))
    found = linear_cross_entropy.GpuLoss().losses_and_gradients(x, weight, targets, 130, scale)
    assert type(found[2]) is OnGpu
    assert OnGpu.sums == 3
    for part, exact in zip(found, expected, strict=True):
        torch.testing.assert_close(part.as_subclass(torch.Tensor), exact, rtol=1e-6, atol=1e-6)


def test_a_loss_of_ignored_targets_only_and_a_loss_of_nothing():
    x, weight, ignored = torch.randn(3, 8, requires_grad=True), torch.randn(70, 8), torch.full((3,), -1)
    total = gpu_loss(x, weight, ignored, 70, "sum")
    assert total == 0
    assert not torch.autograd.grad(total, x)[0].any()
    assert gpu_loss(x, weight, ignored, 70, "mean").isnan()
    assert gpu_loss(x[:0], weight, ignored[:0], 70, "sum") == 0


def test_nothing_is_written_beside_the_logits():
    buffer = torch.full((6, 160), 7.0)
    z = buffer[1:5, :130]
    z.copy_(torch.randn(4, 130))
    linear_cross_entropy.softcapped_losses(z, torch.tensor([0, 129, -1, 64]), torch.ones(4))
    assert (z != 7).all()
    assert (buffer[:, 130:] == 7).all()
    assert (buffer[[0, 5]] == 7).all()
    assert not z[2].any()


def test_extreme_logits_stay_finite():
    z = torch.tensor([[1e4, -1e4, 0.0], [-1e4, 1e4, 1e4]])
    losses = linear_cross_entropy.softcapped_losses(z, torch.tensor([1, 1]), torch.ones(2))
    torch.testing.assert_close(losses, torch.tensor([30.0, 0.6931472]), rtol=1e-5, atol=1e-5)
    assert z.isfinite().all()


@pytest.mark.parametrize("shape", [(1, 1, 1), (17, 5, 33), (35, 40, 17)])  # the last: a group and half of one
@pytest.mark.parametrize("dtype", DOT_DTYPES)
def test_matmul_with_squared_relu_and_its_gradients(dtype, shape):
    tokens, channels, outputs = shape
    x = torch.randn(tokens, channels + 3).to(dtype)[:, 3:].unsqueeze(0).requires_grad_()
    weight = torch.randn(channels, outputs).T.requires_grad_()  # columns contiguous
    y = squared_relu.linear_squared_relu(x, weight)
    incoming = torch.randn(1, outputs, tokens).to(dtype).mT
    gradients = torch.autograd.grad(y, (x, weight), incoming)

    exact_x, exact_weight = x.detach().double().requires_grad_(), weight.detach().to(dtype).double().requires_grad_()
    expected = Operations().linear_squared_relu(exact_x, exact_weight)
    check(y, expected, dtype)
    for found, exact in zip(
        gradients, torch.autograd.grad(expected, (exact_x, exact_weight), incoming.double()), strict=True
    ):
        check(found, exact, dtype)
    assert [gradient.dtype for gradient in gradients] == [dtype, torch.float32]


@pytest.mark.parametrize("dtype", DOT_DTYPES)
@pytest.mark.parametrize("where", ["x", "weight"])
def test_what_is_no_number_in_a_factor_is_none_in_the_result_and_the_gradients(dtype, where):
    x, weight = torch.randn(19, 20).to(dtype).requires_grad_(), torch.randn(18, 20).to(dtype).requires_grad_()
    with torch.no_grad():
        (x if where == "x" else weight)[17, 3] = torch.nan
    y = squared_relu.linear_squared_relu(x, weight)
    grad_x, grad_weight = torch.autograd.grad(y, (x, weight), torch.ones_like(y))
    lost = torch.zeros(19, 18, dtype=torch.bool)
    lost[(17, slice(None)) if where == "x" else (slice(None), 17)] = True
    assert torch.equal(y.isnan(), lost)
    assert torch.equal(grad_x.isnan().all(1), lost.any(1))
    assert torch.equal(grad_weight.isnan().all(1), lost.any(0))


@pytest.mark.parametrize("dtype", DTYPES)
def test_what_is_no_number_is_no_number_after_every_kernel(dtype):
    z = torch.tensor([1.0, torch.nan, -1.0, torch.inf, -torch.inf], dtype=dtype, requires_grad=True)
    y = squared_relu.squared_relu(z)
    (gradient,) = torch.autograd.grad(y, z, torch.ones_like(y))
    expected = torch.tensor([1.0, torch.nan, 0.0, torch.inf, 0.0], dtype=dtype)
    torch.testing.assert_close(y, expected, equal_nan=True)
    torch.testing.assert_close(gradient, 2 * expected, equal_nan=True)

    x = torch.randn(1, 2, 3, 10).to(dtype)
    x[0, 1, 2, 7] = torch.nan
    x.requires_grad_()
    tables = RotaryTables(10)(2, torch.device("cpu"), dtype)
    turned = rotated_norm.rotated_norm_of_rows(x, tables, 1.0)
    (gradient,) = torch.autograd.grad(turned, x, torch.ones_like(turned))
    for found in (turned, gradient):
        assert found[0, 1, 2].isnan().all()
        assert found.isnan().sum() == 10

    logits = torch.randn(3, 130).to(dtype)
    logits[1, 100] = torch.nan  # of no target
    for scale in (None, torch.ones(3)):
        losses = linear_cross_entropy.softcapped_losses(logits, torch.tensor([5, 5, 5]), scale)
        assert losses.isnan().tolist() == [False, True, False]
    assert logits.isnan().all(1).tolist() == logits.isnan().any(1).tolist() == [False, True, False]


@pytest.mark.parametrize("dtype", DOT_DTYPES)
def test_what_is_no_number_in_a_symmetric_product_spoils_its_row_and_column(dtype):
    x = torch.randn(1, 20, 18).to(dtype)
    x[0, 17, 17] = torch.nan
    gram = polar_express.symmetric_product(x, False, 0.0, 1.0)
    assert gram[0, 17].isnan().all()
    assert gram[0, :, 17].isnan().all()
    assert gram.isnan().sum() == 20 + 19
    assert polar_express.polar_express(x).isnan().all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_squared_relu_alone_and_its_gradient_from_the_result(dtype):
    z = torch.randn(23, 14).to(dtype).T.requires_grad_()
    y = squared_relu.squared_relu(z)
    incoming = torch.randn_like(y)
    (gradient,) = torch.autograd.grad(y, z, incoming)
    exact = z.detach().double().requires_grad_()
    expected = F.relu(exact).square()
    check(y, expected, dtype)
    check(gradient, torch.autograd.grad(expected, exact, incoming.double())[0], dtype)


@pytest.mark.parametrize(("heads", "size"), [(1, 2), (3, 10), (5, 16)])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("own_positions", [False, True])
def test_rotation_and_norm_and_their_gradient(dtype, heads, size, own_positions):
    rows, length = 2, 7
    tables = [table[:length] for table in RotaryTables(size)(40, torch.device("cpu"), dtype)]
    if own_positions:
        positions = torch.randint(0, 7, (rows, length))
        tables = [table[positions] for table in tables]
    x = torch.randn(rows, length, heads, 2 * size).to(dtype)[..., :size]  # heads of a wider row
    if own_positions:
        x = x.mT.contiguous().mT  # heads whose channels are apart
    x[0, 0] *= 1e-4  # where the norm's epsilon decides
    x.requires_grad_()
    y = rotated_norm.rotated_norm_of_rows(x, tables, 1.2)
    incoming = torch.randn(rows, length, size, heads).to(dtype).mT
    (gradient,) = torch.autograd.grad(y, x, incoming)

    exact = x.detach().double().requires_grad_()
    turned = Operations.rotated_norm(_ExactNorm(), exact, tuple(table.double() for table in tables), 1.2)
    expected = torch.autograd.grad(turned, exact, incoming.double())[0]
    check(y, turned, dtype)
    small, others = (slice(0, 1), slice(0, 1)), (slice(1, 2), slice(0, length))  # their gradients differ in size
    for part in (small, others):
        check(gradient[part], expected[part], dtype)


class _ExactNorm(Operations):
    """The norm with the epsilon that torch takes for every dtype below fp64."""

    def norm(self, x: torch.Tensor) -> torch.Tensor:
        return F.rms_norm(x, (x.shape[-1],), eps=torch.finfo(torch.float32).eps)


@pytest.mark.parametrize("shape", [(2, 37, 50), (1, 1, 3), (2, 50, 20)])
@pytest.mark.parametrize("dtype", DOT_DTYPES)
def test_symmetric_products_with_and_without_the_matrix_added(dtype, shape):
    x = torch.randn(shape).to(dtype)
    for view in (x, x.mT, x[:, ::2]):
        gram = polar_express.symmetric_product(view, False, 0.0, 1.0)
        check(gram, view.double() @ view.double().mT, dtype)
        assert torch.equal(gram, gram.mT)
    found = polar_express.symmetric_product(gram, True, -2.5, 0.5)
    check(found, -2.5 * gram.double() + 0.5 * gram.double() @ gram.double(), dtype)


@pytest.mark.parametrize("shape", [(2, 17, 20), (1, 34, 15)])
@pytest.mark.parametrize("dtype", DOT_DTYPES)
def test_polar_express_is_as_close_to_exact_as_the_reference(dtype, shape):
    x = torch.randn(shape).to(dtype)
    exact = updates.polar_express(x.double())
    found, reference = polar_express.polar_express(x), updates.polar_express(x)
    assert found.dtype == dtype
    assert (found - exact).abs().max() <= 1.5 * (reference - exact).abs().max()


def test_the_network_computes_with_the_kernels_what_it_computes_without(monkeypatch):
    from nanochat_ray.model.attention import causal_attention
    from nanochat_ray.model.gpt import GPT, GPTConfig

    monkeypatch.setattr("kernels.gpu.operations.flash_attention", causal_attention)  # needs a GPU
    monkeypatch.setattr("kernels.gpu.operations.MIN_TILED_TOKENS", 1)
    config = GPTConfig(8, 130, n_layer=1, n_head=3, n_kv_head=1, n_embd=24, window_pattern="L")
    ids, targets = torch.randint(0, 130, (2, 2, 8))
    results = []
    for operations in (Operations(), GpuOperations()):
        model = GPT(config)
        model.init_weights(0)
        with torch.no_grad():
            for block in model.blocks:
                block.mlp.c_proj.weight.normal_(0.0, 0.2, generator=torch.Generator().manual_seed(1))
        total = model.use_operations(operations)(ids, targets)
        total.backward()
        results.append((total.detach(), {name: weight.grad for name, weight in model.named_parameters()}))
    torch.testing.assert_close(results[0], results[1], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("min_tiled_tokens", [1, 2048])
def test_the_step_over_blocks_computes_with_the_kernels_what_it_computes_without(min_tiled_tokens, monkeypatch):
    from tests.fake_varlen import varlen_attn
    from tests.test_paged_step import Graphs, PagedSequences
    from tests.test_torch_step import check, network

    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", varlen_attn)
    monkeypatch.setattr("kernels.gpu.operations.MIN_TILED_TOKENS", min_tiled_tokens)
    model = network(2).use_operations(GpuOperations())
    sequences = PagedSequences(model, [7, 3, 1], capture=Graphs())
    logits = sequences.read({0: 5, 1: 2})
    logits |= sequences.read({0: 1, 1: 1, 2: 1})  # a graph's, with a row of padding
    logits |= sequences.read({0: 1})
    model.use_operations(Operations())
    check(sequences, logits)
