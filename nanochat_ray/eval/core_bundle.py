"""The bundle of CORE's questions: fetched once, verified, and read into tasks.

    eval_bundle/core.yaml               which tasks, with their number of shots and their type
    eval_bundle/eval_meta_data.csv      each task's random baseline, in percent
    eval_bundle/eval_data/…/*.jsonl     the questions
    eval_bundle/openai-community-*.csv  what GPT-2 reaches, where the bundle has them

Published as https://karpathy-public.s3.us-west-2.amazonaws.com/eval_bundle.zip; the tasks are those of DCLM's CORE
(Li et al., "DataComp-LM", 2024, arXiv:2406.11794).
"""

import csv
import io
import json
import os
import tempfile
import threading
import zipfile
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import yaml

from nanochat_ray import __version__
from nanochat_ray.cli import warn
from nanochat_ray.data.download import PUBLIC_SETS
from nanochat_ray.data.transfer import Patience, fetch_file
from nanochat_ray.errors import UserError
from nanochat_ray.eval.core import CoreTask, check_items
from nanochat_ray.storage import Folder, data_folder

BUNDLE_URL = "https://karpathy-public.s3.us-west-2.amazonaws.com/eval_bundle.zip"
URL_VARIABLE = "NANOCHAT_RAY_EVAL_BUNDLE_URL"
_INDEX, _BASELINES, _DATA = "core.yaml", "eval_meta_data.csv", "eval_data"
_REFERENCES = {
    "openai-community-gpt2.csv": "GPT-2 124M",
    "openai-community-gpt2-medium.csv": "GPT-2 355M",
    "openai-community-gpt2-large.csv": "GPT-2 774M",
    "openai-community-gpt2-xl.csv": "GPT-2 1.5B",
}


@dataclass(frozen=True)
class Bundle:
    """All tasks in the order of the index.

    references   {model: {"mean": CORE, "tasks": {task: centred accuracy}}} of models that were measured by others
    """

    tasks: tuple[CoreTask, ...]
    references: Mapping[str, Mapping[str, Any]]

    def asked(self, most: int | None) -> list[CoreTask]:
        """The tasks as they are asked: shuffled, at most `most` questions of each.

        Raises:
            UsageError: too few for the examples that a task shows.
        """
        return [task.shuffled(most) for task in self.tasks]


def bundle_source(chosen: str | None, corpus: str) -> str | None:
    """Where CORE's questions come from, for `bundle_of`; None: they are not asked.

    Args:
        chosen: `--bundle`. Without it, models of public corpora are asked the public ones; those of the demo or of
            someone's own corpus may have no network, and small ones would only guess.
    """
    source = chosen or ("public" if corpus in PUBLIC_SETS else "none")
    return None if source == "none" else source


def bundle_of(source: str, storage: str) -> Bundle:
    """The bundle of `--bundle`: "public", which is downloaded into the storage once, or where one is.

    Raises:
        UserError: as `fetch_bundle` and `open_bundle`.
    """
    if source != "public":
        return open_bundle(Folder.at(source))
    folder = fetch_bundle(data_folder(storage) / "eval_bundle")
    try:
        return open_bundle(folder)
    except UserError as error:
        raise UserError(f"{error}: delete {folder} and run the same command again") from error


def fetch_bundle(folder: Folder, url: str | None = None, patience: Patience | None = None) -> Folder:
    """Have the public bundle in `folder`, downloading it if it is not there; returns `folder`.

    It is opened before any of it is written there, and the index is written last: a folder that has it is whole.

    Raises:
        UserError: it cannot be fetched, is no such bundle, or cannot be written.
    """
    if folder.exists(_INDEX):
        return folder
    url = url or os.environ.get(URL_VARIABLE) or BUNDLE_URL
    patience = patience or Patience()
    folder.require_writable()
    print(f"fetching CORE's questions from {url}", flush=True)
    headers = {"User-Agent": f"nanochat_ray/{__version__}"}
    with (
        tempfile.TemporaryDirectory() as scratch,
        httpx.Client(follow_redirects=True, timeout=patience.stall_s, headers=headers) as client,
    ):
        archive, stop = Path(scratch) / "eval_bundle.zip", threading.Event()
        try:
            fetch_file(
                client,
                url,
                archive,
                check=_check_archive,
                progress=_Quiet(),
                stop=stop,
                patience=patience,
                address_variable=URL_VARIABLE,
            )
        except UserError as error:
            raise UserError(
                f"{error}. Without network: give a folder that has the bundle with --bundle, or --bundle none"
            ) from error
        _install(archive, Folder.at(Path(scratch) / "unpacked"), folder, url)
    return folder


