"""Which code computes: chosen once for a model and a device, with the reason in words.

    choice = training_operations(model.config, device, dtype, wanted=None)
    model.use_operations(choice.operations); print(choice.why)

`wanted` is True for our kernels, False for plain torch, None for what is known to be faster. What is wanted and cannot
be had raises; what is chosen by itself falls back to torch and says why. Nothing here is imported before it is asked
for: neither compilers nor triton.
"""

import importlib.util
from dataclasses import dataclass

import torch

from nanochat_ray.errors import UserError
from nanochat_ray.model.operations import Operations
from nanochat_ray.plan.shape import ModelShape

PLAIN = "torch"


@dataclass(frozen=True)
class Choice:
    """Operations for a `GPT`, what they are called, and why they were chosen."""

    operations: Operations
    name: str
    why: str

    @property
    def is_plain(self) -> bool:
        return self.name == PLAIN


def training_operations(
    shape: ModelShape, device: torch.device, dtype: torch.dtype, wanted: bool | None = None
) -> Choice:
    """How to train such a model.

    Raises:
        UserError: our kernels are wanted, and this device, dtype or shape has none.
    """
    if wanted is False:
        return _plain("our kernels are switched off")
    obstacle = _obstacle(shape, device, dtype)
    if wanted and obstacle:
        raise UserError(f"--kernels on: {obstacle}; use --kernels auto, which then takes torch's")
    if obstacle:
        return _plain(obstacle)
    if device.type == "cpu":
        from kernels.cpu_operations import CpuOperations

        return Choice(CpuOperations(), "own, compiled for this CPU", "the CPU's kernels are faster than torch's")
    if not wanted:
        return _plain("our GPU kernels were never run on a GPU; --kernels on tries them")
    from kernels.gpu.operations import GpuOperations

    return Choice(GpuOperations(), "own, of Triton", "chosen; they were never run on a GPU by us")


def _plain(why: str) -> Choice:
    return Choice(Operations(), PLAIN, why)


def _obstacle(shape: ModelShape, device: torch.device, dtype: torch.dtype) -> str | None:
    """Why our kernels cannot be used, in words. May compile: seconds."""
    if device.type == "cpu":
        from kernels import cpu_operations

        return cpu_operations.why_not(shape, dtype)
    if device.type != "cuda":
        return f"there are no kernels of ours for {device.type}"
    if importlib.util.find_spec("triton") is None:
        return "our GPU kernels need the triton package: pip install triton"
    if dtype not in (torch.bfloat16, torch.float16):
        return f"our GPU kernels compute in bf16 or fp16, not {dtype}"
    return None
