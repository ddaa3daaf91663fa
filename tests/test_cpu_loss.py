"""The CPU's loss beside fp64, and beside the reference."""

import pytest
import torch

from kernels import cpu_loss
from kernels.cpu_loss import CpuLoss
from nanochat_ray.model.loss import ChunkedLoss, linear_cross_entropy
from tests.test_loss import PADDED, VOCAB, example, obvious_loss

OTHER_MACHINES = [("-DPORTABLE",), ("-march=x86-64",), ("-march=x86-64-v3",)]
FLOAT32, BFLOAT16 = torch.float32, torch.bfloat16


@pytest.fixture
def small_chunks(monkeypatch):
    monkeypatch.setattr(cpu_loss, "CHUNK_BYTES", 7 * 4 * VOCAB)


def gradients_of(x, weight, targets, reduction, incoming, chunks):
    loss = linear_cross_entropy(x, weight, targets, VOCAB, reduction, chunks)
    return loss, *torch.autograd.grad(loss, (x, weight), incoming)


def error(ours, exact):
    return float(((ours.double() - exact).norm() / exact.norm()).detach())


@pytest.mark.parametrize("own_products", [False, True])
@pytest.mark.parametrize("tokens", [1, 2, 13, 50])
@pytest.mark.parametrize("vocab", [7, 32, 130])
@pytest.mark.usefixtures("small_chunks")
def test_the_weights_gradient_adds_up_in_fp32(own_products, tokens, vocab):
    draw = torch.Generator().manual_seed(0)
    grad = torch.randn(tokens, vocab, generator=draw).bfloat16()
    x = torch.randn(tokens, 48, generator=draw).bfloat16()
    ours = torch.full((vocab, 48), torch.nan)
    loss = CpuLoss(own_products=own_products)
    loss._add_weight_gradient(ours, grad, x, first=True)
    loss._add_weight_gradient(ours, grad, x, first=False)
    assert error(ours, 2 * grad.double().T @ x.double()) < (1e-6 if own_products else 3e-3)


def check_against_fp64(chunks, dtype, tokens, reduction):
    x, weight, targets = example(tokens, dtype=dtype, width=32)
    targets[0] = 5
    incoming = torch.rand(tokens) + 0.5 if reduction == "none" else torch.tensor(2.5)
    ours = gradients_of(x, weight, targets, reduction, incoming, chunks)
    reference = gradients_of(x, weight, targets, reduction, incoming, ChunkedLoss())
    exact = obvious_loss(x, weight, targets, reduction)
    exact = (exact, *torch.autograd.grad(exact, (x, weight), incoming.double()))
    for a, b, c in zip(ours, reference, exact, strict=True):
        assert a.dtype == b.dtype
        assert error(a, c.double()) < (1e-6 if dtype == FLOAT32 else 1.3 * error(b, c.double()) + 1e-6)
    assert not ours[2][VOCAB:].any()  # padding takes no part


@pytest.mark.parametrize("reduction", ["sum", "mean", "none"])
@pytest.mark.parametrize("tokens", [1, 6, 7, 50])
@pytest.mark.parametrize("dtype", [FLOAT32, BFLOAT16])
@pytest.mark.usefixtures("small_chunks")
def test_losses_and_gradients_are_as_near_to_fp64_as_the_references(tokens, reduction, dtype):
    check_against_fp64(CpuLoss(), dtype, tokens, reduction)


@pytest.mark.slow
@pytest.mark.parametrize("flags", OTHER_MACHINES)
@pytest.mark.parametrize("dtype", [FLOAT32, BFLOAT16])
@pytest.mark.usefixtures("small_chunks")
def test_the_code_of_other_machines_computes_the_same(flags, dtype):
    check_against_fp64(CpuLoss(flags, own_products=True), dtype, 50, "none")


@pytest.mark.parametrize("vocab", [1, 15, 16, 17, 64, 79, 130])
def test_any_size_of_vocabulary_will_do(vocab):
    x, weight, _ = example(20)
    targets = torch.arange(20) % vocab
    ours, expected = (
        torch.autograd.grad(linear_cross_entropy(x, weight, targets, vocab, "sum", chunks), (x, weight))
        for chunks in (CpuLoss(), ChunkedLoss())
    )
    for a, b in zip(ours, expected, strict=True):
        assert (a - b).norm() <= 1e-6 * b.norm() + 1e-5


