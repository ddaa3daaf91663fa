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
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import yaml

from nanochat_ray import __version__
from nanochat_ray.cli import warn
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


def bundle_of(source: str, storage: str) -> Bundle:
    """The bundle of `--bundle`: "public", which is downloaded into the storage once, or where one is.

    Raises:
        UserError: as `fetch_bundle` and `open_bundle`.
    """
    return open_bundle(fetch_bundle(data_folder(storage) / "eval_bundle") if source == "public" else Folder.at(source))


def fetch_bundle(folder: Folder, url: str | None = None, patience: Patience | None = None) -> Folder:
    """Have the public bundle in `folder`, downloading it if it is not there; returns `folder`.

    The index is written last: a folder that has it is whole.

    Raises:
        UserError: it cannot be fetched, is no such bundle, or cannot be written.
    """
    if folder.exists(_INDEX):
        return folder
    url = url or os.environ.get(URL_VARIABLE) or BUNDLE_URL
    patience = patience or Patience()
    folder.require_writable()
    print(f"fetching CORE's questions from {url}", flush=True)
    with (
        tempfile.TemporaryDirectory() as scratch,
        httpx.Client(
            follow_redirects=True, timeout=patience.stall_s, headers={"User-Agent": f"nanochat_ray/{__version__}"}
        ) as client,
    ):
        archive = Path(scratch) / "eval_bundle.zip"
        try:
            stop = threading.Event()
            fetch_file(client, url, archive, check=_check_archive, progress=_Quiet(), stop=stop, patience=patience)
        except UserError as error:
            raise UserError(
                f"{error}. Without network: give a folder that has the bundle with --bundle, or --bundle none"
            ) from error
        _unpack(archive, folder)
    return folder


def open_bundle(folder: Folder) -> Bundle:
    """Read and check every task.

    Raises:
        UserError: a file is missing or damaged; names it, and the line.
    """
    try:
        index_bytes, baseline_bytes = folder.read(_INDEX), folder.read(_BASELINES)
    except FileNotFoundError as error:
        raise UserError(f"{folder} is no bundle of CORE's questions: it has no {_INDEX} and {_BASELINES}") from error
    baselines = _baselines(baseline_bytes, folder)
    tasks = []
    for entry in _entries(index_bytes, folder):
        name = f"{_DATA}/{entry['dataset_uri']}"
        try:
            content = folder.read(name)
        except FileNotFoundError as error:
            raise UserError(f"{folder / name}, which {_INDEX} names, is not there; fetch the bundle again") from error
        if entry["label"] not in baselines:
            raise UserError(f"{folder / _BASELINES} has no random baseline for the task {entry['label']!r}")
        tasks.append(
            CoreTask(
                name=entry["label"],
                kind=entry["icl_task_type"],
                shots=entry["num_fewshot"][0],
                delimiter=entry.get("continuation_delimiter", " "),
                baseline=baselines[entry["label"]],
                items=_items(content, entry["icl_task_type"], str(folder / name)),
            )
        )
    return Bundle(tuple(tasks), _references(folder))


def _entries(index: bytes, folder: Folder) -> list[dict[str, Any]]:
    try:
        entries = yaml.safe_load(index)["icl_tasks"]
        for entry in entries:
            if not (isinstance(entry["label"], str) and isinstance(entry["dataset_uri"], str)):
                raise TypeError("label and dataset_uri must be text")
            if ".." in entry["dataset_uri"].split("/"):
                raise ValueError(f"dataset_uri {entry['dataset_uri']!r} leaves the bundle")
            if not isinstance(entry["num_fewshot"][0], int):
                raise TypeError("num_fewshot must be a list of numbers")
            _ = entry["icl_task_type"]
    except (yaml.YAMLError, KeyError, TypeError, IndexError, ValueError) as error:
        raise UserError(
            f"{folder / _INDEX} is not the index of a bundle ({error!r}); fetch the bundle again"
        ) from error
    return entries


def _baselines(content: bytes, folder: Folder) -> dict[str, float]:
    """Task → accuracy of guessing, 0 … 1."""
    try:
        rows = csv.DictReader(io.StringIO(content.decode()))
        return {row["Eval Task"]: float(row["Random baseline"]) / 100 for row in rows}
    except (UnicodeDecodeError, KeyError, ValueError, TypeError) as error:
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
    found = {}
    for name, title in _REFERENCES.items():
        if folder.exists(name):
            lines = [[cell.strip() for cell in line] for line in csv.reader(io.StringIO(folder.read(name).decode()))]
            centred = {line[0]: float(line[2]) for line in lines[1:] if len(line) >= 3 and line[2]}
            mean = centred.pop("CORE", None)
            if mean is None:
                warn(f"{folder / name} has no line CORE; it is not shown beside")
            else:
                found[title] = {"mean": mean, "tasks": centred}
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
            names = content.namelist()
    except (zipfile.BadZipFile, EOFError, NotImplementedError, RuntimeError) as error:
        raise UserError(f"{archive} is no whole zip file ({error})") from error
    if damaged is not None:
        raise UserError(f"{archive} is damaged: {damaged}")
    if not any(name.endswith(_INDEX) for name in names):
        raise UserError(f"{archive} has no {_INDEX}")


def _unpack(archive: Path, folder: Folder) -> None:
    """Write the archive's files under `folder`, the index last; what lies outside its top folder is left out."""
    with zipfile.ZipFile(archive) as content:
        index = min((name for name in content.namelist() if name.endswith(_INDEX)), key=len)
        top = index.removesuffix(_INDEX)
        inside = [
            name
            for name in content.namelist()
            if name.startswith(top) and not name.endswith("/") and ".." not in name.split("/")
        ]
        for name in sorted(inside, key=lambda name: name == index):
            path, _, base = name.removeprefix(top).rpartition("/")
            try:
                (folder / path if path else folder).write(base, content.read(name))
            except OSError as error:
                raise UserError(
                    f"the bundle cannot be written to {folder} ({error}); free space or give --storage"
                ) from error
