"""Events: one object per step whatever happened, and a live line made from them."""

import json
import time
from types import SimpleNamespace

import pytest

from nanochat_ray.storage import Folder
from nanochat_ray.train.events import EventLog, read_events, without_repeated
from nanochat_ray.train.ledger import Ledger
from nanochat_ray.train.progress import ProgressLine, live_progress


def step_event(step, **fields):
    numbers = {
        "loss": 3.25,
        "lr": 0.5,
        "tok_per_s": 5123.4,
        "workers": 2,
        "data_wait_s": 0.0,
        "seconds": 1.5,
        "mfu": 0.41,
    }
    return {"step": step, "tokens": (step + 1) * 100, "stream_hash": "ab", **numbers, **fields}


@pytest.fixture
def stage(tmp_path):
    return Folder.at(tmp_path / "base")


def write_steps(stage, resume_step, steps):
    log = EventLog(stage, resume_step)
    log.append("start", step=resume_step, workers=2, dtype="bf16", mode="eager")
    for step in steps:
        log.append("step", **step_event(step))
    log.append("eval", step=steps[-1] + 1, val_bpb=1.75)
    log.append("samples", step=steps[-1] + 1, samples=[{"prompt": "Once", "text": " upon"}], seconds=0.1)
    log.close()


def test_appended_events_are_read_back_in_order(stage):
    write_steps(stage, 0, [0, 1, 2])
    events = read_events(stage)
    assert [event["kind"] for event in events] == ["start", "step", "step", "step", "eval", "samples"]
    assert events[1]["loss"] == 3.25
    assert all("time" in event for event in events)


def test_steps_that_will_be_done_again_are_dropped_on_resume(stage):
    write_steps(stage, 0, [0, 1, 2, 3, 4])
    write_steps(stage, 3, [3, 4, 5])
    events = read_events(stage)
    assert [event["step"] for event in events if event["kind"] == "step"] == [0, 1, 2, 3, 4, 5]
    assert [event["step"] for event in events if event["kind"] == "eval"] == [6]
    assert [event["step"] for event in events if event["kind"] == "samples"] == [6]
    assert sum(event["kind"] == "start" for event in events) == 2


def test_steps_that_will_be_done_again_leave_one_event_that_sums_them_up_in_each_group(stage):
    write_steps(stage, 0, [0, 1, 2, 3, 4])
    write_steps(stage, 3, [3, 4, 5])
    (lost,) = [event for event in read_events(stage) if event["kind"] == "lost"]
    assert (lost["step"], lost["steps"], lost["workers"]) == (3, 2, 2)
    assert lost["worker_seconds"] == pytest.approx(2 * (lost["time"] - lost["began"]), abs=0.01)
    write_steps(stage, 1, [1])  # the newer checkpoints were damaged
    events = read_events(stage)
    kinds = ["start", "step", "lost", "lost", "start", "lost", "start", "step", "eval", "samples"]
    assert [event["kind"] for event in events] == kinds
    assert [(event["step"], event["steps"]) for event in events if event["kind"] == "lost"] == [(1, 2), (3, 2), (3, 3)]


def test_an_event_that_survives_among_lost_ones_stays():
    """A checkpoint is written in the background: its event may come after later steps."""
    steps = [{"kind": "step", "time": 10.0 + n, "seconds": 1.0, "step": n, "workers": 3} for n in range(4)]
    events = [*steps[:3], {"kind": "checkpoint", "time": 12.5, "step": 2, "stall_s": 0.1}, steps[3]]
    kept = without_repeated(events, resume_step=2)
    assert [event["kind"] for event in kept] == ["step", "step", "checkpoint", "lost"]
    times = {"time": 13.0, "began": 11.0, "worker_seconds": 6.0}
    assert kept[-1] == {"kind": "lost", "step": 2, "steps": 2, "workers": 3, **times}


def test_steps_carry_the_goodput_so_far_and_the_end_says_where_the_time_went(stage, monkeypatch):
    clock = iter([100.0, 110.0, 112.0, 113.0])
    monkeypatch.setattr("nanochat_ray.train.events.time", SimpleNamespace(time=lambda: next(clock)))
    log = EventLog(stage, 0)
    log.append("start", step=0, workers=2, attempt="a", attempt_began=98.0)
    log.append("step", **step_event(0, seconds=2.0))
    log.append("step", **step_event(1, seconds=2.0))
    log.append("finish", step=2, tokens=200)
    log.close()
    _, first, second, finish = read_events(stage)
    assert (first["goodput"], second["goodput"]) == (round(2 / 12, 4), round(4 / 14, 4))
    spent = {label: seconds for label, seconds in finish["worker_seconds"].items() if seconds}
    assert spent == {"useful": 8.0, "restart": 20.0, "checkpoint_stall": 2.0}
    assert sum(Ledger(read_events(stage)).totals().values()) == 30.0


