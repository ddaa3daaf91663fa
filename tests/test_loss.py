import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from nanochat_ray.errors import UsageError
from nanochat_ray.model import loss
from nanochat_ray.model.loss import linear_cross_entropy

VOCAB, PADDED = 130, 192


def example(tokens, seed=0, dtype=torch.float32, width=24):
    generator = torch.Generator().manual_seed(seed)
    x = (3 * torch.randn(tokens, width, generator=generator)).to(dtype).requires_grad_()
    weight = torch.randn(PADDED, width, generator=generator, requires_grad=True)
    targets = torch.randint(-1, VOCAB, (tokens,), generator=generator)
    return x, weight, targets


def obvious_loss(x, weight, targets, reduction):
    z = x.double() @ weight[:VOCAB].to(x.dtype).double().T
    return F.cross_entropy(15 * torch.tanh(z / 15), targets, ignore_index=-1, reduction=reduction)


@pytest.fixture
def small_chunks(monkeypatch):
    monkeypatch.setattr(loss, "LOGITS_CHUNK_BYTES", 7 * 4 * VOCAB)
    monkeypatch.setattr(loss, "_CPU_SLICE_ELEMENTS", 3 * VOCAB)


@pytest.mark.parametrize("reduction", ["sum", "mean", "none"])
@pytest.mark.parametrize("tokens", [1, 6, 7, 50])
@pytest.mark.usefixtures("small_chunks")
def test_chunked_loss_and_gradients_equal_the_obvious_ones(tokens, reduction):
    x, weight, targets = example(tokens)
    targets[0] = 5
    incoming = torch.rand(tokens) + 0.5 if reduction == "none" else torch.tensor(2.5)  # not 1: the scale must arrive
    ours = linear_cross_entropy(x, weight, targets, VOCAB, reduction)
    expected = obvious_loss(x, weight, targets, reduction)
    torch.testing.assert_close(ours.double(), expected, atol=2e-5, rtol=1e-5)
    gradients = torch.autograd.grad(ours, (x, weight), incoming)
    for a, b in zip(gradients, torch.autograd.grad(expected, (x, weight), incoming.double()), strict=True):
        torch.testing.assert_close(a, b, atol=5e-5, rtol=1e-4)
    assert not gradients[1][VOCAB:].any()  # padding takes no part


@given(seed=st.integers(0, 1000), tokens=st.integers(1, 40), chunk=st.integers(1, 50), piece=st.integers(1, 50))
def test_chunk_and_slice_sizes_do_not_matter(seed, tokens, chunk, piece):
    x, weight, targets = example(tokens, seed)
    results = []
    for chunk_bytes, slice_elements in ((4 * chunk * VOCAB, piece * VOCAB), (10**9, 10**9)):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(loss, "LOGITS_CHUNK_BYTES", chunk_bytes)
            patch.setattr(loss, "_CPU_SLICE_ELEMENTS", slice_elements)
            total = linear_cross_entropy(x, weight, targets, VOCAB, "sum")
            results.append((total, *torch.autograd.grad(total, (x, weight))))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("reduction", ["sum", "none"])
@pytest.mark.usefixtures("small_chunks")
def test_in_bf16_the_loss_is_that_of_the_rounded_logits(reduction):
    x, weight, targets = example(50, dtype=torch.bfloat16)
    ours = linear_cross_entropy(x, weight, targets, VOCAB, reduction)
    expected = obvious_loss(x, weight, targets, reduction)
    assert ours.dtype == torch.float32
    torch.testing.assert_close(ours.sum().double(), expected.sum(), rtol=3e-3, atol=0)
    gradients = torch.autograd.grad(ours.sum(), (x, weight))
    assert [g.dtype for g in gradients] == [torch.bfloat16, torch.float32]
    for a, b in zip(gradients, torch.autograd.grad(expected.sum(), (x, weight)), strict=True):
        error = (a.float() - b.float()).norm() / b.float().norm()
        assert error < 0.02


def test_without_gradients_the_loss_is_the_same():
    x, weight, targets = example(30)
    with torch.no_grad():
        quiet = linear_cross_entropy(x, weight, targets, VOCAB, "mean")
    torch.testing.assert_close(quiet, linear_cross_entropy(x, weight, targets, VOCAB, "mean"))
    assert not quiet.requires_grad


def test_ignored_targets_count_nothing_and_give_no_gradient():
    x, weight, targets = example(20)
    targets[:] = -1
    losses = linear_cross_entropy(x, weight, targets, VOCAB, "none")
    total = linear_cross_entropy(x, weight, targets, VOCAB, "sum")
    assert not losses.any()
    assert total == 0
    assert not any(g.any() for g in torch.autograd.grad(total, (x, weight)))


def test_a_summed_loss_says_that_it_can_be_differentiated_only_once():
    x, weight, targets = example(5)
    total = linear_cross_entropy(x, weight, targets, VOCAB, "sum")
    total.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="once"):
        total.backward()


def test_extreme_logits_stay_finite():
    x, weight, targets = example(10)
    total = linear_cross_entropy((x * 1e6).detach().requires_grad_(), weight, targets, VOCAB, "sum")
    total.backward()
    assert torch.isfinite(total)
    assert torch.isfinite(weight.grad).all()


def test_an_unknown_reduction_is_refused():
    with pytest.raises(UsageError, match="'median' is not one of"):
        linear_cross_entropy(*example(3), VOCAB, "median")
