"""The CPU kernels in several Python threads at once, and in processes that were forked."""

import os
import signal
import threading
import time
from collections.abc import Callable

import pytest
import torch

from kernels import cpu_embedding
from kernels.cpu_embedding import CpuEmbedding
from kernels.cpu_layers import CpuLayers
from kernels.cpu_loss import CpuLoss
from nanochat_ray.model.loss import linear_cross_entropy
from tests.test_loss import VOCAB, example

TOGETHER = 40  # calls of each of two threads or processes


@pytest.fixture
def two_threads():
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(1)


def forked(function: Callable[[], bool]) -> int:
    """The id of a child that runs it."""
    child = os.fork()
    if child == 0:
        try:
            os._exit(0 if function() else 1)
        finally:
            os._exit(2)
    return child


def succeeded(child: int, seconds: float = 30.0) -> bool:
    """Whether the function of the child returned True; a child that hangs is ended."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            return status == 0
        time.sleep(0.01)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return False


def losses_of_rows(seed: int) -> Callable[[], torch.Tensor]:
    """Losses of logits by a loss of its own: our threads alone, without a product of torch's."""
    loss, draw = CpuLoss(), torch.Generator().manual_seed(seed)
    z, targets = torch.randn(4000, 512, generator=draw), torch.randint(512, (4000,), generator=draw)

    def losses() -> torch.Tensor:
        out = torch.empty(4000)
        loss._rows(z, targets, None, out)
        return out

    return losses


def norms(seed: int) -> Callable[[], torch.Tensor]:
    layers, x = CpuLayers(), torch.randn(2000, 64, generator=torch.Generator().manual_seed(seed))
    return lambda: layers.norm(x)


def attended(seed: int) -> Callable[[], torch.Tensor]:
    layers, x = CpuLayers(), torch.randn(2, 64, 4, 32, generator=torch.Generator().manual_seed(seed))
    return lambda: layers.attention(x, x, x, 30)


def rows_of_tables(seed: int) -> Callable[[], torch.Tensor]:
    draw = torch.Generator().manual_seed(seed)
    ids, table = torch.randint(50, (3000,), generator=draw), torch.randn(50, 64, generator=draw)
    return lambda: CpuEmbedding().embedding(ids, table, torch.float32)


@pytest.mark.parametrize("make", [losses_of_rows, norms, attended, rows_of_tables])
@pytest.mark.usefixtures("two_threads")
def test_two_python_threads_may_compute_at_once(make):
    cases = [make(seed) for seed in range(2)]
    expected = [case() for case in cases]
    right = [0, 0]

    def compute(which: int) -> None:
        torch.set_num_threads(2)
        for _ in range(5 * TOGETHER):
            right[which] += torch.equal(cases[which](), expected[which])

    threads = [threading.Thread(target=compute, args=(which,), daemon=True) for which in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert right == [5 * TOGETHER] * 2


def test_two_python_threads_lose_no_gradient_of_a_table():
    table, ids = torch.zeros(5000, 64, requires_grad=True), torch.arange(64)
    for _ in range(20):
        table.grad = None
        sums = [CpuEmbedding().embedding(ids, table, torch.float32).sum() for _ in range(2)]
        threads = [threading.Thread(target=each.backward) for each in sums]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(30)
        assert table.grad.sum() == 2 * 64 * 64


@pytest.mark.parametrize("make", [losses_of_rows, norms, rows_of_tables])
@pytest.mark.usefixtures("two_threads")
def test_a_forked_process_has_threads_of_its_own(make):
    case = make(0)
    expected = case()
    assert succeeded(forked(lambda: torch.equal(case(), expected)))


def test_a_process_and_its_child_compute_losses_at_once_in_rooms_of_their_own():
    loss, (x, weight, targets) = CpuLoss(), example(2000)
    cases = [x.detach(), x.detach().flip(0)]

    def losses(x: torch.Tensor) -> torch.Tensor:
        return linear_cross_entropy(x, weight.detach(), targets, VOCAB, "none", loss)

    expected = [losses(x) for x in cases]

    def right(which: int) -> bool:
        return all(torch.equal(losses(cases[which]), expected[which]) for _ in range(TOGETHER))

    child = forked(lambda: right(1))
    alone = right(0)
    assert succeeded(child)
    assert alone


def test_what_a_thread_does_during_a_fork_holds_nothing_up_in_the_child():
    loss, (x, weight, targets) = CpuLoss(), example(3000)
    go, begun = True, threading.Event()

    def losses() -> torch.Tensor:
        return linear_cross_entropy(x.detach(), weight.detach(), targets, VOCAB, "none", loss)

    def compute() -> None:
        while go:
            losses()
            begun.set()

    expected = losses()
    thread = threading.Thread(target=compute)
    thread.start()
    try:
        begun.wait(30)
        assert all(succeeded(forked(lambda: torch.equal(losses(), expected)), 10) for _ in range(3))
    finally:
        go = False
        thread.join(30)


def test_a_gradient_that_is_added_during_a_fork_holds_nothing_up_in_the_child():
    table = torch.zeros(9, 16, requires_grad=True)

    def add() -> bool:
        CpuEmbedding().embedding(torch.tensor([3]), table, torch.float32).sum().backward()
        return table.grad.sum() == 16

    with cpu_embedding._adding:
        child = forked(add)
    assert succeeded(child, 10)
