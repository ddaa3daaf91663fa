"""What computes is chosen with a reason, and what is forced is there or an error says why not."""

import pytest
import torch

from jobs import chat, pretrain, serve
from kernels import cpu_layers, dispatch
from kernels.cpu_operations import CpuOperations
from kernels.cpu_step import CpuStep
from nanochat_ray import cli
from nanochat_ray.errors import UserError
from nanochat_ray.model.execution import prepare_for_training
from nanochat_ray.model.gpt import GPT, GPTConfig
from nanochat_ray.model.operations import Operations
from nanochat_ray.model.torch_step import TorchStep

CPU, FP32 = torch.device("cpu"), torch.float32
SHAPE = GPTConfig(64, 96, 2, 2, 2, 64, "SL")
ODD = GPTConfig(64, 96, 2, 4, 4, 40, "SL")  # heads of 10 channels


def model_of(shape: GPTConfig) -> GPT:
    model = GPT(shape)
    model.init_weights(0)
    return model


@pytest.fixture
def no_compiler(monkeypatch):
    """As on a machine without one; what other tests have loaded is forgotten meanwhile."""
    monkeypatch.setenv("CXX", "/nowhere/c++")
    monkeypatch.setattr(cpu_layers.cpu_build, "load", cpu_layers.cpu_build.load.__wrapped__)


def test_a_cpu_trains_with_our_kernels_unless_they_are_switched_off():
    choice = dispatch.training_operations(SHAPE, CPU, FP32)
    assert isinstance(choice.operations, CpuOperations)
    assert not choice.is_plain
    assert choice.why
    off = dispatch.training_operations(SHAPE, CPU, FP32, wanted=False)
    assert type(off.operations) is Operations
    assert (off.is_plain, off.why) == (True, "our kernels are switched off")


def test_what_has_no_kernel_is_left_to_torch_with_the_reason_and_forced_it_is_an_error():
    choice = dispatch.training_operations(ODD, CPU, FP32)
    assert choice.is_plain
    assert "head size" in choice.why
    with pytest.raises(UserError, match=r"our kernels cannot be used: .*head size.*; with --kernels auto"):
        dispatch.training_operations(ODD, CPU, FP32, wanted=True)
    with pytest.raises(UserError, match="head size"):
        dispatch.step_model(model_of(ODD), FP32, wanted=True)
    with pytest.raises(UserError, match="no kernels of ours for mps"):
        dispatch.training_operations(SHAPE, torch.device("mps"), FP32, wanted=True)


def test_fp8_is_refused_where_it_cannot_be():
    with pytest.raises(UserError, match="fp8 needs a GPU .*, this is cpu; use --dtype bf16"):
        prepare_for_training(model_of(SHAPE), fp8=True)
    with pytest.raises(UserError, match="use --dtype bf16"):  # and not: leave out --kernels off
        prepare_for_training(model_of(SHAPE), kernels="off", fp8=True)


def test_without_a_compiler_both_ways_fall_back_and_say_so(no_compiler, capsys):
    choice = dispatch.training_operations(SHAPE, CPU, FP32)
    assert choice.is_plain
    assert "no C++ compiler" in choice.why
    assert "no C++ compiler" in prepare_for_training(model_of(SHAPE))[1]
    step, how = dispatch.step_model(model_of(SHAPE), FP32, threads=1)
    assert isinstance(step, TorchStep)
    assert how.startswith("torch on cpu: no C++ compiler")
    assert "a third of the speed: no C++ compiler" in capsys.readouterr().err
    with pytest.raises(UserError, match="our kernels cannot be used: no C"):
        dispatch.step_model(model_of(SHAPE), FP32, wanted=True)


def test_a_cpu_decodes_with_the_fused_step_unless_it_is_switched_off(capsys):
    step, how = dispatch.step_model(model_of(SHAPE), FP32, threads=1)
    assert isinstance(step, CpuStep)
    assert how == "fused CPU step, float32, 1 threads"
    step, how = dispatch.step_model(model_of(SHAPE), FP32, wanted=False)
    assert isinstance(step, TorchStep)
    assert how == "torch on cpu: our kernels are switched off"
    assert not capsys.readouterr().err  # it is what the user asked for


def test_whoever_trains_or_uses_a_model_can_choose():
    for job in (pretrain, chat, serve):
        assert job.build_parser().parse_args(["--kernels", "on"]).kernels == "on"
        assert job.build_parser().parse_args([]).kernels == "auto"
    assert "kernels" in cli.TRAINING_FLAGS
