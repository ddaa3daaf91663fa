"""What the whole pipeline in one command adds to its stages: their command lines and their times."""

import argparse

import pytest

from jobs import speedrun
from nanochat_ray.storage import Folder


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
