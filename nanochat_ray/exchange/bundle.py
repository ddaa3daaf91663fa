"""A model as one self-contained folder, sealed by one digest: what `jobs.export` writes and anyone can load.

    model.safetensors  config.json  generation_config.json  modeling_nanochat_ray.py (only where transformers needs it)
    tokenizer.json  tokenizer_config.json  special_tokens_map.json  chat_template.jinja      for Hugging Face
    tokenizer/{tokenizer.json,ranks.tiktoken}  README.md  report.md (where the run has one)
    bundle.json     written last: shape, source, size and sha256 of each file above, and a digest over all of these

A folder without bundle.json is a write that never finished, or a model that somebody else saved under the same names.
Files that are no part of a bundle mean nothing to it.
"""

import hashlib
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from nanochat_ray.errors import UserError
from nanochat_ray.exchange.hf_model import MODELING, from_hf
from nanochat_ray.exchange.stored_run import Imported
from nanochat_ray.plan.shape import ModelShape
from nanochat_ray.storage import Buffer, Folder
from nanochat_ray.tokenizer import Tokenizer
from nanochat_ray.train.checkpoint import Tensors, from_safetensors
from nanochat_ray.train.origin import Origin

FORMAT = 1
MANIFEST, WEIGHTS, TOKENIZER = "bundle.json", "model.safetensors", "tokenizer"
PARTS = (
    WEIGHTS, "config.json", "generation_config.json", f"{MODELING}.py", "tokenizer.json", "tokenizer_config.json",
    "special_tokens_map.json", "chat_template.jinja", f"{TOKENIZER}/tokenizer.json", f"{TOKENIZER}/ranks.tiktoken",
    "README.md", "report.md",
)  # fmt: skip
_PARTIAL = re.compile(r"(.+)\.[0-9a-f]{8}\.partial")
Content = bytes | Callable[[], Iterable[Buffer]]  # of a file, whole or in pieces that can be made more than once


@dataclass(frozen=True, eq=False)
class Bundle:
    """A bundle in memory, verified.

    Attributes:
        tensors: fp32 on the CPU, by the names of `GPT`'s parameters.
        stage: "base" or "sft": what the model was trained to do.
        source: where it comes from: run, step, tokens, corpus, hashes, evaluations (JSON-able).
        digest: hex sha256 over everything; equal exactly when two bundles are.
    """

    shape: ModelShape
    tensors: Tensors
    tokenizer: Tokenizer
    stage: str
    source: dict[str, Any]
    digest: str


@dataclass(frozen=True)
class Facts:
    """What bundle.json says besides the files; see `Bundle`."""

    shape: ModelShape
    stage: str
    tokenizer: str  # its fingerprint
    source: dict[str, Any]


def is_bundle(folder: Folder) -> bool:
    """Whether a finished bundle is there; its content is not verified."""
    return folder.exists(MANIFEST)


def read_bundle(folder: Folder) -> Bundle:
    """The model in a bundle, after every file was compared with its seal.

    Raises:
        UserError: there is no bundle, or it is not the one that was written: names the file that is missing, damaged
            or of another bundle.
    """
    manifest = _read_manifest(folder)
    weights = bytearray()
    for name in sorted(manifest["files"]):
        for piece in _verified(folder, name, manifest["files"][name]):
            if name == WEIGHTS:
                weights += piece
    facts = _facts(folder, manifest)
    tokenizer = Tokenizer.load(folder / TOKENIZER)
    if tokenizer.fingerprint != facts.tokenizer:
        raise _damaged(folder, TOKENIZER, "it is not the tokenizer that the model was trained with")
    tensors = from_hf(facts.shape, from_safetensors(weights))
    return Bundle(facts.shape, tensors, tokenizer, facts.stage, facts.source, manifest["digest"])


def imported(bundle: Bundle, folder: Folder) -> Imported:
    """What `store_run` writes as a stage of a run.

    Args:
        folder: where the bundle was read from; a note for people.
    """
    facts = {"source": str(folder), **{name: bundle.source.get(name) for name in ("run", "stage", "step", "tokens")}}
    return Imported(bundle.tensors, bundle.tokenizer, Origin("bundle", bundle.digest, bundle.shape, facts))


def verify_bundle(folder: Folder) -> str:
    """The digest of a bundle whose files are all what was written; reads them and keeps nothing.

    Raises:
        UserError: as `read_bundle`.
    """
    manifest = _read_manifest(folder)
    for name, seal in manifest["files"].items():
        for _ in _verified(folder, name, seal):
            pass
    return manifest["digest"]


def write_bundle(folder: Folder, facts: Facts, files: Mapping[str, Content], fresh: bool) -> tuple[str, bool]:
    """Write a bundle; the same one, found whole, is left alone.

    Args:
        fresh: put it in the place of another bundle, or of a model of whatever origin.

    Returns:
        its digest, and whether anything was written.

    Raises:
        UserError: the folder holds another bundle, a model that is none, or other files; nothing is overwritten then.
        OSError: the storage failed; what was written is no bundle yet, and the same call goes on from there.
    """
    manifest: dict[str, Any] = {
        "format": FORMAT,
        "shape": asdict(facts.shape),
        "stage": facts.stage,
        "tokenizer": facts.tokenizer,
        "source": facts.source,
        "files": {name: _seal(_pieces(content)) for name, content in sorted(files.items())},
    }
    manifest["digest"] = _digest(manifest)
    written: set[str] = set()
    if is_bundle(folder):
        if _is_intact(folder, manifest["digest"]):
            return manifest["digest"], False
        if not fresh:
            raise UserError(
                f"{folder} holds another bundle, or a damaged one; give another folder with --to, or replace it with "
                "--fresh"
            )
    elif strangers := _strangers(folder):
        raise UserError(
            f"{folder} holds other files ({', '.join(strangers[:4])}), and a bundle has a folder of its own; "
            "give another one with --to"
        )
    elif not fresh:
        written = _written_before(folder, manifest["files"])
    for name in (MANIFEST, *PARTS):  # the manifest first, so that a reader never sees a half-deleted bundle
        if name not in written:
            folder.delete(name)
    for name in _partial(folder):
        folder.delete(name)
    for name, content in files.items():
        if name not in written:
            folder.write(name, _pieces(content))
    folder.write_json(MANIFEST, manifest)
    return manifest["digest"], True


