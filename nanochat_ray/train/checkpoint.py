"""Checkpoints that appear whole, verify themselves, and load under any number of workers.

    <stage>/checkpoints/step_000400/
        model.safetensors  optimizer.safetensors  state.json
        manifest.json          written last: name, size and sha256 of each file above

A folder without a manifest is a write that never finished; readers do not see it. Ray Train's own checkpoints are not
used: their index is private to Ray and pinned to its version, while these must be readable by the data pipeline, the
evaluator and the server, none of which runs under Ray Train.
"""

import hashlib
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors

from nanochat_ray.errors import UserError
from nanochat_ray.model.gpt import GPT, GPTConfig
from nanochat_ray.plan import Plan
from nanochat_ray.storage import Folder
from nanochat_ray.stream.cursor import Cursor

SCHEMA_VERSION = 1
MODEL, OPTIMIZER, STATE, MANIFEST = "model.safetensors", "optimizer.safetensors", "state.json", "manifest.json"
Tensors = dict[str, torch.Tensor]


@dataclass(frozen=True)
class TrainState:
    """All that is saved besides tensors: the plan, where the stream stands, and the best evaluation so far."""

    plan: Plan
    cursor: Cursor
    best_val_bpb: float | None = None

    def to_dict(self) -> dict[str, Any]:
        return {
            "schema": SCHEMA_VERSION,
            "plan": self.plan.to_dict(),
            "cursor": self.cursor.to_dict(),
            "best_val_bpb": self.best_val_bpb,
        }

    @staticmethod
    def from_dict(value: dict[str, Any]) -> "TrainState":
        if value.get("schema") != SCHEMA_VERSION:
            raise UserError(f"checkpoint schema {value.get('schema')} is not {SCHEMA_VERSION}; train with --fresh")
        return TrainState(Plan.from_dict(value["plan"]), Cursor.from_dict(value["cursor"]), value["best_val_bpb"])


@dataclass(frozen=True)
class Checkpoints:
    """The checkpoints of one stage of a run."""

    folder: Folder

    @staticmethod
    def of(stage: Folder) -> "Checkpoints":
        return Checkpoints(stage / "checkpoints")

    def save(self, state: TrainState, model: Tensors, optimizer: Tensors) -> int:
        """Write the checkpoint of `state.cursor.step`; returns its size in bytes.

        Raises:
            OSError: the storage refused; what was written stays invisible to readers.
        """
        place = self.folder / _name(state.cursor.step)
        place.delete()  # an unfinished attempt at the same step
        manifest = {}
        for name, tensors in ((MODEL, model), (OPTIMIZER, optimizer)):
            data = save_tensors(tensors)
            place.write(name, data)
            manifest[name] = _seal(data)
        place.write_json(STATE, state.to_dict())
        manifest[STATE] = _seal(place.read(STATE))
        place.write_json(MANIFEST, {"files": manifest})
        return sum(seal["bytes"] for seal in manifest.values())

    def steps(self) -> list[int]:
        """Steps that have a finished checkpoint, ascending; their content is not verified."""
        found = [re.fullmatch(r"step_(\d+)", name) for name in self.folder.list()]
        steps = [int(match[1]) for match in found if match]
        return sorted(step for step in steps if (self.folder / _name(step)).exists(MANIFEST))

    def newest_valid(self, warn: Callable[[str], None]) -> int | None:
        """The step of the newest checkpoint that verifies, warning about each damaged one passed over."""
        for step in reversed(self.steps()):
            damage = self.damage(step)
            if damage is None:
                return step
            warn(f"checkpoint {self.folder}/{_name(step)} is damaged ({damage}); using the one before it")
        return None

    def damage(self, step: int) -> str | None:
        """What is wrong with a checkpoint, or None when every file has the size and hash it was written with."""
        place = self.folder / _name(step)
        try:
            files = place.read_json(MANIFEST)["files"]
            for name, seal in files.items():
                if _seal(place.read(name)) != seal:
                    return f"{name} is not what was written"
        except (FileNotFoundError, KeyError, TypeError, UserError) as error:
            return str(error)
        return None

    def state(self, step: int) -> TrainState:
        return TrainState.from_dict((self.folder / _name(step)).read_json(STATE))

    def model(self, step: int) -> Tensors:
        return load_tensors((self.folder / _name(step)).read(MODEL))

    def optimizer(self, step: int) -> Tensors:
        return load_tensors((self.folder / _name(step)).read(OPTIMIZER))

    def prune(self, keep: int) -> None:
        """Delete all but the newest `keep` finished checkpoints, and unfinished ones older than those."""
        oldest_kept = self.steps()[-keep:][0]
        for name in self.folder.list():
            match = re.fullmatch(r"step_(\d+)", name)
            if match and int(match[1]) < oldest_kept:
                (self.folder / name).delete(MANIFEST)  # first, so that a reader never sees a half-deleted one
                self.folder.delete(name)


def _name(step: int) -> str:
    return f"step_{step:06d}"


def _seal(data: bytes) -> dict[str, Any]:
    return {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}


def build_model(plan: Plan) -> GPT:
    """The plan's model with its initial weights, fp32 on the CPU."""
    model = GPT(GPTConfig.from_shape(plan.model))
    model.init_weights(plan.seed)
    return model


def load_model(
    stage: Folder,
    device: torch.device,
    dtype: torch.dtype,
    warn: Callable[[str], None] = print,
) -> tuple[GPT, Plan, int]:
    """The newest valid model of a stage, ready for inference, with its plan and step.

    Args:
        dtype: of the activations and of the stored matrices.

    Raises:
        UserError: the stage has no usable checkpoint.
    """
    checkpoints = Checkpoints.of(stage)
    step = checkpoints.newest_valid(warn)
    if step is None:
        raise UserError(
            f"no trained model in {stage}: run the stage that writes it first (pretrain for base, then sft)"
        )
    plan = checkpoints.state(step).plan
    model = build_model(plan)
    model.load_state_dict(checkpoints.model(step))
    return model.to(device).freeze(dtype), plan, step
