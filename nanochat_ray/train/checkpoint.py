"""Checkpoints that appear whole, verify themselves, and load under any number of workers.

    <stage>/checkpoints/step_000400/
        model.safetensors  optimizer.safetensors  state.json
        manifest.json          written last: name, size and sha256 of each file above, and the writer's lease

A folder without a manifest is a write that never finished; readers do not see it. Ray Train's own checkpoints are not
used: their index is private to Ray and pinned to its version, while these must be readable by the data pipeline, the
evaluator and the server, none of which runs under Ray Train.
"""

import functools
import hashlib
import json
import re
import struct
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, TypeVar

import torch

from nanochat_ray.cli import warn
from nanochat_ray.errors import UserError
from nanochat_ray.model.gpt import GPT, GPTConfig
from nanochat_ray.plan import Plan
from nanochat_ray.storage import Buffer, Folder
from nanochat_ray.stream.cursor import Cursor
from nanochat_ray.train.lease import Fence
from nanochat_ray.train.origin import CHECKPOINTS, START
from nanochat_ray.train.origin import checkpoint_name as _name

SCHEMA_VERSION = 1
MODEL, OPTIMIZER, STATE, MANIFEST = "model.safetensors", "optimizer.safetensors", "state.json", "manifest.json"
FILES = (MODEL, OPTIMIZER, STATE)
_FORMAT_NAMES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16", torch.int64: "I64"}
_FORMATS = {name: dtype for dtype, name in _FORMAT_NAMES.items()}
Tensors = dict[str, torch.Tensor]
Look = TypeVar("Look")


@dataclass(frozen=True)
class TrainState:
    """All that is saved besides tensors.

    Attributes:
        best_val_bpb: the lowest of all evaluations so far, in bits per byte.
        best_step: when that was; None: not since this is recorded.
        initial_model: the digest of the checkpoint whose weights the stage began with; None: it began at random.
    """

    plan: Plan
    cursor: Cursor
    best_val_bpb: float | None = None
    initial_model: str | None = None
    best_step: int | None = None

    def to_dict(self) -> dict[str, Any]:
        return {
            "schema": SCHEMA_VERSION,
            "plan": self.plan.to_dict(),
            "cursor": self.cursor.to_dict(),
            "best_val_bpb": self.best_val_bpb,
            "best_step": self.best_step,
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
            value.get("best_step"),
        )


@dataclass(frozen=True, eq=False)
class Loaded:
    """A checkpoint in memory: what was verified, from one read."""

    state: TrainState
    model: Tensors
    optimizer: Tensors


class _Damaged(Exception):
    """A checkpoint is not what was written; the message says where."""


