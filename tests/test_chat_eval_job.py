"""jobs.chat_eval from end to end: ChatCORE, held-out questions, what is asked again and what is refused."""

import json
import re

import pyarrow.parquet as pq
import pytest

from jobs import report
from nanochat_ray import cli
from nanochat_ray.storage import run_folder
from nanochat_ray.tasks.conversations import exchange
from nanochat_ray.tasks.mixture import Source, build_mixture, write_mixture
from tests.evaluated_place import Place, forbid_models, one_error

CHAT_TASKS = ["ARC-Easy", "ARC-Challenge", "MMLU", "GSM8K", "HumanEval"]


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Place:
    place = Place(tmp_path_factory.mktemp("evaluated"))
    place.new_run("one", seed=1)
    place.new_run("two", seed=2)
    return place


@pytest.fixture
def no_model(monkeypatch):
    forbid_models(monkeypatch)


@pytest.fixture(scope="module")
def asked(place) -> Place:
    """Chat models with ChatCORE's figures, the second with held-out questions as well."""
    held_out = [exchange(f"What is {number} + {number}?", f"{2 * number}") for number in range(6)]
    mixture = build_mixture([Source("arithmetic", held_out, held_out, 1.0)], seed=42)
    write_mixture(mixture, place.stage("two", "sft") / "data")
    for run in ("one", "two"):
        assert place.chat_eval("--run", run, "--tasks", str(place.root / "tasks")) == 0
    return place


@pytest.mark.slow
def test_chat_core_has_its_five_tasks_and_held_out_questions_stand_beside(asked, capsys):
    assert asked.chat_eval("--run", "two", "--tasks", str(asked.root / "tasks"), "--compare", "one", "--json") == 0
    out = capsys.readouterr().out
    figures = json.loads(out.splitlines()[-1])
    stored = asked.stage("two", "sft").read_json("chat_eval.json")
    assert {**stored, "status": "done", "artifacts": figures["artifacts"]} == figures
    chat_core = stored["chat_core"]
    assert list(chat_core["tasks"]) == CHAT_TASKS
    assert [task["baseline"] for task in chat_core["tasks"].values()] == [0.25, 0.25, 0.25, 0.0, 0.0]
    assert chat_core["protections"]
    assert chat_core["comparison"]["with"] == "one, sft, step 7"
    assert set(stored["tasks"]) == {"arithmetic"}
    assert stored["tasks"]["arithmetic"]["examples"] == 6
    assert stored["samples"][0]["question"].startswith("What is ")
    assert "held-out: all 6 questions were answered before" in out
    assert "ChatCORE: all 20 questions were answered before" in out
    assert re.search(r"\nChatCORE +20 +\[", out)
    assert re.search(r"\narithmetic +\d+\.\d% +6 +\d+\n", out)
    written = pq.read_table(asked.results(chat_core, "two", "sft")).to_pylist()
    assert {row["task"] for row in written} == {*CHAT_TASKS}


@pytest.mark.slow
def test_another_length_of_replies_is_another_exam(asked, capsys):
    tasks = str(asked.root / "tasks")
    before = asked.stage("one", "sft").read_json("chat_eval.json")["chat_core"]
    assert asked.chat_eval("--run", "one", "--tasks", tasks, "--max-tokens", "2") == 0
    assert "answered before" not in capsys.readouterr().out
    after = asked.stage("one", "sft").read_json("chat_eval.json")["chat_core"]
    assert after["results"] != before["results"]


@pytest.mark.slow
def test_its_report_card_shows_chat_core(asked):
    flags = ["--storage", asked.storage, "--run", "two"]
    assert cli.run(report.main, report.build_parser(), flags) == 0
    text = (run_folder(asked.storage, "two") / "report").read("report.md").decode()
    for each in ("ChatCORE", *CHAT_TASKS, "arithmetic"):
        assert each in text


@pytest.mark.slow
def test_without_chat_cores_tasks_the_held_out_questions_are_asked_and_chat_core_stays_known(asked, capsys):
    known = asked.stage("two", "sft").read_json("chat_eval.json").get("chat_core")
    assert asked.chat_eval("--run", "two", "--tasks", "none", "--max-per-task", "2") == 0
    out = capsys.readouterr().out
    found = asked.stage("two", "sft").read_json("chat_eval.json")
    assert found["tasks"]["arithmetic"]["examples"] == 2
    assert found.get("chat_core") == known
    assert "held-out: 2/2 questions" in out
    assert "ChatCORE" not in out


@pytest.mark.slow
def test_a_finished_run_is_watched_to_its_end_at_once(asked, capsys, monkeypatch, no_model):
    monkeypatch.setattr("nanochat_ray.eval.sitting.only_when_idle", None)
    assert asked.chat_eval("--run", "one", "--tasks", str(asked.root / "tasks"), "--watch") == 0
    assert "ChatCORE: all 20 questions were answered before" in capsys.readouterr().out
    lines = [*map(json.loads, asked.stage("one", "sft").read("evaluations.jsonl").decode().splitlines())]
    assert {(line["name"], line["step"]) for line in lines} == {("ChatCORE", 7)}


@pytest.mark.parametrize(
    ("flags", "code", "said"),
    [
        (["--tasks", "none"], 1, "nothing to ask: .* holds out no questions; say with --tasks"),
        ([], 1, "nothing to ask"),
        (["--tasks", "none", "--watch"], 2, "--watch and --compare are about ChatCORE; say with --tasks"),
        (["--compare", "two"], 2, "--watch and --compare are about ChatCORE"),
        (["--run", "nobody"], 1, "no run named 'nobody'"),
        (["--tasks", "nowhere"], 1, r"there is no folder .*nowhere; it should hold the files of allenai/ai2_arc"),
        (["--sft", "./nowhere"], 1, r"there is nothing at \./nowhere; check --sft"),
    ],
)
def test_a_chat_model_that_cannot_be_asked_is_one_line(place, capsys, no_model, flags, code, said):
    assert place.chat_eval("--run", "one", *flags) == code
    assert re.search(said, one_error(capsys))
