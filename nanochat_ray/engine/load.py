"""From a run's folder to an engine that can answer."""

from dataclasses import dataclass
from typing import Any

from nanochat_ray.engine.engine import Engine
from nanochat_ray.errors import UserError
from nanochat_ray.storage import run_folder

CHAT_STAGES = ("sft", "base")  # a base model continues text; it was not taught to answer


@dataclass(frozen=True)
class ChatModel:
    """An engine with the name it goes by and the facts people ask about (JSON-able)."""

    engine: Engine
    name: str
    about: dict[str, Any]


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


def load_chat_model(
    storage: str, run: str, stage: str = "sft", device: str | None = None, dtype: str | None = None
) -> ChatModel:
    """Load the newest valid checkpoint of a run's stage.

    Raises:
        UserError: as `require_trained`, or no checkpoint verifies.
    """
    from nanochat_ray.device import pick_device, pick_dtype
    from nanochat_ray.tokenizer import Tokenizer
    from nanochat_ray.train.checkpoint import load_model

    require_trained(storage, run, stage)
    folder = run_folder(storage, run)
    on, _ = pick_device(device)
    activations, _ = pick_dtype(on, dtype)
    tokenizer = Tokenizer.load(folder / "tokenizer")
    model, plan, step = load_model(folder / stage, tokenizer.fingerprint, on, activations)
    model.freeze(activations)
    about = {
        "run": run,
        "stage": stage,
        "step": step,
        "depth": plan.depth,
        "context": model.config.sequence_len,
        "device": str(on),
        "dtype": str(activations).removeprefix("torch."),
    }
    return ChatModel(Engine(model, tokenizer), run, about)
