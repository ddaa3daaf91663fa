"""Checkpoints that appear whole, verify themselves, and load under any number of workers.

    <stage>/checkpoints/step_000400/
        model.safetensors  optimizer.safetensors  state.json
        manifest.json          written last: name, size and sha256 of each file above

A folder without a manifest is a write that never finished; readers do not see it. Ray Train's own checkpoints are not
used: their index is private to Ray and pinned to its version, while these must be readable by the data pipeline, the
evaluator and the server, none of which runs under Ray Train.
"""

import hashlib
import json
import re
import struct
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from safetensors.torch import load as load_tensors

from nanochat_ray.errors import UserError
from nanochat_ray.model.gpt import GPT, GPTConfig
from nanochat_ray.plan import Plan
from nanochat_ray.storage import Buffer, Folder
from nanochat_ray.stream.cursor import Cursor

SCHEMA_VERSION = 1
MODEL, OPTIMIZER, STATE, MANIFEST = "model.safetensors", "optimizer.safetensors", "state.json", "manifest.json"
_FORMAT_NAMES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16", torch.int64: "I64"}
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
        content: dict[str, Iterable[Buffer]] = {
            MODEL: _in_safetensors(model),
            OPTIMIZER: _in_safetensors(optimizer),
            STATE: [json.dumps(state.to_dict(), indent=2).encode()],
        }
        seals = {name: _Seal() for name in content}
        for name, pieces in content.items():
            place.write(name, seals[name].follow(pieces))
        place.write_json(MANIFEST, {"files": {name: seal.to_dict() for name, seal in seals.items()}})
        return sum(seal.bytes for seal in seals.values())

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
                if _Seal.of(place.read_pieces(name)).to_dict() != seal:
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


class _Seal:
    """Size and hash of a file that passes by in pieces."""

    def __init__(self) -> None:
        self.bytes = 0
        self._sha256 = hashlib.sha256()

    @staticmethod
    def of(pieces: Iterable[Buffer]) -> "_Seal":
        seal = _Seal()
        for _ in seal.follow(pieces):
            pass
        return seal

    def follow(self, pieces: Iterable[Buffer]) -> Iterator[Buffer]:
        for piece in pieces:
            self.bytes += len(piece)
            self._sha256.update(piece)
            yield piece

    def to_dict(self) -> dict[str, Any]:
        return {"bytes": self.bytes, "sha256": self._sha256.hexdigest()}


def _in_safetensors(tensors: Tensors) -> Iterator[Buffer]:
    """The tensors in the safetensors format, one at a time: the library's own writer first copies all of them.

    Format: length of the header (8 bytes, little-endian), the header as JSON padded to 8 bytes, the data one after
    another (https://github.com/huggingface/safetensors#format).
    """
    header, end = {}, 0
    for name, tensor in tensors.items():
        start, end = end, end + tensor.nbytes
        header[name] = {"dtype": _FORMAT_NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    yield struct.pack("<Q", len(text)) + text
    for tensor in tensors.values():
        yield tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data


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
