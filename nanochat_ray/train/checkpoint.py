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

from nanochat_ray.cli import warn
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
    """All that is saved besides tensors.

    Attributes:
        initial_model: the digest of the checkpoint whose weights the stage began with; None: it began at random.
    """

    plan: Plan
    cursor: Cursor
    best_val_bpb: float | None = None
    initial_model: str | None = None

    def to_dict(self) -> dict[str, Any]:
        return {
            "schema": SCHEMA_VERSION,
            "plan": self.plan.to_dict(),
            "cursor": self.cursor.to_dict(),
            "best_val_bpb": self.best_val_bpb,
            "initial_model": self.initial_model,
        }

    @staticmethod
    def from_dict(value: dict[str, Any]) -> "TrainState":
        if value.get("schema") != SCHEMA_VERSION:
            raise UserError(f"checkpoint schema {value.get('schema')} is not {SCHEMA_VERSION}; train with --fresh")
        return TrainState(
            Plan.from_dict(value["plan"]),
            Cursor.from_dict(value["cursor"]),
            value["best_val_bpb"],
            value.get("initial_model"),
        )


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
        """The step of the newest checkpoint that verifies, warning about damaged newer ones; None if there is none.

        Raises:
            UserError: there are checkpoints and all are damaged; to begin again must be the user's own decision.
        """
        damaged: list[str] = []
        for step in reversed(self.steps()):
            damage = self.damage(step)
            if damage is None:
                for line in damaged:
                    warn(f"{line}; using step {step}")
                return step
            damaged.append(f"checkpoint {self.folder / _name(step)} is damaged ({damage})")
        if damaged:
            raise UserError(f"{'; '.join(damaged)}. No other is there: restore one, or start anew with --fresh")
        return None

    def damage(self, step: int) -> str | None:
        """What is wrong with a checkpoint, or None when every file has the size and hash it was written with."""
        place = self.folder / _name(step)
        try:
            files = place.read_json(MANIFEST)["files"]
            if sorted(files) != sorted((MODEL, OPTIMIZER, STATE)):
                return f"{MANIFEST} does not list its files"
            for name in files:
                if _Seal.of(place.read_pieces(name)).to_dict() != files[name]:
                    return f"{name} is not what was written"
        except (FileNotFoundError, KeyError, TypeError, UserError) as error:
            return str(error)
        return None

    def digest(self, step: int) -> str:
        """The sha256 of a checkpoint's weights."""
        return (self.folder / _name(step)).read_json(MANIFEST)["files"][MODEL]["sha256"]

    def state(self, step: int) -> TrainState:
        return TrainState.from_dict((self.folder / _name(step)).read_json(STATE))

    def model(self, step: int) -> Tensors:
        return load_tensors((self.folder / _name(step)).read(MODEL))

    def optimizer(self, step: int) -> Tensors:
        return load_tensors((self.folder / _name(step)).read(OPTIMIZER))

    def prune(self, keep: int) -> None:
        """Delete all but the newest `keep` (at least 1) finished checkpoints, and unfinished ones older than those."""
        oldest_kept = self.steps()[-keep:][0]
        self._delete(lambda step: step < oldest_kept)

    def delete_after(self, step: int) -> None:
        """Delete what lies beyond a step from which training goes on: damaged, or never finished."""
        self._delete(lambda other: other > step)

    def _delete(self, unwanted: Callable[[int], bool]) -> None:
        for name in self.folder.list():
            match = re.fullmatch(r"step_(\d+)", name)
            if match and unwanted(int(match[1])):
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
    tokenizer_fingerprint: str,
    device: torch.device,
    dtype: torch.dtype,
    warn: Callable[[str], None] = warn,
) -> tuple[GPT, Plan, int]:
    """The newest valid model of a stage, ready for inference, with its plan and step.

    Args:
        dtype: of the activations and of the stored matrices.

    Raises:
        UserError: the stage has no usable checkpoint, or was trained with another tokenizer.
    """
    checkpoints = Checkpoints.of(stage)
    step = checkpoints.newest_valid(warn)
    if step is None:
        raise UserError(
            f"no trained model in {stage}: run the stage that writes it first (pretrain for base, then sft)"
        )
    state = checkpoints.state(step)
    if state.cursor.identity.tokenizer != tokenizer_fingerprint:
        raise UserError(
            f"{stage} was trained with another tokenizer than the one that is in its run now; "
            "put the old one back, or train again with --fresh"
        )
    plan = state.plan
    model = build_model(plan)
    model.load_state_dict(checkpoints.model(step))
    return model.to(device).freeze(dtype), plan, step
