"""Reads a checkpoint folder of the public nanochat, of July 2026 or October 2025, as data.

    model_021400.pt     state dict of torch.save
    meta_021400.json    its `model_config`: sequence_len, vocab_size, n_layer, n_head, n_kv_head, n_embd, window_pattern

The generation is told from the tensors: July 2026 has residual and x0 scalars, smear, backout and value embeddings,
October 2025 has none of them. What has some is a model this code does not know, and is refused with what is odd in it.
"""

import hashlib
import json
import re
import tempfile
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from nanochat_ray.errors import UserError
from nanochat_ray.exchange.stored_run import misfits, shortened
from nanochat_ray.plan.shape import OCTOBER_2025, SMEAR_GATE_CHANNELS, ModelShape
from nanochat_ray.storage import Folder
from nanochat_ray.train.checkpoint import Tensors

JULY, OCTOBER = "July 2026", "October 2025"
SIZES = ("sequence_len", "vocab_size", "n_layer", "n_head", "n_kv_head", "n_embd")
MAX_SIZE, MAX_LAYERS, MAX_META_BYTES = 2**24, 2**10, 2**24
COMPILED_PREFIX = "_orig_mod."
BUFFERS = ("cos", "sin")  # rotary tables, which some versions stored
TABLES = ("transformer.wte.weight", "lm_head.weight")  # and value embeddings: a row per token
EXTRAS = re.compile(
    r"(resid_lambdas|x0_lambdas|smear_lambda|smear_gate\.|backout_lambda|value_embeds\.)|.*\.attn\.ve_gate\."
)


@dataclass(frozen=True, eq=False)
class NanochatCheckpoint:
    """A public checkpoint as our network takes it.

    Attributes:
        model: the shape.
        weights: fp32 on the CPU by the names of `GPT`'s parameters, tables padded to the padded vocabulary.
        step: of the source.
        generation: JULY or OCTOBER.
        sha256: of the tensor file.
    """

    model: ModelShape
    weights: Tensors
    step: int
    generation: str
    sha256: str


def read_checkpoint(folder: Folder, step: int | None = None) -> NanochatCheckpoint:
    """The newest checkpoint of the folder, or that of a step.

    Raises:
        UserError: there is none, a file is damaged or holds more than tensors, or it is not the checkpoint of a model
            of either generation; names the file, and every tensor that is missing, surplus or of another shape.
        OSError: the storage failed.
    """
    step = _find(folder, step)
    name = f"model_{step:06d}.pt"
    config = _read_config(folder, f"meta_{step:06d}.json")
    with _local(folder, name) as path:
        tensors = _read_tensors(path, folder / name)
        sha256 = _sha256(path)
        july = [key for key in tensors if EXTRAS.match(key)]
        model = _shape(config, bool(july), folder / f"meta_{step:06d}.json")
        weights = {key: _padded(key, tensor, model) for key, tensor in tensors.items()}
        if faults := misfits(model, weights):
            raise UserError(_unknown(folder / name, july, faults))
        for key, tensor in weights.items():
            weights[key] = tensor.to(torch.float32, copy=True)  # off the file
            if not weights[key].isfinite().all():
                raise UserError(f"{folder / name}: {key} has numbers that are not finite; take an earlier --step")
    return NanochatCheckpoint(model, weights, step, JULY if july else OCTOBER, sha256)


def _find(folder: Folder, step: int | None) -> int:
    found = [re.fullmatch(r"model_(\d{6,})\.pt", name) for name in folder.list()]
    steps = sorted(int(match[1]) for match in found if match)
    if not steps:
        raise UserError(
            f"no checkpoint of the public nanochat in {folder}: there is no model_NNNNNN.pt; give the folder that "
            "holds it with --source, such as base_checkpoints/d20"
        )
    if step is not None and step not in steps:
        raise UserError(f"no model_{step:06d}.pt in {folder}; there are steps {', '.join(map(str, steps))}")
    return steps[-1] if step is None else step


def _read_config(folder: Folder, name: str) -> dict[str, Any]:
    """`model_config` with a window pattern, its names and sizes checked."""
    size = folder.size(name)
    if size is None:
        raise UserError(f"{folder / name} is missing: the tensors beside it cannot be understood without it; copy both")
    if size > MAX_META_BYTES:
        raise UserError(
            f"{folder / name} has {size:,} bytes, which no description of a model needs; is it the right file?"
        )
    try:
        config = json.loads(folder.read(name))["model_config"]
        given = dict(config)
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise UserError(f"{folder / name} has no `model_config` that can be read ({error!r}); copy it again") from error
    config = {"window_pattern": "L", **given}
    missing, surplus = [key for key in SIZES if key not in config], sorted(config.keys() - {*SIZES, "window_pattern"})
    if missing or surplus:
        odd = [f"{what}: {', '.join(keys)}" for what, keys in (("missing", missing), ("unknown", surplus)) if keys]
        raise UserError(
            f"`model_config` in {folder / name} is of neither {JULY} nor {OCTOBER} ({'; '.join(odd)}); models of other "
            "versions would give other logits here"
        )
    return config


