"""What the whole pipeline in one command adds to its stages: their command lines and their times."""

import argparse

import pytest

from jobs import speedrun
from nanochat_ray import cli
from nanochat_ray.eval.core_bundle import URL_VARIABLE
from nanochat_ray.storage import Folder
from tests.small_bundle import write_bundle


@pytest.mark.parametrize(
    ("sessions", "noted"),
    [
        ([(10, "done")], (10, "done")),
        ([(10, "interrupted")], (10, "interrupted")),
        ([(10, "interrupted"), (5, "interrupted"), (2, "done")], (17, "done")),
        ([(10, "interrupted"), (1, "unchanged")], (11, "done")),  # cut off between the stage and its note
        ([(10, "done"), (1, "unchanged")], (10, "done")),
        ([(10, "done"), (1, "interrupted"), (1, "unchanged")], (10, "done")),
        ([(10, "done"), (3, "done")], (3, "done")),
    ],
)
def test_the_time_of_a_stage_is_that_of_all_its_sessions(tmp_path, sessions, noted):
    run = Folder.at(tmp_path)
    for seconds, status in sessions:
        speedrun._note_time(run, "sft", seconds, status)
    (entry,) = (run / "report").read_json("stages.json")
    assert (entry["seconds"], entry["status"]) == noted


def test_a_stage_gets_the_flags_it_knows_that_were_given():
    given = "--preset tiny --run a --workers 2 --sft chats.jsonl --fresh --json --port 1".split()
    args: argparse.Namespace = speedrun.build_parser().parse_args(given)
    assert speedrun._argv("tokenizer", args) == ["--run", "a", "--fresh", "--preset", "tiny"]
    assert speedrun._argv("sft", args) == ["--run", "a", "--workers", "2", "--fresh", "--sft", "chats.jsonl"]
    assert speedrun._argv("report", args) == ["--run", "a"]


def test_evaluations_get_their_questions_and_workers_too():
    given = "--run a --bundle b/ --max-per-task 50 --eval-workers 4".split()
    args = speedrun.build_parser().parse_args(given)
    several = ["--max-per-task", "50", "--eval-workers", "4"]
    assert speedrun._argv("base_eval", args) == ["--run", "a", "--bundle", "b/", *several]
    assert speedrun._argv("chat_eval", args) == ["--run", "a", *several]
    assert speedrun._argv("pretrain", args) == ["--run", "a"]


@pytest.mark.parametrize(
    ("flags", "code", "said"),
    [
        (["--max-per-task", "2"], 2, "2 examples of colours are too few"),
        (["--bundle", "nowhere"], 1, "nowhere is no bundle of CORE's questions"),
        (["--sft", "chats/", "--tasks", "nowhere"], 1, r"there is no folder"),
    ],
)
def test_questions_that_cannot_be_asked_end_it_before_any_stage(tmp_path, capsys, monkeypatch, flags, code, said):
    monkeypatch.setattr(speedrun, "_stage_job", None)
    place = ["--storage", str(tmp_path / "out"), "--preset", "tiny", "--bundle", str(write_bundle(tmp_path / "bundle"))]
    assert cli.run(speedrun.main, speedrun.build_parser(), [*place, *flags]) == code
    assert said in capsys.readouterr().err


def test_the_demo_needs_no_questions_from_anywhere(monkeypatch):
    monkeypatch.setenv(URL_VARIABLE, "http://127.0.0.1:1/refused")
    speedrun._require_questions(speedrun.build_parser().parse_args(["--preset", "tiny"]))