def open_bundle(folder: Folder) -> Bundle:
    """Read and check every task.

    Raises:
        UserError: a file is missing or damaged; names it, and the line.
    """
    try:
        index, baselines_csv = _read(folder, _INDEX), _read(folder, _BASELINES)
    except FileNotFoundError as error:
        raise UserError(f"{folder} is no bundle of CORE's questions: it has no {_INDEX} and {_BASELINES}") from error
    baselines = _baselines(baselines_csv, folder)
    tasks = []
    for entry in _entries(index, folder):
        label, kind, shots = entry["label"], entry["icl_task_type"], entry["num_fewshot"][0]
        name = f"{_DATA}/{entry['dataset_uri']}"
        try:
            content = _read(folder, name)
        except FileNotFoundError as error:
            raise UserError(f"{folder / name}, which {_INDEX} names, is not there; fetch the bundle again") from error
        baseline = baselines.get(label)
        if baseline is None or not 0 <= baseline < 1:
            raise UserError(f"{folder / _BASELINES} has no random baseline in [0, 100) for the task {label!r}")
        items = _items(content, kind, str(folder / name))
        if len(items) <= shots:
            raise UserError(
                f"{folder / name} has {len(items)} questions, too few for {label} to show {shots} others before each; "
                "fetch the bundle again"
            )
        tasks.append(CoreTask(label, kind, shots, entry.get("continuation_delimiter", " "), baseline, items))
    return Bundle(tuple(tasks), _references(folder))


def _read(folder: Folder, name: str) -> bytes:
    """A file's content.

    Raises:
        FileNotFoundError: there is none.
        UserError: it is there, but cannot be read.
    """
    try:
        return folder.read(name)
    except (FileNotFoundError, UserError):
        raise
    except NotADirectoryError as error:
        raise FileNotFoundError(str(error)) from error
    except OSError as error:
        raise UserError(f"{folder / name} cannot be read ({error})") from error


def _entries(index: bytes, folder: Folder) -> list[dict[str, Any]]:
    try:
        entries = yaml.safe_load(index)["icl_tasks"]
        for entry in entries:
            _check_entry(entry)
        labels = [entry["label"] for entry in entries]
        if len(set(labels)) < len(labels) or not labels:
            raise ValueError("each task must stand there once, and at least one")
    except (yaml.YAMLError, KeyError, TypeError, IndexError, ValueError) as error:
        reason = " ".join(str(error).split()) if isinstance(error, yaml.YAMLError | ValueError) else repr(error)
        raise UserError(f"{folder / _INDEX} is not the index of a bundle ({reason}); fetch the bundle again") from error
    return entries


def _check_entry(entry: dict[str, Any]) -> None:
    """Raises: KeyError, TypeError, IndexError, ValueError."""
    name = entry["label"]
    for key in ("label", "dataset_uri", "icl_task_type"):
        if not isinstance(entry[key], str):
            raise ValueError(f"{key} of task {name!r} is no text")
    if not isinstance(entry.get("continuation_delimiter", ""), str):
        raise ValueError(f"continuation_delimiter of task {name!r} is no text")
    if ".." in entry["dataset_uri"].split("/"):
        raise ValueError(f"dataset_uri {entry['dataset_uri']!r} leaves the bundle")
    shots = entry["num_fewshot"]
    if not (isinstance(shots, list) and shots and isinstance(shots[0], int) and shots[0] >= 0):
        raise ValueError(f"num_fewshot of task {name!r} is no list of numbers")