def _strangers(folder: Folder) -> list[str]:
    """Files and folders that are no part of a bundle; hidden ones, as those of git, may live beside it."""
    known = {name.split("/")[0] for name in (*PARTS, *_partial(folder))}
    return [name for name in folder.list() if name not in known and not name.startswith(".")]


def _partial(folder: Folder) -> list[str]:
    """What a process that was killed while it wrote a part has left; see `Folder.write`."""
    found = [*folder.list(), *(f"{TOKENIZER}/{name}" for name in (folder / TOKENIZER).list())]
    return [name for name in found if (match := _PARTIAL.fullmatch(name)) and match[1] in (MANIFEST, *PARTS)]


def _written_before(folder: Folder, seals: Mapping[str, dict[str, Any]]) -> set[str]:
    """The parts that an interrupted write of the same bundle left, which need not be written again.

    Others save models under the same names, without a bundle.json: whatever differs from its seal may be their work.
    """
    found = [name for name in PARTS if folder.exists(name)]
    strange = [name for name in found if not _is_sealed(folder, name, seals.get(name))]
    if strange:
        raise UserError(
            f"{folder} holds a model that is not the one to be written ({', '.join(strange)}), and no {MANIFEST}, so "
            "that it may be somebody's only copy; give another folder with --to, or replace it with --fresh"
        )
    return set(found)


def _is_sealed(folder: Folder, name: str, seal: dict[str, Any] | None) -> bool:
    return seal is not None and folder.size(name) == seal["bytes"] and _seal(folder.read_pieces(name)) == seal


def _is_intact(folder: Folder, digest: str) -> bool:
    try:
        return verify_bundle(folder) == digest
    except UserError:
        return False  # damaged: to be replaced like another one


def _read_manifest(folder: Folder) -> dict[str, Any]:
    try:
        manifest = folder.read_json(MANIFEST)
    except FileNotFoundError:
        raise UserError(
            f"no bundle in {folder}: there is no {MANIFEST}, which is written last; export the model again with "
            "`python -m jobs.export`"
        ) from None
    except OSError as error:
        raise UserError(f"{folder / MANIFEST} cannot be read ({error})") from error
    except UserError as error:
        raise _damaged(folder, MANIFEST, "it is not JSON") from error
    if not isinstance(manifest, dict):
        raise _damaged(folder, MANIFEST, "it is no description of a bundle")
    if manifest.get("format") != FORMAT:
        raise UserError(
            f"{folder / MANIFEST} is not of format {FORMAT}, which this version reads; export again with it"
        )
    if manifest.get("digest") != _digest({key: value for key, value in manifest.items() if key != "digest"}):
        raise _damaged(folder, MANIFEST, "its digest does not fit what it says")
    if not {WEIGHTS, f"{TOKENIZER}/ranks.tiktoken"} <= {*manifest.get("files", ())} <= {*PARTS}:
        raise _damaged(folder, MANIFEST, "it does not list the parts of a bundle")
    return manifest


def _facts(folder: Folder, manifest: dict[str, Any]) -> Facts:
    try:
        shape = ModelShape(**manifest["shape"])
        return Facts(shape, manifest["stage"], manifest["tokenizer"], manifest["source"])
    except (KeyError, TypeError) as error:
        raise UserError(f"{folder / MANIFEST} does not fit this version of nanochat_ray ({error!r})") from error


def _verified(folder: Folder, name: str, seal: dict[str, Any]) -> Iterator[bytes]:
    """The pieces of a file; UserError at their end at the latest when it is not the one that was written."""
    size = folder.size(name)
    if size is None:
        raise _damaged(folder, name, "it is missing")
    if size != seal["bytes"]:
        raise _damaged(folder, name, f"it has {size:,} bytes instead of {seal['bytes']:,}")
    sha256 = hashlib.sha256()
    for piece in folder.read_pieces(name):
        sha256.update(piece)
        yield piece
    if sha256.hexdigest() != seal["sha256"]:
        raise _damaged(folder, name, "its sha256 is not the one in bundle.json")


def _damaged(folder: Folder, name: str, what: str) -> UserError:
    return UserError(
        f"{folder / name} is damaged or of another bundle ({what}); the parts of a bundle belong together: copy the "
        "whole folder again, or export anew with `python -m jobs.export`"
    )


def _pieces(content: Content) -> Iterable[Buffer]:
    return [content] if isinstance(content, bytes) else content()


def _seal(pieces: Iterable[Buffer]) -> dict[str, Any]:
    size, sha256 = 0, hashlib.sha256()
    for piece in pieces:
        size += len(piece)
        sha256.update(piece)
    return {"bytes": size, "sha256": sha256.hexdigest()}


def _digest(manifest: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()