def test_a_line_that_a_killed_writer_left_unfinished_is_no_event(stage):
    write_steps(stage, 0, [0, 1])
    stage.write("events.jsonl", stage.read("events.jsonl") + b'{"kind": "step", "st')
    assert len(read_events(stage)) == 5
    write_steps(stage, 2, [2])
    assert all(json.loads(line) for line in stage.read("events.jsonl").splitlines())


def test_an_object_store_gets_the_same_events(tmp_path):
    """`file://` goes the way of every URI: rewritten whole, since object stores cannot append."""
    stage = Folder.at(f"file://{tmp_path}/base")
    write_steps(stage, 0, [0, 1, 2])
    write_steps(stage, 2, [2, 3])
    assert [event["step"] for event in read_events(stage) if event["kind"] == "step"] == [0, 1, 2, 3]
    assert any(name.startswith("events.out.tfevents") for name in (stage / "tensorboard").list())


def test_curves_reach_tensorboard(stage):
    write_steps(stage, 0, [0, 1, 2])
    (name,) = (stage / "tensorboard").list()
    content = (stage / "tensorboard").read(name)
    assert b"step/loss" in content
    assert b"eval/val_bpb" in content


def test_the_line_says_where_the_run_stands(capsys):
    line = ProgressLine(total_steps=150, terminal=False)
    line.show({"kind": "start", "step": 0, "workers": 2, "dtype": "bf16", "mode": "eager"})
    line.show({"kind": "eval", "step": 0, "val_bpb": 1.75})
    line.show({"kind": "step", **step_event(49)})
    shown = capsys.readouterr().out
    assert "step  50/150 | loss 3.2500 | bpb 1.7500 | 5,123 tok/s | mfu 41% | workers 2" in shown
    assert "eta 2m30s" in shown  # 100 steps of 1.5 s
    assert "goodput -" in shown
    line.show({"kind": "step", **step_event(149, goodput=0.934)})
    assert "goodput 93%" in capsys.readouterr().out


def test_at_each_evaluation_one_sample_is_shown_on_one_line_whatever_the_model_says(capsys):
    line = ProgressLine(total_steps=150, terminal=False)
    samples = [
        {"prompt": "Once", "text": " upon\n\n a \x1b[31mtime " + "and " * 50},
        {"prompt": "Not", "text": "shown"},
    ]
    line.show({"kind": "eval", "step": 38, "val_bpb": 1.75})
    line.show({"kind": "samples", "step": 38, "samples": samples})
    line.show({"kind": "samples", "step": 50, "samples": []})
    (shown,) = capsys.readouterr().out.splitlines()
    assert shown.startswith("step  38/150 | bpb 1.7500 | Once → upon a �[31mtime and and")
    assert shown.endswith(" …")
    assert len(shown) < 130


def test_on_a_terminal_the_line_is_redrawn_in_place(capsys):
    line = ProgressLine(total_steps=3, terminal=True)
    for step in range(3):
        line.show({"kind": "step", **step_event(step)})
    line.finish()
    shown = capsys.readouterr().out
    assert shown.count("\r") == 3
    assert shown.endswith("\n")
    assert shown.count("\n") == 1


def test_the_driver_follows_the_events_of_this_attempt_only(stage, capsys):
    write_steps(stage, 0, [0, 1])
    before = read_events(stage)
    stage.write("events.jsonl", "".join(json.dumps({**event, "time": 1.0}) + "\n" for event in before))
    with live_progress(stage, 4):
        write_steps(stage, 2, [2, 3])
    shown = capsys.readouterr().out
    assert "step 4/4" in shown
    assert "step 1/4" not in shown


def test_a_new_group_says_what_became_of_the_one_before(capsys):
    line = ProgressLine(total_steps=150, terminal=False)
    start = {"kind": "start", "workers": 2, "dtype": "bf16", "mode": "eager"}
    for step, leave in ((0, None), (3, None), (6, "notice"), (9, "growth")):
        if leave:
            line.show({"kind": "leave", "why": leave})
        line.show({**start, "step": step})
        line.show({"kind": "step", **step_event(step)})
    said = [text for text in capsys.readouterr().out.splitlines() if "worker(s)" in text]
    assert [text.partition("eager")[2] for text in said] == [
        "",
        "; continuing at step 3 after workers were lost",
        "; continuing at step 6 after the notice of a machine",
        "; continuing at step 9 after more machines came",
    ]


@pytest.mark.parametrize("steps_after", [1, 40])  # the file is then shorter or longer than before
def test_what_was_shown_is_not_shown_again_when_lost_steps_are_taken_out(stage, capsys, monkeypatch, steps_after):
    monkeypatch.setattr("nanochat_ray.train.progress._POLL_S", {"local": 0.02})
    with live_progress(stage, 100):
        for first, steps in ((0, 9), (2, steps_after)):
            log = EventLog(stage, first)
            log.append("start", step=first, workers=3 - first, dtype="bf16", mode="eager")
            for step in range(first, first + steps):
                log.append("step", **step_event(step))
            log.close()
            time.sleep(0.2)
    shown = capsys.readouterr().out
    assert shown.count("worker(s)") == 2
    assert "1 worker(s), bf16, eager; continuing at step 2" in shown
