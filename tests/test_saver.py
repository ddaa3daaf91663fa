"""Saving beside training: what is saved is the moment of the call, errors are retried, and nothing is lost silently."""

import errno
import os
import sys
import threading
import time

import pytest
import torch

from nanochat_ray.errors import UserError
from nanochat_ray.storage import Folder, retrying
from nanochat_ray.train.checkpoint import Checkpoints
from nanochat_ray.train.lease import Fence
from nanochat_ray.train.saver import LOWEST_PRIORITY, Saver
from tests.test_checkpoint import some_tensors, state_at


@pytest.fixture
def stage(tmp_path):
    return Folder.at(tmp_path / "base")


class Gated(Checkpoints):
    """Checkpoints whose `save` waits until it may go on, and first raises the errors it was given."""

    def __init__(self, stage, errors=()):
        super().__init__(Checkpoints.of(stage).folder)
        object.__setattr__(self, "gate", threading.Event())
        object.__setattr__(self, "errors", list(errors))
        object.__setattr__(self, "priority", None)

    def save(self, *given):
        assert self.gate.wait(30)
        object.__setattr__(self, "priority", os.getpriority(os.PRIO_PROCESS, threading.get_native_id()))
        if self.errors:
            raise self.errors.pop(0)
        return super().save(*given)


def saver_of(checkpoints, keep=2, committed_step=0, warn=pytest.fail, after=lambda: None, **more):
    return Saver(checkpoints, keep, committed_step, after, warn=warn, sleep=lambda seconds: None, **more)


def save(saver, step, value=1, **state):
    began = time.monotonic()
    saver.save(state_at(step, **state), some_tensors(value), some_tensors(value), began)


def test_what_is_saved_is_the_moment_of_the_call(stage):
    checkpoints = Gated(stage)
    saver = saver_of(checkpoints)
    model, optimizer = some_tensors(1), some_tensors(2)
    saver.save(state_at(3), model, optimizer, time.monotonic())
    for tensor in (*model.values(), *optimizer.values()):
        tensor.fill_(99.0)  # the next step's update
    assert saver.busy
    assert saver.finished() == []
    checkpoints.gate.set()
    saver.wait()
    assert not saver.busy
    assert torch.equal(checkpoints.model(3)["a"], some_tensors(1)["a"])
    assert torch.equal(checkpoints.optimizer(3)["b.exp_avg"], some_tensors(2)["b.exp_avg"])


def test_each_commit_is_reported_once_with_its_stall_and_its_time(stage):
    saver = saver_of(Checkpoints.of(stage))
    save(saver, 3)
    saver.wait()
    (saved,) = saver.finished()
    assert (saved.step, saved.bytes > 0) == (3, True)
    assert 0 < saved.stall_s <= saved.seconds
    assert saver.finished() == []


def test_the_next_one_waits_for_the_one_before_and_both_are_kept(stage):
    checkpoints = Gated(stage)
    saver = saver_of(checkpoints)
    save(saver, 3)
    threading.Timer(0.1, checkpoints.gate.set).start()
    save(saver, 4, value=2)
    saver.wait()
    assert [saved.step for saved in saver.finished()] == [3, 4]
    assert torch.equal(checkpoints.model(3)["a"], some_tensors(1)["a"])  # its buffers were not overwritten too early
    assert torch.equal(checkpoints.model(4)["a"], some_tensors(2)["a"])


def test_the_newest_and_the_best_stay(stage):
    saver = saver_of(Checkpoints.of(stage))
    for step in (1, 2, 3, 4, 5):
        save(saver, step, best_step=2)
    saver.wait()
    assert Checkpoints.of(stage).steps() == [2, 4, 5]


def test_a_storage_that_fails_for_a_while_costs_one_warning(stage):
    checkpoints, warnings = Gated(stage, [OSError("unplugged")] * 4), []
    checkpoints.gate.set()
    saver = saver_of(checkpoints, warn=warnings.append)
    save(saver, 3)
    saver.wait()
    assert [saved.step for saved in saver.finished()] == [3]
    assert len(warnings) == 1
    assert "unplugged" in warnings[0]


@pytest.mark.parametrize("ask", [Saver.finished, Saver.wait, lambda saver: save(saver, 9)])
def test_a_storage_that_keeps_failing_ends_the_run_with_what_is_safe(stage, ask):
    checkpoints = Gated(stage, [OSError("unplugged")] * 4)
    checkpoints.gate.set()
    saver = saver_of(checkpoints, committed_step=7, warn=lambda warning: None, retry_for_s=0.0)
    save(saver, 8)
    while saver.busy:
        time.sleep(0.001)
    with pytest.raises(UserError, match=r"step 8 was not saved: .*base.*unplugged.*last checkpoint is that of step 7"):
        ask(saver)


