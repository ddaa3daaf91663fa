"""From a run's folder to an engine that can answer."""

import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from nanochat_ray.engine.engine import MAX_RUNNING, STEP_TOKENS, Engine
from nanochat_ray.errors import UserError
from nanochat_ray.storage import run_folder

if TYPE_CHECKING:
    import torch

    from nanochat_ray.model.gpt import GPT
    from nanochat_ray.model.ragged import StepModel
    from nanochat_ray.plan import Plan
    from nanochat_ray.tokenizer import Tokenizer
    from nanochat_ray.train.checkpoint import Checkpoints

GPU_STEP_TOKENS = 2048
FREE_MEMORY_FOR_KV = 0.5  # of what is free once the weights are there


@dataclass(frozen=True)
class ChatModel:
    """An engine with the name it goes by and the facts people ask about (JSON-able).

    fingerprint   changes whenever the same request could get another reply from machines of the same kind
    startup       seconds that each part of loading took
    """

    engine: Engine
    name: str
    about: dict[str, Any]
    fingerprint: str = ""
    startup: dict[str, float] = field(default_factory=dict)


def require_trained(storage: str, run: str, stage: str) -> None:
    """Check, without reading weights, that a stage of a run can be loaded.

    Raises:
        UserError: the run, its tokenizer or the stage's model is missing; says which command makes it.
    """
    folder = run_folder(storage, run)
    where = f"--run {run} --storage {storage}"
    if not (folder / "tokenizer").exists():
        raise UserError(
            f"no run named {run!r} with a tokenizer in {storage}; make one with `python -m jobs.speedrun {where}`"
        )
    if not (folder / stage / "checkpoints").list():
        command = {"sft": "jobs.sft", "base": "jobs.pretrain"}[stage]
        raise UserError(f"no trained model in {folder / stage}; train it with `python -m {command} {where}`")


def describe_chat_model(
    storage: str, run: str, stage: str, step: int | None, dtype: str | None, kernels: str = "auto"
) -> "tuple[str, Tokenizer, int, str, dict[str, Any]]":
    """Name, tokenizer, context, fingerprint and facts of what `load_chat_model` would load; weights are not read.

    Raises:
        UserError: as `require_trained`, or the checkpoint of this step is not there.
    """
    from nanochat_ray.tokenizer import Tokenizer
    from nanochat_ray.train.checkpoint import Checkpoints

    require_trained(storage, run, stage)
    folder = run_folder(storage, run)
    checkpoints = Checkpoints.of(folder / stage)
    step = checkpoints.steps()[-1] if step is None else step
    plan = checkpoints.state(step).plan
    about = {"run": run, "stage": stage, "step": step, "depth": plan.depth, "context": plan.model.sequence_len}
    fingerprint = _fingerprint(checkpoints, step, dtype, kernels)
    return run, Tokenizer.load(folder / "tokenizer"), plan.model.sequence_len, fingerprint, about


def load_chat_model(
    storage: str,
    run: str,
    stage: str = "sft",
    device: str | None = None,
    dtype: str | None = None,
    *,
    kernels: str = "auto",
    step: int | None = None,
    max_running: int = MAX_RUNNING,
    threads: int | None = None,
) -> ChatModel:
    """Load the newest valid checkpoint of a run's stage.

    Args:
        kernels: "on" for ours, "off" for torch's operations, "auto" for what is known to be faster.
        step: the checkpoint of this step instead.
        threads: of the model on a CPU; None takes as many as torch is set to.

    Raises:
        UserError: as `require_trained`, or no checkpoint verifies.
    """
    began = time.monotonic()
    from nanochat_ray.train.checkpoint import Checkpoints

    imported = time.monotonic()
    model, matrices, tokenizer, plan, step = _load_network(storage, run, stage, device, dtype, step)
    loaded = time.monotonic()
    engine, how = engine_of(model, tokenizer, matrices, max_running, threads, kernels)
    about = {
        "run": run,
        "stage": stage,
        "step": step,
        "depth": plan.depth,
        "context": model.config.sequence_len,
        "device": str(model.device),
        "dtype": str(matrices).removeprefix("torch."),
        "model_step": how,
    }
    startup = {
        "imports_s": round(imported - began, 3),
        "load_s": round(loaded - imported, 3),
        "engine_s": round(time.monotonic() - loaded, 3),
    }
    fingerprint = _fingerprint(Checkpoints.of(run_folder(storage, run) / stage), step, dtype, kernels)
    return ChatModel(engine, run, about, fingerprint, startup)


def load_step_model(
    storage: str, run: str, stage: str, step: int, dtype: str | None, context_times: int
) -> "tuple[StepModel, Tokenizer, str]":
    """A checkpoint's network for reading texts, without an engine; its tokenizer, and the device it is on.

    Args:
        context_times: how many times as long as in training the texts may be.

    Raises:
        UserError: as `load_chat_model`.
    """
    model, matrices, tokenizer, plan, _ = _load_network(storage, run, stage, None, dtype, step)
    from kernels import dispatch

    step_model, _ = dispatch.step_model(model, matrices, context=context_times * plan.model.sequence_len)
    return step_model, tokenizer, model.device.type


def _load_network(
    storage: str, run: str, stage: str, device: str | None, dtype: str | None, step: int | None
) -> "tuple[GPT, torch.dtype, Tokenizer, Plan, int]":
    """The network of a stage, the dtype its matrices shall have, its tokenizer, its plan, and the step it stands at."""
    from nanochat_ray.device import activations_of, pick_device, pick_used_dtype
    from nanochat_ray.tokenizer import Tokenizer
    from nanochat_ray.train.checkpoint import load_model

    require_trained(storage, run, stage)
    folder = run_folder(storage, run)
    on, _ = pick_device(device)
    matrices, _ = pick_used_dtype(on, dtype)
    tokenizer = Tokenizer.load(folder / "tokenizer")
    model, plan, step = load_model(folder / stage, tokenizer.fingerprint, on, activations_of(matrices), at_step=step)
    return model, matrices, tokenizer, plan, step


def _fingerprint(checkpoints: "Checkpoints", step: int, dtype: str | None, kernels: str) -> str:
    return f"{checkpoints.digest(step)} {dtype or ''}" + ("" if kernels == "auto" else f" kernels {kernels}")


def engine_of(
    model: "GPT",
    tokenizer: "Tokenizer",
    dtype: "torch.dtype",
    max_running: int = MAX_RUNNING,
    threads: int | None = None,
    kernels: str = "auto",
) -> tuple[Engine, str]:
    """An engine around a network, whose weights may be changed for it, and how it computes, in words."""
    from kernels import dispatch
    from nanochat_ray.model.execution import WISHES

    step_model, how = dispatch.step_model(model, dtype, threads, wanted=WISHES[kernels])
    step_tokens = max(max_running, STEP_TOKENS if model.device.type == "cpu" else GPU_STEP_TOKENS)
    kv_bytes = int(FREE_MEMORY_FOR_KV * _free_memory(model.device))
    return Engine(step_model, tokenizer, max_running, step_tokens, kv_bytes), how


def _free_memory(device: "torch.device") -> int:
    if device.type == "cuda":
        import torch

        return torch.cuda.mem_get_info(device)[0]
    import psutil

    return psutil.virtual_memory().available