@dataclass(frozen=True)
class Checkpoints:
    """The checkpoints of one stage of a run."""

    folder: Folder

    @staticmethod
    def of(stage: Folder) -> "Checkpoints":
        return Checkpoints(stage / CHECKPOINTS)

    def save(self, state: TrainState, model: Tensors, optimizer: Tensors, fence: Fence | None = None) -> int:
        """Write the checkpoint of `state.cursor.step`; returns its size in bytes.

        Args:
            fence: of the lease under which this is written; None: there can be no other writer.

        Raises:
            OSError: the storage refused; what was written is deleted if it can be, and invisible to readers anyway.
            UserError, GroupReplaced: as `Fence.require_current`.
        """
        place = self.folder / _name(state.cursor.step)
        if fence is not None:
            fence.require_current()  # the new owner's checkpoint may be of this very step
        place.delete()  # an unfinished attempt at the same step
        try:
            return self._write(place, state, model, optimizer, fence)
        except OSError:
            with suppress(OSError):
                place.delete()  # on a full disk its room lets the run end with a message
            raise

    def _write(self, place: Folder, state: TrainState, model: Tensors, optimizer: Tensors, fence: Fence | None) -> int:
        content: dict[str, Iterable[Buffer]] = {
            MODEL: in_safetensors(model),
            OPTIMIZER: in_safetensors(optimizer),
            STATE: [json.dumps(state.to_dict(), indent=2).encode()],
        }
        seals = {name: _Seal() for name in content}
        for name, pieces in content.items():
            place.write(name, seals[name].follow(pieces))
        if fence is not None:
            fence.require_current()
        lease = fence.number if fence is not None else None
        place.write_json(MANIFEST, {"files": {name: seal.to_dict() for name, seal in seals.items()}, "lease": lease})
        return sum(seal.bytes for seal in seals.values())

    def steps(self) -> list[int]:
        """Steps that have a finished checkpoint, ascending; their content is not verified."""
        found = [re.fullmatch(r"step_(\d+)", name) for name in self.folder.list()]
        steps = [int(match[1]) for match in found if match]
        return sorted(step for step in steps if (self.folder / _name(step)).exists(MANIFEST))

    def newest_valid(self, warn: Callable[[str], None], files: Sequence[str] = FILES) -> int | None:
        """The step of the newest checkpoint that verifies, warning about damaged newer ones; None if there is none.

        Args:
            files: those that must verify; the others are not read.

        Raises:
            UserError: there are checkpoints and all are damaged; to begin again must be the user's own decision.
        """
        found = self._newest(functools.partial(self._verify, files=files), warn)
        return None if found is None else found[0]

    def newest_whole(self, warn: Callable[[str], None]) -> int | None:
        """As `newest_valid`, by the state's hash and the sizes of the tensor files: nothing large is read.

        Who then loads the checkpoint may still find it damaged.
        """
        found = self._newest(self._measure, warn)
        return None if found is None else found[0]

    def load(self, warn: Callable[[str], None], files: Sequence[str] = FILES, step: int | None = None) -> Loaded | None:
        """The newest checkpoint that verifies, each of its files read once; otherwise as `newest_valid`.

        Args:
            files: which to read and verify, STATE among them; tensors of the others are left out.
            step: this one and no other.

        Raises:
            UserError: also when the one of `step` is missing or damaged.
        """
        if step is not None:
            if step not in (steps := self.steps()):
                known = ", ".join(map(str, steps)) or "none"
                raise UserError(f"no checkpoint of step {step} in {self.folder}; there are: {known}")
            try:
                read = self._read(step, files)
            except (_Damaged, FileNotFoundError) as damage:
                raise UserError(
                    f"checkpoint {self.folder / _name(step)} cannot be used ({damage}); take another step"
                ) from damage
        else:
            found = self._newest(lambda step: self._read(step, files), warn)
            if found is None:
                return None
            read = found[1]
        tensors = [from_safetensors(read.pop(name)) if name in files else {} for name in (MODEL, OPTIMIZER)]
        return Loaded(TrainState.from_dict(json.loads(read[STATE])), tensors[0], tensors[1])

    def _newest(self, look: Callable[[int], Look], warn: Callable[[str], None]) -> tuple[int, Look] | None:
        """The newest step whose checkpoint `look` does not find damaged, and what it found."""
        damaged: list[str] = []
        for step in reversed(self.steps()):
            try:
                found = look(step)
            except (_Damaged, FileNotFoundError) as damage:
                damaged.append(f"checkpoint {self.folder / _name(step)} is damaged ({damage})")
                continue
            for line in damaged:
                warn(f"{line}; using step {step}")
            return step, found
        if damaged:
            raise UserError(f"{'; '.join(damaged)}. No other is there: restore one, or start anew with --fresh")
        return None

    def _manifest(self, step: int) -> dict[str, dict[str, Any]]:
        """Size and hash by file name, as they were written."""
        try:
            files = json.loads((self.folder / _name(step)).read(MANIFEST))["files"]
            if sorted(files) == sorted(FILES):
                return {name: {"bytes": files[name]["bytes"], "sha256": files[name]["sha256"]} for name in FILES}
        except (ValueError, KeyError, TypeError) as error:
            raise _Damaged(f"{MANIFEST} is not valid: {error!r}") from error
        raise _Damaged(f"{MANIFEST} does not list its files")

    def _measure(self, step: int) -> None:
        seals = self._manifest(step)
        for name, seal in seals.items():
            size = (self.folder / _name(step)).size(name)
            if size != seal["bytes"]:
                raise _Damaged(f"{name} has {size} bytes instead of {seal['bytes']}")
        self._content(step, {STATE: seals[STATE]})

    def _verify(self, step: int, files: Sequence[str]) -> None:
        seals = self._manifest(step)
        for name in files:
            for _ in _sealed((self.folder / _name(step)).read_pieces(name), name, seals[name]):
                pass

    def _read(self, step: int, names: Sequence[str]) -> dict[str, bytearray]:
        seals = self._manifest(step)
        return self._content(step, {name: seals[name] for name in names})

    def _content(self, step: int, seals: dict[str, dict[str, Any]]) -> dict[str, bytearray]:
        content = {name: bytearray() for name in seals}
        for name, data in content.items():
            for piece in _sealed((self.folder / _name(step)).read_pieces(name), name, seals[name]):
                data += piece
        return content

    def digest(self, step: int) -> str:
        """The sha256 of a checkpoint's weights."""
        return (self.folder / _name(step)).read_json(MANIFEST)["files"][MODEL]["sha256"]

    def state(self, step: int) -> TrainState:
        return TrainState.from_dict((self.folder / _name(step)).read_json(STATE))

    def model(self, step: int) -> Tensors:
        return from_safetensors(bytearray((self.folder / _name(step)).read(MODEL)))

    def optimizer(self, step: int) -> Tensors:
        return from_safetensors(bytearray((self.folder / _name(step)).read(OPTIMIZER)))

    def prune(self, keep: int, best: int | None = None) -> None:
        """Delete what is older than the newest `keep` (at least 1) finished checkpoints, but for the `best` step's.

        Imported weights, the checkpoint of step 0, stay as well.
        """
        oldest_kept = self.steps()[-keep:][0]
        self._delete(lambda step: START < step < oldest_kept and step != best)

    def delete_after(self, step: int) -> None:
        """Delete what lies beyond a step from which training goes on: damaged, or never finished."""
        self._delete(lambda other: other > step)

    def _delete(self, unwanted: Callable[[int], bool]) -> None:
        for name in self.folder.list():
            match = re.fullmatch(r"step_(\d+)", name)
            if match and unwanted(int(match[1])):
                (self.folder / name).delete(MANIFEST)  # first, so that a reader never sees a half-deleted one
                self.folder.delete(name)


