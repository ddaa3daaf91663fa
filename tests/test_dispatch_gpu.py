"""What would compute on a GPU, as chosen on a machine without one: only what it is asked is pretended."""

import sys

import pytest
import torch

from kernels import dispatch
from nanochat_ray.errors import UserError
from nanochat_ray.model.gpt import GPT, GPTConfig
from nanochat_ray.model.operations import Operations
from nanochat_ray.model.torch_step import TorchStep

pytest.importorskip("triton", reason="Triton is for Linux")

CUDA, BF16 = torch.device("cuda"), torch.bfloat16
SHAPE = GPTConfig(64, 96, 2, 2, 2, 64, "SL")


@pytest.fixture(autouse=True)
def _a_hopper(monkeypatch):
    pretend(monkeypatch, (9, 0))


def pretend(monkeypatch, capability: tuple[int, int]) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)


def test_kernels_that_never_ran_on_a_gpu_are_taken_only_when_they_are_wanted():
    from kernels.gpu.operations import GpuOperations

    by_itself = dispatch.training_operations(SHAPE, CUDA, BF16)
    assert type(by_itself.operations) is Operations
    assert by_itself.is_plain
    assert "never run on a GPU" in by_itself.why
    off = dispatch.training_operations(SHAPE, CUDA, BF16, wanted=False)
    assert type(off.operations) is Operations
    assert (off.is_plain, off.why) == (True, "our kernels are switched off")
    wanted = dispatch.training_operations(SHAPE, CUDA, BF16, wanted=True)
    assert type(wanted.operations) is GpuOperations
    assert not wanted.is_plain
    assert not wanted.operations.fp8


@pytest.mark.parametrize("wanted", [None, True])
def test_fp8_wants_the_kernels_and_they_know_about_it(wanted):
    from kernels.gpu.operations import GpuOperations

    choice = dispatch.training_operations(SHAPE, CUDA, BF16, wanted=wanted, fp8=True)
    assert type(choice.operations) is GpuOperations
    assert choice.operations.fp8
    assert "fp8" in choice.name


def test_fp8_without_kernels_or_without_tensor_cores_for_it_is_refused(monkeypatch):
    with pytest.raises(UserError, match="leave out --kernels off, or use --dtype bf16"):
        dispatch.training_operations(SHAPE, CUDA, BF16, wanted=False, fp8=True)
    pretend(monkeypatch, (8, 0))
    with pytest.raises(UserError, match="fp8 needs SM 8.9 or newer .*, this is SM 8.0; use --dtype bf16"):
        dispatch.training_operations(SHAPE, CUDA, BF16, fp8=True)


@pytest.mark.parametrize(
    ("capability", "dtype", "why"),
    [
        ((7, 5), BF16, "need SM 8.0 or newer, this is SM 7.5"),
        ((9, 0), torch.float32, "bf16 and fp16, not torch.float32"),
    ],
)
def test_what_a_gpu_cannot_do_is_told(capability, dtype, why, monkeypatch):
    pretend(monkeypatch, capability)
    choice = dispatch.training_operations(SHAPE, CUDA, dtype)
    assert choice.is_plain
    assert why in choice.why
    with pytest.raises(UserError, match=f"our kernels cannot be used: .*{why}"):
        dispatch.training_operations(SHAPE, CUDA, dtype, wanted=True)


def test_a_missing_triton_is_told(monkeypatch):
    monkeypatch.setitem(sys.modules, "triton", None)  # as if it were not installed
    choice = dispatch.training_operations(SHAPE, CUDA, BF16)
    assert choice.is_plain
    assert choice.why == "our GPU kernels need the triton package: pip install triton"
    for wish in ({"wanted": True}, {"fp8": True}):
        with pytest.raises(UserError, match="our GPU kernels need the triton package: pip install triton"):
            dispatch.training_operations(SHAPE, CUDA, BF16, **wish)


@pytest.fixture
def on_gpu(monkeypatch):
    """A network that says it were on a GPU whose flash attention knows pages; steps there are not made, but noted."""
    monkeypatch.setattr(GPT, "device", CUDA)
    monkeypatch.setattr("kernels.gpu.paged_step.why_no_pages", lambda: None)
    monkeypatch.setattr("kernels.gpu.paged_step.CudaGraphs", lambda device: f"graphs on {device}")
    monkeypatch.setattr("kernels.gpu.paged_step.PagedStep", lambda model, *others: others)
    return GPT(SHAPE)


def test_decoding_takes_the_paged_step_and_the_kernels_only_when_they_are_wanted(on_gpu):
    from kernels.gpu.operations import GpuOperations

    step, how = dispatch.step_model(on_gpu, BF16)
    assert type(step) is TorchStep
    assert how.startswith("torch on cuda: our GPU kernels were never run on a GPU")
    assert type(on_gpu.operations) is Operations
    step, how = dispatch.step_model(on_gpu, BF16, context=48, wanted=True)
    assert step == (48, "graphs on cuda")
    assert "paged attention" in how
    assert type(on_gpu.operations) is GpuOperations


def test_decoding_with_the_kernels_where_they_cannot_is_refused(on_gpu, monkeypatch):
    monkeypatch.setattr("kernels.gpu.paged_step.why_no_pages", lambda: "paged decoding needs FA3 or FA4")
    with pytest.raises(UserError, match="our kernels cannot be used: paged decoding needs FA3 or FA4"):
        dispatch.step_model(on_gpu, BF16, wanted=True)
    monkeypatch.setitem(sys.modules, "triton", None)
    with pytest.raises(UserError, match="our GPU kernels need the triton package: pip install triton"):
        dispatch.step_model(on_gpu, BF16, wanted=True)
    assert type(on_gpu.operations) is Operations