def _shape(config: dict[str, Any], is_july: bool, source: Folder) -> ModelShape:
    """The shape after checks that `misfits` cannot make."""

    def refuse(what: str) -> UserError:
        return UserError(f"`model_config` in {source} describes no model: {what}")

    for key in SIZES:
        if type(config[key]) is not int or not 0 < config[key] <= MAX_SIZE:
            raise refuse(f"{key} is {str(config[key])[:40]!r}")
    pattern = config["window_pattern"]
    if not isinstance(pattern, str) or not pattern or set(pattern.upper()) - set("SL"):
        raise refuse(f"window_pattern is {str(pattern)[:40]!r}, which is not made of S and L")
    if config["n_layer"] > MAX_LAYERS:
        raise refuse(f"n_layer is {config['n_layer']}")
    if config["n_embd"] % config["n_head"] or config["n_embd"] // config["n_head"] % 2:
        raise refuse(f"n_embd {config['n_embd']} does not give {config['n_head']} heads of an even size")
    if config["n_head"] % config["n_kv_head"]:
        raise refuse(f"n_kv_head {config['n_kv_head']} does not divide n_head {config['n_head']}")
    if is_july and config["n_embd"] < SMEAR_GATE_CHANNELS:
        raise refuse(f"n_embd is {config['n_embd']}, and the smear gate reads {SMEAR_GATE_CHANNELS} channels")
    if not is_july and set(pattern.upper()) != {"L"}:
        raise refuse(
            f"window_pattern is {pattern!r}, but the tensors are those of {OCTOBER}, which had no windows; models of "
            "versions in between would give other logits here"
        )
    sizes = {key: config[key] for key in SIZES}
    return ModelShape(**{**sizes, "window_pattern": pattern.upper(), **({} if is_july else OCTOBER_2025)})


@contextmanager
def _local(folder: Folder, name: str) -> Iterator[str]:
    """The path of a file; what lies in a store is copied first."""
    if folder.is_local:
        yield f"{folder}/{name}"
        return
    with tempfile.NamedTemporaryFile(suffix=".pt") as copy:
        for piece in folder.read_pieces(name):
            copy.write(piece)
        copy.flush()
        yield copy.name


def _sha256(path: str) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _read_tensors(path: str, source: Folder) -> Tensors:
    """The state dict under the names of an uncompiled model, mapped from the file where its format allows."""
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except Exception as error:  # whatever a damaged or hostile file makes of the reader
        reason = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
        if "weights_only" in reason:  # torch goes on to advise to run what is in it
            reason = "it holds more than tensors"
        raise UserError(
            f"{source} cannot be read as a file of tensors ({reason[:200]}); copy it again, or if it holds other "
            "objects, save its state dict alone"
        ) from error
    if not isinstance(content, dict) or not all(isinstance(key, str) for key in content):
        raise UserError(f"{source} is no state dict: it holds {type(content).__name__} and not tensors by name")
    strange = [key for key, value in content.items() if not _is_plain(value)]
    if strange:
        raise UserError(
            f"{source} holds {len(strange)} entries that are no plain tensors of real numbers: {shortened(strange)}"
        )
    with open(path, "rb") as file:
        size = file.seek(0, 2)
    if sum(tensor.nbytes for tensor in content.values()) > size:
        raise UserError(f"{source} names more numbers than its {size:,} bytes hold; it is damaged: copy it again")
    tensors = {key.removeprefix(COMPILED_PREFIX): value for key, value in content.items()}
    if len(tensors) < len(content):
        raise UserError(f"{source} has tensors both with and without the prefix {COMPILED_PREFIX}: which ones count?")
    return {key: value for key, value in tensors.items() if key not in BUFFERS}


def _is_plain(value: Any) -> bool:
    if not isinstance(value, torch.Tensor):
        return False
    return value.is_floating_point() and value.layout == torch.strided and value.device.type == "cpu"


def _padded(key: str, tensor: torch.Tensor, model: ModelShape) -> torch.Tensor:
    """A table of exactly the vocabulary gets rows of zeros, whose logits nobody sees; all else stays as it is."""
    rows = model.padded_vocab_size - model.vocab_size
    if key not in TABLES or tensor.dim() != 2 or len(tensor) != model.vocab_size or not rows:
        return tensor
    return torch.nn.functional.pad(tensor, (0, 0, 0, rows))


def _unknown(source: Folder, july: list[str], faults: list[str]) -> str:
    known = f"a model of {JULY}" if july else f"a model of {OCTOBER}"
    why = f"has {shortened(sorted(july))}" if july else f"has none of the extras of {JULY}"
    return (
        f"{source} is not the checkpoint of {known}, for which it was taken because it {why}. {'; '.join(faults)}. "
        f"Models of {JULY} and of {OCTOBER} can be imported, mixtures of them cannot"
    )