def test_a_full_disk_says_what_to_do_and_leaves_no_half_checkpoint(stage, monkeypatch):
    write = Folder.write

    def full(folder, name, data):
        if name == "optimizer.safetensors":
            raise OSError(errno.ENOSPC, "No space left on device")
        write(folder, name, data)

    monkeypatch.setattr(Folder, "write", full)
    saver = saver_of(Checkpoints.of(stage), warn=lambda warning: None, retry_for_s=0.0)
    save(saver, 3)
    with pytest.raises(UserError, match="no room is left .*base.*: free some .*run the same command again.*none yet"):
        saver.wait()
    assert (stage / "checkpoints").list() == []


def test_who_lost_the_lease_hears_it(stage):
    (stage / "lease").write_json("000002.json", {"token": "b", "pid": 1, "host": "h", "began": "t"})
    saver = saver_of(Checkpoints.of(stage), fence=Fence(stage, 1, "a"))
    save(saver, 3)
    with pytest.raises(UserError, match="another attempt took"):
        saver.wait()


def test_a_bug_in_the_thread_reaches_the_loop(stage):
    checkpoints = Gated(stage, [ZeroDivisionError("a bug")])
    checkpoints.gate.set()
    saver = saver_of(checkpoints)
    save(saver, 3)
    with pytest.raises(ZeroDivisionError, match="a bug"):
        saver.wait()


def test_old_checkpoints_that_cannot_be_deleted_are_tried_again(stage, monkeypatch):
    warnings, delete = [], Checkpoints._delete

    def fail(*_):
        raise OSError("denied")

    saver = saver_of(Checkpoints.of(stage), keep=1, warn=warnings.append)
    save(saver, 3)
    saver.wait()
    monkeypatch.setattr(Checkpoints, "_delete", fail)
    save(saver, 4)
    saver.wait()
    assert len(warnings) == 1
    monkeypatch.setattr(Checkpoints, "_delete", delete)
    save(saver, 5)
    saver.wait()
    assert Checkpoints.of(stage).steps() == [5]


def test_what_follows_a_commit_runs_in_the_thread_and_its_failure_ends_the_run(stage):
    followed = []

    def after():
        followed.append(threading.current_thread().name)
        raise UserError("the events were not written")

    saver = saver_of(Checkpoints.of(stage), after=after)
    save(saver, 3)
    with pytest.raises(UserError, match="the events were not written"):
        saver.wait()
    assert followed == ["saver"]
    assert Checkpoints.of(stage).steps() == [3]


@pytest.mark.skipif(sys.platform != "linux", reason="threads have a priority of their own only on Linux")
def test_the_writing_thread_gives_way_until_training_waits_for_it(stage):
    own = os.getpriority(os.PRIO_PROCESS, 0)
    checkpoints = Gated(stage)
    saver = saver_of(checkpoints)
    save(saver, 3)
    checkpoints.gate.set()
    while saver.busy:
        time.sleep(0.001)
    assert checkpoints.priority == LOWEST_PRIORITY
    assert os.getpriority(os.PRIO_PROCESS, 0) == own
    if os.geteuid() == 0:  # others may not raise a priority
        checkpoints.gate.clear()
        save(saver, 4)
        threading.Timer(0.1, checkpoints.gate.set).start()
        saver.wait()
        assert checkpoints.priority == own


def test_pauses_grow_and_a_missing_file_is_an_answer(stage):
    pauses, errors = [], [OSError("x")] * 8
    now = 0.0

    def sleep(seconds):
        nonlocal now
        now += seconds
        pauses.append(seconds)

    def act():
        if errors:
            raise errors.pop()
        return "done"

    assert retrying(act, stage, lambda warning: None, clock=lambda: now, sleep=sleep) == "done"
    assert pauses == [0.5, 1.0, 2.0, 4.0, 8.0, 15.0, 15.0, 15.0]
    with pytest.raises(FileNotFoundError):
        retrying(lambda: stage.read("nothing"), stage, pytest.fail)


def test_a_store_that_cannot_be_reached_is_tried_again_but_a_wrong_uri_is_not(stage):
    outcomes = [UserError("cannot be opened"), "done"]
    outcomes[0].__cause__ = OSError("no route")

    def act():
        outcome = outcomes.pop(0)
        if isinstance(outcome, Exception):
            raise outcome
        return outcome

    assert retrying(act, stage, lambda warning: None, sleep=lambda seconds: None) == "done"
    with pytest.raises(UserError, match="nosuch"):
        retrying(lambda: Folder.at("nosuch://x").exists("a"), stage, pytest.fail)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_tensors_on_a_gpu_are_saved_as_they_were(stage):
    saver = saver_of(Checkpoints.of(stage))
    model = {"a": torch.full((1 << 22,), 1.0, device="cuda")}
    saver.save(state_at(3), model, some_tensors(2), time.monotonic())
    model["a"].fill_(2.0)
    saver.wait()
    assert bool((Checkpoints.of(stage).model(3)["a"] == 1.0).all())
