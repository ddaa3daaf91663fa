"""How the training forward runs: with our kernels, through torch.compile, or as eager torch; whichever pays."""

import importlib.util
from typing import Protocol

import torch

from nanochat_ray.errors import UsageError, UserError
from nanochat_ray.model.gpt import GPT

COMPILED = "compiled"  # how the words begin when torch.compile works
LONG_RUN_FLOPS = 1e14  # a quarter of an hour of two cores
WISHES = {"auto": None, "on": True, "off": False}  # of the flags --compile and --kernels


class Losses(Protocol):
    """`model(inputs_BT, targets_BT, reduction)`, compiled or not."""

    def __call__(self, inputs_BT: torch.Tensor, targets_BT: torch.Tensor, reduction: str = "mean") -> torch.Tensor: ...


def prepare_for_training(
    model: GPT, kernels: str = "auto", compile: str = "auto", flops: float = 0.0, fp8: bool = False
) -> tuple[Losses, str]:
    """The training forward of a model that is on its device, and how it runs and why. Sets the model's operations.

    On a CPU our kernels take the place of torch.compile, which cannot look into them: they are faster, and built in
    seconds instead of minutes. On a GPU the layers are compiled around them, for one shape of micro-batch; the loss is
    already arranged for speed and stays as it is.

    Args:
        kernels: "on" for ours, "off" for torch's operations, "auto" for what is known to be faster.
        compile: "on" wherever possible, "off" never, "auto" where it pays: on a GPU, and on a CPU without our kernels
            in long runs in bf16; there it takes one to five minutes, and gains a fifth in bf16 but nothing in fp32.
        flops: of the whole run.
        fp8: the layers' products in fp8.

    Raises:
        UserError: our kernels or fp8 are wanted, and there are none for this device, dtype or shape.
    """
    from kernels.dispatch import training_operations

    own, compiling, on_cpu = WISHES[kernels], WISHES[compile], model.device.type == "cpu"
    if on_cpu and compiling:
        if own:
            raise UsageError("--kernels on and --compile on exclude each other on a CPU; leave one of them out")
        own = False
    choice = training_operations(model.config, model.device, model.dtype, own, fp8)
    model.use_operations(choice.operations)
    if on_cpu and not choice.is_plain:
        return model, f"kernels: {choice.name}"
    on_gpu = f"; operations: {choice.name}, {choice.why}" * (model.device.type == "cuda")
    if model.device.type == "cuda" and own is not False:
        on_gpu += _prepare_gpu(model, fp8)
    if compiling is False:
        return model, f"eager: compiling is switched off{on_gpu}"
    if on_cpu and compiling is None and (model.dtype != torch.bfloat16 or flops < LONG_RUN_FLOPS):
        return model, f"eager: {choice.why}, and compiling pays only in long runs in bf16"
    if obstacle := compile_obstacle(model.device):
        return model, f"eager: {obstacle}{on_gpu}"
    hidden = torch.compile(model.hidden, dynamic=False)

    def losses(inputs_BT: torch.Tensor, targets_BT: torch.Tensor, reduction: str = "mean") -> torch.Tensor:
        rotary = model.rotary(inputs_BT.shape[1], inputs_BT.device, model.dtype)
        return model.loss(hidden(inputs_BT, rotary), targets_BT, reduction)

    return losses, COMPILED + on_gpu


def _prepare_gpu(model: GPT, fp8: bool) -> str:
    """Choose torch's flash attention, and put fp8 layers in place; which and why. Not run on a GPU."""
    from kernels.gpu.flash import activate_flash
    from kernels.gpu.fp8_linear import use_fp8

    if fp8:
        use_fp8(model)
    return f"; attention: {activate_flash(model.device)}"


def compile_obstacle(device: torch.device) -> str | None:
    """Why torch.compile cannot work for this device, or None."""
    from kernels.cpu_build import find_compiler

    try:
        find_compiler()
    except UserError as error:
        return f"torch.compile cannot work: {error}"
    if device.type == "cuda" and importlib.util.find_spec("triton") is None:
        return "torch.compile needs the triton package on CUDA"
    return None
