"""The watchdog: when silence is a hang, what is left behind, and that a process really ends."""

import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nanochat_ray.storage import Folder
from nanochat_ray.train.watchdog import (
    EXIT_CODE,
    PATIENCE,
    SAVE_WITHIN_S,
    STACKS,
    Patience,
    Watchdog,
    stacks_of_all_threads,
)

ROOT = Path(__file__).parents[1]


class Left(BaseException):
    """Stands for the end of the process."""


class World:
    """A watchdog in a world where time passes only when told, and whose end is an exception."""

    def __init__(self, stage: Folder, rank: int = 0, step: int = 0, patience: Patience = PATIENCE):
        self.now = 1000.0
        self.reports: list[str] = []
        self.slept: list[float] = []
        self.watchdog = Watchdog(
            stage, rank, step, self.reports.append, patience, lambda: self.now, self.slept.append, self._leave
        )

    def _leave(self, code: int):
        assert code == EXIT_CODE
        raise Left

    def steps(self, seconds: list[float], first: int = 0) -> None:
        for step, each in enumerate(seconds, start=first):
            self.now += each
            self.watchdog.check()
            self.watchdog.step_ended(step)


def test_the_first_step_of_a_group_may_take_long(tmp_path):
    world = World(Folder.at(tmp_path))
    world.now += 1799
    world.watchdog.check()
    world.now += 2
    with pytest.raises(Left):
        world.watchdog.check()
    assert "no step ended for 1801 s at step 0 (the first of this group of workers)" in world.reports[0]


@given(st.lists(st.floats(0.01, 400), min_size=1, max_size=40))
def test_silence_is_a_hang_after_ten_medians_and_never_before_the_floor(seconds):
    world = World(Folder.at("/nowhere"))
    for step, each in enumerate(seconds):
        world.now += each
        world.watchdog.step_ended(step)
    recent = sorted(seconds[-20:])
    median = (recent[(len(recent) - 1) // 2] + recent[len(recent) // 2]) / 2
    assert world.watchdog.limit_s() == pytest.approx(max(10 * median, 120))


def test_what_happened_is_written_before_the_process_ends(tmp_path):
    world = World(Folder.at(tmp_path), rank=3, step=40)
    world.steps([900.0, 14.0, 14.2, 14.4], first=40)  # compiling; then the median is 14.3
    world.now += 142
    world.watchdog.check()
    world.now += 2
    with pytest.raises(Left):
        world.watchdog.check()
    (message,) = world.reports
    assert "no step ended for 144 s at step 44" in message
    assert "10 times the median of 14.3 s, at least 120 s" in message
    assert f"{tmp_path}/{STACKS}" in message
    assert "\n" not in message
    written = (tmp_path / STACKS / "step_000044_rank_3.txt").read_text()
    assert written.startswith(message)
    assert "test_what_happened_is_written_before_the_process_ends" in written
    assert world.slept == [pytest.approx(0.05 * 143)]  # the others' time to write theirs


def test_evaluations_and_checkpoints_count_as_life_and_not_as_steps(tmp_path):
    world = World(Folder.at(tmp_path))
    world.steps([1.0, 1.0, 1.0])
    for _ in range(5):
        world.now += 100
        world.watchdog.check()
        world.watchdog.beat()
    assert world.watchdog.limit_s() == 120
    world.steps([1.0], first=3)
    assert world.reports == []


@pytest.mark.parametrize("goes_on", [True, False])
def test_a_worker_that_waits_for_a_checkpoint_may_do_so_as_long_as_the_storage_is_tried_again(tmp_path, goes_on):
    world = World(Folder.at(tmp_path))
    world.steps([1.0] * 5)
    world.watchdog.pause()
    world.now += SAVE_WITHIN_S
    world.watchdog.check()
    if goes_on:
        world.watchdog.beat()
        world.steps([1.0], first=5)
    world.now += PATIENCE.floor_s + 1
    with pytest.raises(Left):  # in both cases counted from here
        world.watchdog.check()


def test_a_storage_that_refuses_does_not_keep_the_process(tmp_path, capsys):
    (tmp_path / STACKS).write_text("a file where the folder should be")
    world = World(Folder.at(tmp_path))
    world.now += 2000
    with pytest.raises(Left):
        world.watchdog.check()
    assert "could not be written" in capsys.readouterr().err


def test_stacks_name_the_threads_and_their_lines():
    entered, go = threading.Event(), threading.Event()

    def waits_in_vain():
        entered.set()
        go.wait()

    thread = threading.Thread(target=waits_in_vain, name="the one that waits")
    thread.start()
    entered.wait()
    try:
        text = stacks_of_all_threads()
    finally:
        go.set()
        thread.join()
    assert f"the one that waits ({thread.ident}):" in text
    assert "in waits_in_vain\n    go.wait()" in text


HANGS = """
import sys, threading
from nanochat_ray.storage import Folder
from nanochat_ray.train.watchdog import Patience, Watchdog
stage = Folder.at(sys.argv[1])
def report(message): stage.write("report.txt", message)
watchdog = Watchdog(stage, 1, 5, report, Patience(factor=10, floor_s=0.3, first_s=60), sleep=lambda seconds: None)
watchdog.start()
for step in range(5, 8):
    watchdog.step_ended(step)
lock = threading.Lock()
def wait_for_ever():
    with lock:
        lock.acquire()
wait_for_ever()
"""


def test_a_process_that_hangs_in_a_lock_ends_and_says_where(tmp_path):
    began = time.monotonic()
    done = subprocess.run([sys.executable, "-c", HANGS, str(tmp_path)], cwd=ROOT, capture_output=True, timeout=60)
    assert done.returncode == EXIT_CODE
    assert time.monotonic() - began < 30
    assert "no step ended for" in (tmp_path / "report.txt").read_text()
    assert "in wait_for_ever" in (tmp_path / STACKS / "step_000008_rank_1.txt").read_text()


def test_a_watchdog_that_was_stopped_ends_nothing(tmp_path):
    world = World(Folder.at(tmp_path), patience=Patience(first_s=0.0, floor_s=0.02))
    world.watchdog.start()
    world.watchdog.stop()
    world.now += 1000
    time.sleep(0.1)
    assert world.reports == []
    world.watchdog.stop()