def _baselines(content: bytes, folder: Folder) -> dict[str, float]:
    """Task → accuracy of guessing, 0 … 1."""
    try:
        rows = csv.DictReader(io.StringIO(content.decode()))
        return {row["Eval Task"]: float(row["Random baseline"]) / 100 for row in rows}
    except (csv.Error, KeyError, ValueError, TypeError) as error:
        raise UserError(f"{folder / _BASELINES} has no task names and random baselines ({error!r})") from error


def _items(content: bytes, kind: str, where: str) -> tuple[dict[str, Any], ...]:
    items = []
    for number, line in enumerate(content.splitlines(), start=1):
        if line.strip():
            try:
                items.append(json.loads(line))
            except ValueError as error:
                raise UserError(f"{where}, line {number} is not JSON ({error}); fetch the bundle again") from error
    check_items(items, kind, where)
    return tuple(items)


def _references(folder: Folder) -> dict[str, dict[str, Any]]:
    """Those that are there and can be read: they are shown beside, and nothing depends on them."""
    found = {}
    for name, title in _REFERENCES.items():
        if not folder.exists(name):
            continue
        try:
            lines = [[cell.strip() for cell in line] for line in csv.reader(io.StringIO(_read(folder, name).decode()))]
            centred = {line[0]: float(line[2]) for line in lines[1:] if len(line) >= 3 and line[2]}
            found[title] = {"mean": centred.pop("CORE"), "tasks": centred}
        except (csv.Error, KeyError, ValueError) as error:
            warn(f"{folder / name} has no centred accuracies and their CORE ({error!r}); it is not shown beside")
    return found


class _Quiet:
    """The bundle is small: its transfer shows only that it waits."""

    def bytes(self, count: int) -> None:
        pass

    def wait(self, message: str) -> None:
        warn(message)


def _check_archive(archive: Path) -> None:
    try:
        with zipfile.ZipFile(archive) as content:
            damaged = content.testzip()
    except (zipfile.BadZipFile, EOFError, NotImplementedError, RuntimeError, zlib.error) as error:
        raise UserError(f"{archive} is no whole zip file ({error})") from error
    if damaged is not None:
        raise UserError(f"{archive} is damaged: {damaged}")


def _install(archive: Path, scratch: Folder, folder: Folder, url: str) -> None:
    """Unpack, open, and only then write to `folder`."""
    try:
        names = _unpack(archive, scratch, url)
        try:
            open_bundle(scratch)
        except UserError as error:
            reason = str(error).replace(f"{scratch}/", "").replace(str(scratch), "it")
            raise UserError(f"the archive at {url} is no bundle of CORE's questions: {reason}") from error
        for name in names:
            _write(folder, name, scratch.read(name))
    except OSError as error:
        raise UserError(
            f"the bundle cannot be written to {folder} ({error}); free space or give another --storage"
        ) from error


def _unpack(archive: Path, folder: Folder, url: str) -> list[str]:
    """Write the files of the archive that stand beside its index or below; returns their names, the index last.

    Raises:
        UserError: it has no index.
    """
    with zipfile.ZipFile(archive) as content:
        names = [name for name in content.namelist() if not name.endswith("/") and ".." not in name.split("/")]
        index = min((name for name in names if name.rpartition("/")[2] == _INDEX), key=len, default=None)
        if index is None:
            raise UserError(f"the archive at {url} is no bundle of CORE's questions: it has no {_INDEX}")
        top = index.removesuffix(_INDEX)
        inside = sorted((name for name in names if name.startswith(top)), key=lambda name: name == index)
        for name in inside:
            _write(folder, name.removeprefix(top), content.read(name))
    return [name.removeprefix(top) for name in inside]


def _write(folder: Folder, name: str, content: bytes) -> None:
    path, _, base = name.rpartition("/")
    (folder / path if path else folder).write(base, content)
