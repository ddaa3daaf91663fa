"""Chats from JSONL or parquet files with SmolTalk's `messages` column, or from such a set on the hub.

Every chat is checked; the first bad one stops the job with the file, the line and the reason.
"""

import json
import re
from collections.abc import Iterable, Iterator
from typing import Any

from nanochat_ray.chat import check_conversation
from nanochat_ray.errors import UserError
from nanochat_ray.storage import Folder
from nanochat_ray.tasks.conversations import Conversation
from nanochat_ray.tasks.public_sets import rows_of_parquet, rows_on_hub, split_files

HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")
HOLD_OUT_EVERY = 50  # of a source that has no test split: every 50th chat


def load_chats(source: str) -> tuple[list[Conversation], list[Conversation]]:
    """(train, test) chats of a file, of a folder or URI with train.* and test.*, or of a set on the hub (owner/name).

    Files end in .jsonl or .parquet. Without a test split every 50th chat is held out.

    Raises:
        UserError: nothing there, an empty file, or a chat that is not one; names the file, the line and the reason.
    """
    place = Folder.at(source)
    if place.exists():
        if source.endswith((".jsonl", ".parquet")):
            parent, _, name = str(place).rpartition("/")
            return _hold_out(list(_chats_of_file(Folder.at(parent), name)))
        return _chats_of_folder(place)
    if "://" not in source and HUB_NAME.fullmatch(source):
        return _chats_of_hub_set(source)
    raise UserError(f"no chats at {source}: give a .jsonl or .parquet file, a folder with train.*, or owner/name")


def _chats_of_folder(folder: Folder) -> tuple[list[Conversation], list[Conversation]]:
    splits: dict[str, list[Conversation]] = {}
    for split in ("train", "test"):
        names = split_files(folder, split, ".jsonl") + split_files(folder, split, ".parquet")
        splits[split] = [chat for name in names for chat in _chats_of_file(folder, name)]
    if not splits["train"]:
        raise UserError(f"no chats in {folder}: expected train.jsonl, train.parquet or train-*.parquet")
    return (splits["train"], splits["test"]) if splits["test"] else _hold_out(splits["train"])


def _chats_of_hub_set(name: str) -> tuple[list[Conversation], list[Conversation]]:
    train, test = (list(_checked(rows_on_hub(name, None, split, ["messages"]))) for split in ("train", "test"))
    return train, test


def _chats_of_file(folder: Folder, name: str) -> Iterator[Conversation]:
    rows = rows_of_parquet(folder, name, ["messages"]) if name.endswith(".parquet") else _json_lines(folder, name)
    count = 0
    for chat in _checked(rows):
        count += 1
        yield chat
    if count == 0:
        raise UserError(f"{folder / name} holds no chats")


def _json_lines(folder: Folder, name: str) -> Iterator[tuple[str, Any]]:
    filesystem, path = (folder / name).open()
    with filesystem.open_input_stream(path) as stream:
        lines = stream.read().split(b"\n")
    for number, line in enumerate(lines, start=1):
        where = f"{folder / name}, line {number}"
        if not line.strip():
            continue
        try:
            yield where, json.loads(line)
        except UnicodeDecodeError as error:
            raise UserError(f"{where}: not UTF-8 text ({error.reason})") from error
        except ValueError as error:
            raise UserError(f"{where}: not JSON ({error})") from error


def _checked(rows: Iterable[tuple[str, Any]]) -> Iterator[Conversation]:
    for where, row in rows:
        messages = row.get("messages") if isinstance(row, dict) else None
        if not isinstance(messages, list):
            raise UserError(f"{where}: no list called 'messages'")
        try:
            check_conversation(messages)
        except UserError as error:
            raise UserError(f"{where}: {error}") from error
        if messages[-1]["role"] != "assistant":
            raise UserError(f"{where}: the last message must be the assistant's; there is nothing to train on after it")
        yield [{"role": message["role"], "content": message["content"]} for message in messages]


def _hold_out(chats: list[Conversation]) -> tuple[list[Conversation], list[Conversation]]:
    train = [chat for number, chat in enumerate(chats, start=1) if number % HOLD_OUT_EVERY]
    return train, chats[HOLD_OUT_EVERY - 1 :: HOLD_OUT_EVERY]
