"""That training on a CPU does use our kernels, and where it does not."""

import pytest
import torch

from kernels import cpu_loss
from kernels.cpu_loss import CpuLoss
from kernels.cpu_operations import CpuOperations
from nanochat_ray.model.operations import Operations
from tests.test_loss import VOCAB, example

FLOAT32, BFLOAT16 = torch.float32, torch.bfloat16


def summed(operations: Operations, x: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    return operations.linear_cross_entropy(x, weight, targets, VOCAB, "sum")


@pytest.fixture
def rows_of_ours(monkeypatch):
    """The shapes of logits that our loss has worked on."""
    shapes, rows = [], CpuLoss._rows
    monkeypatch.setattr(
        CpuLoss, "_rows", lambda self, z_CV, *rest: shapes.append(z_CV.shape) or rows(self, z_CV, *rest)
    )
    return shapes


@pytest.mark.parametrize("dtype", [FLOAT32, BFLOAT16])
def test_the_loss_is_our_own(rows_of_ours, dtype):
    x, weight, targets = example(20, dtype=dtype)
    summed(CpuOperations(), x, weight, targets)
    assert rows_of_ours == [(20, VOCAB)]


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
def test_the_loss_in_other_dtypes_is_torchs(rows_of_ours, dtype):
    x, weight, targets = example(20)
    x = x.to(dtype)
    assert torch.equal(summed(CpuOperations(), x, weight, targets), summed(Operations(), x, weight, targets))
    assert not rows_of_ours


def test_the_loss_on_other_devices_is_torchs(monkeypatch):
    monkeypatch.setattr(Operations, "linear_cross_entropy", lambda *_: "torch's")
    assert summed(CpuOperations(), *(tensor.to("meta") for tensor in example(20))) == "torch's"


@pytest.mark.parametrize(
    ("capabilities", "ours"),
    [({}, False), ({"avx512_bf16": True}, True), ({"avx512_bf16": True, "amx_bf16": True}, False)],
)
def test_the_weights_gradient_is_our_own_product_where_that_is_faster(monkeypatch, capabilities, ours):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities)
    loss, (x, weight, targets) = CpuLoss(), example(20, dtype=BFLOAT16, width=32)
    products = []

    class Counted:
        def __getattr__(self, name: str):
            products.append(name)
            return getattr(library, name)

    library, loss._library = loss._library, Counted()
    monkeypatch.setattr(loss, "_crew", lambda: cpu_loss.crew_of(library, "cpu_loss_crew"))
    loss.losses_and_gradients(x.detach(), weight.detach(), targets, VOCAB, torch.ones(20))
    assert products == ["cpu_loss_rows", "cpu_loss_weight_gradient" if ours else "cpu_loss_accumulate"]
