"""Chats from files: what is read, and that a bad line is named."""

import json

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from nanochat_ray.errors import UserError
from nanochat_ray.tasks.chat_files import load_chats

GOOD = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]


def jsonl(path, rows):
    path.write_text("".join(json.dumps({"messages": row, "source": "x"}) + "\n" for row in rows))
    return str(path)


def test_the_real_chats_are_all_read(shared_data):
    train, test = load_chats(str(shared_data / "sft"))
    assert (len(train), len(test)) == (11_007, 552)
    assert sum(len(chat) for chat in train) == 75_700


def test_a_folder_may_hold_parquet_shards_and_no_test_split(tmp_path):
    for shard in range(2):
        pq.write_table(
            pa.Table.from_pylist([{"messages": GOOD}] * 50), tmp_path / f"train-{shard:05d}-of-00002.parquet"
        )
    train, test = load_chats(str(tmp_path))
    assert (len(train), len(test)) == (98, 2)
    assert train[0] == GOOD


def test_a_single_file_is_enough(tmp_path):
    train, test = load_chats(jsonl(tmp_path / "mine.jsonl", [GOOD] * 10))
    assert (len(train), len(test)) == (10, 0)


def test_tool_calls_may_be_written_as_parts(tmp_path):
    parts = [{"type": "python", "text": "1+1"}, {"type": "python_output", "text": "2"}, {"type": "text", "text": "2"}]
    chat = [GOOD[0], {"role": "assistant", "content": parts}]
    assert load_chats(jsonl(tmp_path / "tools.jsonl", [chat]))[0] == [chat]


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b'{"messages": [{"role": "assistant", "content": "Hi"}]}', "role"),
        (b'{"messages": [{"role": "robot", "content": "Hi"}]}', "role"),
        (b'{"messages": [{"role": "user", "content": "Hi"}]}', "last message must be the assistant's"),
        (b'{"messages": [{"role": "user", "content": ""}, {"role": "assistant", "content": "a"}]}', "empty"),
        (b'{"messages": []}', "empty"),
        (b'{"messages": "Hi"}', "no list called 'messages'"),
        (b'{"text": "Hi"}', "no list called 'messages'"),
        (b"[1]", "no list called 'messages'"),
        (b"{not json", "not JSON"),
        (b'{"messages": "\xff"}', "not UTF-8"),
    ],
)
def test_a_bad_line_is_named_with_its_reason(tmp_path, line, reason):
    good = json.dumps({"messages": GOOD}).encode()
    (tmp_path / "train.jsonl").write_bytes(good + b"\n\n" + line + b"\n")
    with pytest.raises(UserError, match=rf"train\.jsonl, line 3: .*{reason}") as caught:
        load_chats(str(tmp_path))
    assert "\n" not in str(caught.value)


def test_an_empty_file_is_named(tmp_path):
    (tmp_path / "train.jsonl").write_text("\n")
    with pytest.raises(UserError, match=r"train\.jsonl holds no chats"):
        load_chats(str(tmp_path))


@pytest.mark.parametrize("place", ["nowhere/at/all", "nowhere.jsonl"])
def test_a_place_that_does_not_exist_is_named(tmp_path, place):
    with pytest.raises(UserError, match=f"no chats at .*{place}"):
        load_chats(str(tmp_path / place))


def test_a_folder_without_train_files_says_what_was_expected(tmp_path):
    with pytest.raises(UserError, match=r"expected train\.jsonl"):
        load_chats(str(tmp_path))


def test_owner_slash_name_is_a_set_on_the_hub(monkeypatch):
    sizes = {"train": 3, "test": 1}

    def load_dataset(name, config, split):
        assert name == "HuggingFaceTB/smol-smoltalk"
        return datasets.Dataset.from_list([{"messages": GOOD, "source": "x"}] * sizes[split])

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    train, test = load_chats("HuggingFaceTB/smol-smoltalk")
    assert (len(train), len(test)) == (3, 1)
    assert train[0] == GOOD