@pytest.mark.parametrize("dtype", [FLOAT32, BFLOAT16])
def test_the_number_of_threads_changes_no_bit(dtype):
    z = (9 * torch.randn(37, VOCAB)).to(dtype)
    targets, scale, x = torch.randint(-1, VOCAB, (37,)), torch.rand(37), torch.randn(37, 48).bfloat16()
    results = []
    for threads in (1, 3):
        torch.set_num_threads(threads)
        try:
            own, losses, weight_gradient = z.clone(), torch.empty(37), torch.empty(VOCAB, 48)
            CpuLoss()._rows(own, targets, scale, losses)
            CpuLoss(own_products=True)._add_weight_gradient(weight_gradient, own.bfloat16(), x, first=True)
        finally:
            torch.set_num_threads(1)
        results.append((own, losses, weight_gradient))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_without_gradients_the_loss_is_the_same_bit_for_bit():
    x, weight, targets = example(30)
    with torch.no_grad():
        quiet = linear_cross_entropy(x, weight, targets, VOCAB, "none", CpuLoss())
    assert torch.equal(quiet, linear_cross_entropy(x, weight, targets, VOCAB, "none", CpuLoss()))


def test_where_every_target_is_ignored_there_is_no_loss_and_no_gradient():
    x, weight, targets = example(20)
    targets[:] = -1
    total = linear_cross_entropy(x, weight, targets, VOCAB, "sum", CpuLoss())
    assert total == 0
    assert not any(g.any() for g in torch.autograd.grad(total, (x, weight)))


def test_no_tokens_have_no_loss():
    x, weight = torch.zeros(0, 24, requires_grad=True), torch.ones(PADDED, 24, requires_grad=True)
    total = linear_cross_entropy(x, weight, torch.zeros(0, dtype=torch.int64), VOCAB, "sum", CpuLoss())
    assert total == 0
    assert not any(g.any() for g in torch.autograd.grad(total, (x, weight)))


@pytest.mark.parametrize("factor", [1e6, torch.inf])
def test_extreme_logits_stay_finite(factor):
    z = factor * torch.tensor([[1.0, -1.0], [-1.0, 1.0]])
    losses = torch.empty(2)
    CpuLoss()._rows(z, torch.tensor([0, 0]), torch.ones(2), losses)
    torch.testing.assert_close(losses, torch.tensor([0.0, 30.0]), atol=1e-6, rtol=1e-6)
    assert z.isfinite().all()


def test_what_is_no_number_stays_no_number():
    x, weight, targets = example(20)
    broken = x.detach().clone()
    broken[3, 2] = torch.nan
    targets[3] = 1
    losses = linear_cross_entropy(broken, weight, targets, VOCAB, "none", CpuLoss())
    assert losses.isnan().nonzero().tolist() == [[3]]


@pytest.mark.parametrize("bad", [VOCAB, -2])
def test_targets_that_do_not_exist_are_refused(bad):
    x, weight, targets = example(5)
    targets[2] = bad
    with pytest.raises(ValueError, match="targets must lie in -1 … 129"):
        linear_cross_entropy(x, weight, targets, VOCAB, "sum", CpuLoss())


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
def test_what_it_cannot_compute_with_is_refused(dtype):
    x, weight, targets = example(5)
    with pytest.raises(ValueError, match=f"not {dtype} on"):
        linear_cross_entropy(x.to(dtype), weight, targets, VOCAB, "sum", CpuLoss())
    with pytest.raises(ValueError, match=r"torch.float32 on \['meta'\]"):
        CpuLoss().losses(*(tensor.to("meta") for tensor in (x, weight, targets)), VOCAB)
    with pytest.raises(ValueError, match="5 hidden states need as many targets"):
        CpuLoss().losses(x, weight, targets[:4], VOCAB)


@pytest.mark.parametrize("own_products", [False, True])
@pytest.mark.parametrize("dtype", [FLOAT32, BFLOAT16])
@pytest.mark.usefixtures("small_chunks")
def test_tensors_may_lie_in_memory_in_any_order(dtype, own_products):
    x, weight, targets = example(20, dtype=dtype, width=32)
    turned = [tensor.detach().T.contiguous().T.requires_grad_() for tensor in (x, weight)]
    assert not any(tensor.is_contiguous() for tensor in turned)
    ours = gradients_of(*turned, targets, "sum", None, CpuLoss(own_products=own_products))
    expected = gradients_of(x, weight, targets, "sum", None, CpuLoss(own_products=own_products))
    for a, b in zip(ours, expected, strict=True):
        assert error(a, b.double()) < (1e-6 if dtype == FLOAT32 else 3e-3)


@pytest.fixture
def double_by_default():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(FLOAT32)


def test_torchs_default_dtype_changes_nothing(request):
    x, weight, targets = example(20, dtype=BFLOAT16)
    expected = gradients_of(x, weight, targets, "sum", None, CpuLoss())
    request.getfixturevalue("double_by_default")
    for a, b in zip(gradients_of(x, weight, targets, "sum", None, CpuLoss()), expected, strict=True):
        assert torch.equal(a, b)


def test_other_dtypes_are_refused_in_words():
    assert "not torch.float16" in cpu_loss.why_not(torch.float16)
    assert cpu_loss.why_not(torch.bfloat16) is None
