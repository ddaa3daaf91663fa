"""Evaluation beside training: which checkpoints it takes, what it gives way to, when it ends."""

import json
import threading
import time
from collections.abc import Callable

import pytest
import torch

from nanochat_ray.errors import UserError
from nanochat_ray.eval import watch as watching
from nanochat_ray.eval.watch import new_steps, watch
from nanochat_ray.plan import make_plan
from nanochat_ray.storage import Folder, run_folder
from nanochat_ray.stream.cursor import Cursor, StreamIdentity
from nanochat_ray.train.checkpoint import Checkpoints, TrainState
from tests.evaluated_place import Place
from tests.tiny_runs import make_run


@pytest.fixture
def place(tmp_path) -> Place:
    return Place(tmp_path)


@pytest.mark.slow
def test_each_checkpoint_is_measured_while_it_is_trained(place, capsys, monkeypatch):
    given_way: list[bool] = []
    monkeypatch.setattr(watching, "LOOK_EVERY_S", 0.02)
    monkeypatch.setattr("nanochat_ray.eval.sitting.only_when_idle", lambda: given_way.append(True))
    stage, run = place.stage("watched"), run_folder(place.storage, "watched")

    def train() -> None:
        time.sleep(0.1)
        for step, seed in ((2, 2), (7, 7)):
            make_run(run, stages=("base",), seed=seed, step=step)
            deadline = time.monotonic() + 60
            while not (stage.exists("evaluations.jsonl") and f'"step": {step},' in history()):
                assert time.monotonic() < deadline
                time.sleep(0.02)

    def history() -> str:
        return stage.read("evaluations.jsonl").decode()

    training = threading.Thread(target=train, daemon=True)
    training.start()
    assert place.base_eval("--run", "watched", "--watch", "--json") == 0
    training.join()
    out = capsys.readouterr().out.splitlines()
    lines = [json.loads(line) for line in history().splitlines()]
    assert [(line["name"], line["step"]) for line in lines] == [("CORE", 2), ("CORE", 7)]
    assert json.loads(out[-1])["core"] == {str(line["step"]): line["value"] for line in lines}
    assert out[0] == f"waiting for a checkpoint in {stage / 'checkpoints'}"
    assert len(given_way) == 2
    for step in (2, 7):
        assert f"watched, base, step {step}" in out


def write_checkpoint(stage: Folder, step: int, last: int = 7) -> None:
    """One without weights worth the name."""
    plan = make_plan(depth=2, vocab_size=300, steps=last)
    cursor = Cursor(StreamIdentity("", "", 64, 4, 4, 42), step, step)
    Checkpoints.of(stage).save(TrainState(plan, cursor), {"w": torch.zeros(1)}, {})


def script(*acts: Callable[[], object]) -> Callable[[float], object]:
    """A sleep during which things happen, one after the other."""
    left = iter(acts)
    return lambda seconds: next(left)()


def test_only_the_newest_checkpoint_is_measured_until_the_plans_last(tmp_path, capsys):
    stage = Folder.at(tmp_path)

    def write(*steps: int) -> Callable[[], None]:
        return lambda: [write_checkpoint(stage, step) for step in steps]

    steps = new_steps(stage, script(lambda: None, write(2), lambda: None, write(4, 5), write(7)))
    assert list(steps) == [2, 5, 7]
    waits = [line.removesuffix(str(tmp_path / "checkpoints")) for line in capsys.readouterr().out.splitlines()]
    expected = ["waiting for a checkpoint", *(f"waiting for a checkpoint after step {step}" for step in (2, 5))]
    assert waits == [f"{line} in " for line in expected]


def test_a_checkpoint_that_training_deletes_meanwhile_is_left_out_and_any_other_failure_ends_it(tmp_path, capsys):
    stage = Folder.at(tmp_path)
    for step in (2, 5):
        write_checkpoint(stage, step)

    def measure(step: int) -> float:
        if step == 5:
            (stage / "checkpoints" / "step_000005").delete()
            write_checkpoint(stage, 7)
            raise UserError("checkpoint step_000005 cannot be used")
        return 0.5

    def write_last(seconds: float) -> None:
        raise AssertionError("nothing to wait for")

    assert watch(stage, measure, write_last) == {7: 0.5}
    assert "the checkpoint of step 5 was deleted while it was measured; going on" in capsys.readouterr().err

    def fail(step: int) -> float:
        raise UserError("no room is left")

    with pytest.raises(UserError, match="no room"):
        watch(stage, fail)