class _Seal:
    """Size and hash of a file that passes by in pieces."""

    def __init__(self) -> None:
        self.bytes = 0
        self._sha256 = hashlib.sha256()

    def follow(self, pieces: Iterable[Buffer]) -> Iterator[Buffer]:
        for piece in pieces:
            self.bytes += len(piece)
            self._sha256.update(piece)
            yield piece

    def to_dict(self) -> dict[str, Any]:
        return {"bytes": self.bytes, "sha256": self._sha256.hexdigest()}


def _sealed(pieces: Iterator[bytes], name: str, expected: dict[str, Any]) -> Iterator[Buffer]:
    """The pieces of a file; _Damaged at their end unless they have the size and hash that it was written with."""
    seal = _Seal()
    yield from seal.follow(pieces)
    if seal.to_dict() != expected:
        raise _Damaged(f"{name} is not what was written")


def in_safetensors(tensors: Tensors, notes: dict[str, str] | None = None) -> Iterator[Buffer]:
    """The tensors in the safetensors format, one at a time: the library's own writer first copies all of them.

    Format: length of the header (8 bytes, little-endian), the header as JSON padded to 8 bytes, the data one after
    another (https://github.com/huggingface/safetensors#format). `notes` are text in the header, for other readers.
    """
    header: dict[str, Any] = {"__metadata__": notes} if notes else {}
    end = 0
    for name, tensor in tensors.items():
        start, end = end, end + tensor.nbytes
        header[name] = {"dtype": _FORMAT_NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    yield struct.pack("<Q", len(text)) + text
    for tensor in tensors.values():
        yield tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data


def from_safetensors(data: bytearray) -> Tensors:
    """The tensors of a file in that format, as views of `data`: the library's own reader copies all of them."""
    (length,) = struct.unpack_from("<Q", data)
    tensors: Tensors = {}
    header = json.loads(data[8 : 8 + length])
    header.pop("__metadata__", None)
    for name, entry in header.items():
        start, end = entry["data_offsets"]
        whole = torch.empty(0, dtype=torch.uint8)
        if end > start:
            whole = torch.frombuffer(data, dtype=torch.uint8, offset=8 + length + start, count=end - start)
        dtype = _FORMATS[entry["dtype"]]
        if whole.data_ptr() % dtype.itemsize:  # after a tensor of narrower numbers
            whole = whole.clone()
        tensors[name] = whole.view(dtype).view(entry["shape"])
    return tensors


def build_model(plan: Plan) -> GPT:
    """The plan's model with its initial weights, fp32 on the CPU."""
    model = GPT(GPTConfig.from_shape(plan.model))
    model.init_weights(plan.seed)
    return model


def imported_digest(stage: Folder) -> str:
    """The digest of the weights that were imported into a stage.

    Raises:
        UserError: they are not there: the import never finished, or they were deleted.
    """
    try:
        return Checkpoints.of(stage).digest(START)
    except FileNotFoundError as error:
        raise UserError(
            f"{stage} was imported, but its checkpoint of step {START} is not there: run the import again"
        ) from error


def load_model(
    stage: Folder,
    tokenizer_fingerprint: str,
    device: torch.device,
    dtype: torch.dtype,
    warn: Callable[[str], None] = warn,
    at_step: int | None = None,
) -> tuple[GPT, Plan, int]:
    """The newest valid model of a stage, ready for inference, with its plan and step.

    Args:
        dtype: of the activations and of the stored matrices.
        at_step: the model of this step instead of the newest one.

    Raises:
        UserError: the stage has no usable checkpoint, or was trained with another tokenizer.
    """
    loaded = Checkpoints.of(stage).load(warn, (MODEL, STATE), at_step)
    if loaded is None:
        raise UserError(
            f"no trained model in {stage}: run the stage that writes it first (pretrain for base, then sft)"
        )
    state = loaded.state
    if state.cursor.identity.tokenizer != tokenizer_fingerprint:
        raise UserError(
            f"{stage} was trained with another tokenizer than the one that is in its run now; "
            "put the old one back, or train again with --fresh"
        )
    plan = state.plan
    with torch.device("meta"):  # to draw initial weights would take longer than to read the trained ones
        model = GPT(GPTConfig.from_shape(plan.model))
    model.load_state_dict(loaded.model, assign=True)
    return model.to(device).freeze(dtype), plan, state.cursor.step
