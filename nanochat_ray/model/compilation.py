"""The training forward through torch.compile, where that is possible and pays."""

import importlib.util
import os
import shutil
from typing import Protocol

import torch

from nanochat_ray.model.gpt import GPT

COMPILED = "compiled"
LONG_RUN_FLOPS = 1e14  # a quarter of an hour of two cores


class Losses(Protocol):
    """`model(inputs_BT, targets_BT, reduction)`, compiled or not."""

    def __call__(self, inputs_BT: torch.Tensor, targets_BT: torch.Tensor, reduction: str = "mean") -> torch.Tensor: ...


def compile_for_training(model: GPT, wanted: bool | None = None, flops: float = 0.0) -> tuple[Losses, str]:
    """The training forward of `model`, and how it runs and why.

    The layers are compiled, for one shape of micro-batch; the loss is already arranged for speed and stays as it is.

    Args:
        wanted: True to compile wherever possible, False never, None where it pays: on a GPU, and on a CPU in long
            runs in bf16; there it takes one to five minutes, and gains a fifth in bf16 but nothing in fp32.
        flops: of the whole run.
    """
    if wanted is False:
        return model, "eager: compiling is switched off"
    if wanted is None and model.device.type == "cpu" and (model.dtype != torch.bfloat16 or flops < LONG_RUN_FLOPS):
        return model, "eager: on the CPU, compiling pays only in long runs in bf16"
    if obstacle := compile_obstacle(model.device):
        return model, f"eager: {obstacle}"
    hidden = torch.compile(model.hidden, dynamic=False)

    def losses(inputs_BT: torch.Tensor, targets_BT: torch.Tensor, reduction: str = "mean") -> torch.Tensor:
        rotary = model.rotary(inputs_BT.shape[1], inputs_BT.device, model.dtype)
        return model.loss(hidden(inputs_BT, rotary), targets_BT, reduction)

    return losses, COMPILED


def compile_obstacle(device: torch.device) -> str | None:
    """Why torch.compile cannot work for this device, or None."""
    if not any(shutil.which(name) for name in (os.environ.get("CXX", ""), "g++", "clang++") if name):
        return "torch.compile needs a C++ compiler and found neither g++ nor clang++"
    if device.type == "cuda" and importlib.util.find_spec("triton") is None:
        return "torch.compile needs the triton package on CUDA"
    return None
