"""GSM8K, MMLU and ARC as conversations, from parquet files and from a hub that is not there."""

from decimal import Decimal

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from nanochat_ray.chat import check_conversation
from nanochat_ray.errors import UserError
from nanochat_ray.storage import Folder
from nanochat_ray.tasks.conversations import spoken_text
from nanochat_ray.tasks.gsm8k import final_number, load_gsm8k, problem
from nanochat_ray.tasks.multiple_choice import ARC_CHALLENGE, ARC_EASY, MultipleChoice, load_arc, load_mmlu


def write_rows(folder, name, rows):
    folder.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows), folder / name)


def test_calculator_marks_become_tool_calls_and_their_results_stay_in_the_text():
    chat = problem("How many?", "He has 2*3=<<2*3=6>>6 eggs.\nThat is $<<6/4=1.5>>1.5.\n#### 1.5")
    assert chat[1]["content"] == [
        {"type": "text", "text": "He has 2*3="},
        {"type": "python", "text": "2*3"},
        {"type": "python_output", "text": "6"},
        {"type": "text", "text": "6 eggs.\nThat is $"},
        {"type": "python", "text": "6/4"},
        {"type": "python_output", "text": "1.5"},
        {"type": "text", "text": "1.5.\n#### 1.5"},
    ]


@pytest.mark.parametrize(
    ("text", "number"),
    [("so\n#### 1,200", "1200"), ("#### -3", "-3"), ("#### 7.\n", "7"), ("no number", None), ("#### ..,", None)],
)
def test_the_final_number_is_read_without_separators(text, number):
    assert final_number(text) == (None if number is None else Decimal(number))


def test_every_gsm8k_answer_keeps_its_text_and_its_final_number(shared_data):
    tasks = Folder.at(shared_data / "tasks")
    chats = load_gsm8k("train", tasks)
    rows = pq.read_table(shared_data / "tasks/gsm8k/main/train-00000-of-00001.parquet").to_pylist()
    assert len(chats) == len(rows) == 7473
    for chat, row in zip(chats, rows, strict=True):
        check_conversation(chat)
        assert "<<" not in spoken_text(chat[1]["content"])
        assert final_number(spoken_text(chat[1]["content"])) == final_number(row["answer"])
    assert sum(part["type"] == "python" for chat in chats for part in chat[1]["content"]) > 20_000


def test_the_letter_stands_after_its_choice():
    assert MultipleChoice("2+2?", ("three", "four"), 1).render().splitlines()[1:3] == ["- three=A", "- four=B"]


def test_mmlu_and_arc_answers_are_the_letter_of_the_right_choice(shared_data):
    tasks = Folder.at(shared_data / "tasks")
    for chats, count in [
        (load_mmlu("auxiliary_train", tasks), 8315),
        (load_arc(ARC_EASY, "train", tasks), 2251),
        (load_arc(ARC_CHALLENGE, "validation", tasks), 299),
    ]:
        assert len(chats) == count
        for question, answer in chats:
            assert f"={answer['content']}\n" in question["content"]


def test_numbered_labels_become_letters(tmp_path):
    row = {"question": "Q?", "choices": {"text": ["x", "y"], "label": ["1", "2"]}, "answerKey": "2"}
    write_rows(tmp_path / "arc/ARC-Easy", "train-00000-of-00001.parquet", [row])
    (chat,) = load_arc(ARC_EASY, "train", Folder.at(tmp_path))
    assert chat[1]["content"] == "B"


def test_an_answer_that_is_no_choice_is_named(tmp_path):
    write_rows(tmp_path / "mmlu/all", "dev-0.parquet", [{"question": "Q?", "choices": ["x", "y"], "answer": 2}])
    with pytest.raises(UserError, match=r"dev-0\.parquet, row 1: the answer 2 is not one of the 2 choices"):
        load_mmlu("dev", Folder.at(tmp_path))


def test_a_missing_column_and_a_missing_split_are_named(tmp_path):
    write_rows(tmp_path / "gsm8k/main", "train-0.parquet", [{"question": "Q?"}])
    with pytest.raises(UserError, match="no column 'answer'"):
        load_gsm8k("train", Folder.at(tmp_path))
    with pytest.raises(UserError, match=r"no test-\*\.parquet"):
        load_gsm8k("test", Folder.at(tmp_path))


def test_a_damaged_file_is_named(tmp_path):
    write_rows(tmp_path / "gsm8k/main", "train-0.parquet", [{"question": "Q?", "answer": "#### 1"}])
    file = tmp_path / "gsm8k/main/train-0.parquet"
    file.write_bytes(file.read_bytes()[:-20])
    with pytest.raises(UserError, match=r"train-0\.parquet cannot be read"):
        load_gsm8k("train", Folder.at(tmp_path))


def test_a_problem_without_a_final_number_is_named(tmp_path):
    rows = [{"question": "Q?", "answer": "#### 1"}, {"question": "Q?", "answer": "who knows"}]
    write_rows(tmp_path / "gsm8k/main", "train-0.parquet", rows)
    with pytest.raises(UserError, match="row 2"):
        load_gsm8k("train", Folder.at(tmp_path))


def test_sets_come_from_the_hub_by_name(monkeypatch):
    asked = []

    def load_dataset(name, config, split):
        asked.append((name, config, split))
        return datasets.Dataset.from_list([{"question": "Q?", "answer": "#### 4"}])

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert len(load_gsm8k("train", None)) == 1
    assert asked == [("openai/gsm8k", "main", "train")]


def test_an_unreachable_hub_is_one_clear_line(monkeypatch):
    def load_dataset(name, config, split):
        raise ConnectionError("Couldn't reach the Hub\nlong trace")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(UserError, match=r"openai/gsm8k \(train\).*Couldn't reach the Hub; check the name") as caught:
        load_gsm8k("train", None)
    assert "\n" not in str(caught.value)
