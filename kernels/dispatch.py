"""Which code computes: chosen once for a model and a device, with the reason in words.

    choice = training_operations(model.config, device, dtype)
    model.use_operations(choice.operations); print(choice.why)
    step, how = step_model(model, dtype)

`wanted` is True for our kernels, False for plain torch, None for what is known to be faster. What is wanted and cannot
be had raises; what is chosen by itself falls back to torch and says why. GPU kernels, which were never run on a GPU,
are taken only when they are wanted. Nothing is imported before it is asked for: neither compilers nor triton.
"""

import importlib.util
from dataclasses import dataclass

import torch

from nanochat_ray.cli import warn
from nanochat_ray.device import activations_of
from nanochat_ray.errors import UserError
from nanochat_ray.model.gpt import GPT
from nanochat_ray.model.operations import Operations
from nanochat_ray.model.ragged import StepModel
from nanochat_ray.model.torch_step import TorchStep
from nanochat_ray.plan.shape import ModelShape

PLAIN = "torch"
_SWITCHED_OFF = "our kernels are switched off"
_NO_TRITON = "our GPU kernels need the triton package: pip install triton"
_UNTRIED = "our GPU kernels were never run on a GPU; --kernels on tries them"


@dataclass(frozen=True)
class Choice:
    """Operations for training a `GPT`, what they are called, and why they were chosen."""

    operations: Operations
    name: str
    why: str

    @property
    def is_plain(self) -> bool:
        return self.name == PLAIN


def training_operations(
    shape: ModelShape, device: torch.device, dtype: torch.dtype, wanted: bool | None = None, fp8: bool = False
) -> Choice:
    """How to train such a model.

    Args:
        dtype: of activations.
        fp8: the layers' products in fp8, which only our kernels do; the model's modules are replaced by `use_fp8`.

    Raises:
        UserError: our kernels, or fp8, are wanted, and this device, dtype or shape has none.
    """
    if fp8:
        _require_fp8(device, wanted)
    elif wanted is False:
        return _plain(_SWITCHED_OFF)
    obstacle = _training_obstacle(shape, device, dtype)
    if obstacle and (wanted or fp8):
        raise UserError(_cannot_be_forced(obstacle))
    if obstacle:
        return _plain(obstacle)
    if device.type == "cpu":
        from kernels.cpu_operations import CpuOperations

        return Choice(CpuOperations(), "own, compiled for this CPU", "on CPUs they are faster than torch's")
    if not (wanted or fp8):
        return _plain(_UNTRIED)
    from kernels.gpu.operations import GpuOperations

    return Choice(GpuOperations(fp8), "own, of Triton" + ", fp8" * fp8, "they were chosen")


def step_model(
    model: GPT,
    dtype: torch.dtype,
    threads: int | None = None,
    context: int | None = None,
    wanted: bool | None = None,
) -> tuple[StepModel, str]:
    """How to run a network whose weights may be changed for it, and which way that is, in words.

    Args:
        dtype: of its matrices. With torch.int8 everything else is bf16.
        threads: on a CPU; None: as many as torch has.
        context: positions a sequence may have; None: as many as in training.

    Raises:
        UserError: our kernels, or int8, are wanted and cannot be had here.
    """
    model.freeze(activations_of(dtype))
    device = model.device
    if wanted is None and device.type == "cuda":
        obstacle: str | None = _UNTRIED
    else:
        obstacle = _SWITCHED_OFF if wanted is False else _step_obstacle(model, dtype)
    if obstacle and dtype == torch.int8:
        raise UserError(f"int8 needs the fused step of the CPU: {obstacle}; --dtype bf16 goes without")
    if obstacle and wanted:
        raise UserError(_cannot_be_forced(obstacle))
    if obstacle is None and device.type == "cpu":
        from kernels.cpu_step import CpuStep

        threads, name = threads or torch.get_num_threads(), str(dtype).removeprefix("torch.")
        return CpuStep(model, dtype, threads, context=context), f"fused CPU step, {name}, {threads} threads"
    if obstacle is None:
        from kernels.gpu.operations import GpuOperations
        from kernels.gpu.paged_step import CudaGraphs, PagedStep

        model.use_operations(GpuOperations())
        return PagedStep(model, context, CudaGraphs(device)), "kernels of Triton, paged attention, CUDA graphs"
    if device.type == "cpu" and wanted is None:
        warn(f"replies come at a third of the speed: {obstacle}")
    return TorchStep(model, context), f"torch on {device.type}: {obstacle}"


def _plain(why: str) -> Choice:
    return Choice(Operations(), PLAIN, why)


def _cannot_be_forced(obstacle: str) -> str:
    return f"our kernels cannot be used: {obstacle}; with --kernels auto torch's operations do the work"


def _require_fp8(device: torch.device, wanted: bool | None) -> None:
    from kernels.gpu.fp8_linear import why_not_fp8

    if obstacle := why_not_fp8(device):
        raise UserError(f"{obstacle}; use --dtype bf16")
    if wanted is False:
        raise UserError("--dtype fp8 needs our kernels; leave out --kernels off, or use --dtype bf16")


def _training_obstacle(shape: ModelShape, device: torch.device, dtype: torch.dtype) -> str | None:
    """Why our kernels cannot train, in words. May compile: seconds."""
    if device.type == "cpu":
        from kernels import cpu_operations

        return cpu_operations.why_not(shape, dtype)
    if device.type != "cuda":
        return f"there are no kernels of ours for {device.type}"
    if importlib.util.find_spec("triton") is None:
        return _NO_TRITON
    from kernels.gpu import operations

    return operations.why_not(device, dtype)


def _step_obstacle(model: GPT, dtype: torch.dtype) -> str | None:
    """Why our kernels cannot run the network, in words. May compile: seconds."""
    if model.device.type == "cpu":
        from kernels import cpu_step

        return cpu_step.why_not(model.config, dtype)
    if model.device.type != "cuda":
        return f"there are no kernels of ours for {model.device.type}"
    if importlib.util.find_spec("triton") is None:
        return _NO_TRITON
    from kernels.gpu import flash, paged_step

    reason = flash.activate_flash(model.device)
    obstacle = paged_step.why_not(model.device, dtype)
    return f"{obstacle} ({reason})" if obstacle else None
