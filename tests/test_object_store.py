"""What training leaves in its storage, in a real object store: an S3 server on this machine."""

import threading
import time

import pytest
import torch

from nanochat_ray.errors import UserError
from nanochat_ray.storage import run_folder
from nanochat_ray.train import events
from nanochat_ray.train.checkpoint import Checkpoints, build_model, load_model
from nanochat_ray.train.events import EventLog, read_events
from nanochat_ray.train.lease import GroupReplaced, Lease, clear_stage
from nanochat_ray.train.saver import Saver
from tests.test_checkpoint import PLAN, some_tensors, state_at
from tests.test_events import step_event, write_steps
from tests.test_lease import acquire, edit_record


@pytest.fixture
def stage(s3_store):
    return run_folder(s3_store.new_bucket(), "demo") / "base"


def test_checkpoints_are_saved_beside_training_pruned_and_loaded(stage):
    checkpoints = Checkpoints.of(stage)
    saver = Saver(checkpoints, 2, 0, lambda: None, warn=pytest.fail)
    for step in (1, 2, 3, 4):
        saver.save(state_at(step, best_step=1), some_tensors(step), some_tensors(-step), time.monotonic())
    saver.wait()
    assert [saved.step for saved in saver.finished()] == [1, 2, 3, 4]
    assert (stage / "checkpoints").list() == ["step_000001", "step_000003", "step_000004"]
    assert checkpoints.newest_whole(pytest.fail) == checkpoints.newest_valid(pytest.fail) == 4
    loaded = checkpoints.load(pytest.fail)
    assert loaded.state == state_at(4, best_step=1)
    assert torch.equal(loaded.optimizer["a"], some_tensors(-4)["a"])


@pytest.mark.parametrize("damage", ["flip", "delete"])
def test_a_damaged_checkpoint_is_named_and_the_one_before_is_used(stage, damage):
    checkpoints = Checkpoints.of(stage)
    for step in (3, 6):
        checkpoints.save(state_at(step), some_tensors(step), some_tensors(step))
    place = stage / "checkpoints" / "step_000006"
    data = place.read("model.safetensors")
    if damage == "delete":
        place.delete("model.safetensors")
    else:
        place.write("model.safetensors", data[:-1] + bytes([data[-1] ^ 1]))
    warnings = []
    assert checkpoints.load(warnings.append).state == state_at(3)
    assert len(warnings) == 1
    assert "step_000006" in warnings[0]
    checkpoints.delete_after(3)
    assert checkpoints.steps() == [3]


def test_a_model_is_served_from_there(stage):
    model = build_model(PLAN)
    Checkpoints.of(stage).save(state_at(9), model.state_dict(), some_tensors(0))
    loaded, plan, step = load_model(stage, "t", torch.device("cpu"), torch.float32)
    assert (plan, step) == (PLAN, 9)
    ids_BT = torch.arange(12).view(1, 12)
    assert torch.equal(loaded(ids_BT), model(ids_BT))


def test_one_writer_has_the_lease_and_the_next_a_higher_number(stage):
    first, waited = acquire(stage)
    assert waited > 0  # others that came at the same moment could have displaced it
    with pytest.raises(UserError, match="two writers"):
        acquire(stage, meanwhile=first.renew)
    edit_record(stage, 1, process_space="elsewhere")
    second, _ = acquire(stage)
    assert second.fence.number == 2
    checkpoints = Checkpoints.of(stage)
    checkpoints.save(state_at(3), some_tensors(1), some_tensors(2), second.fence)
    with pytest.raises(UserError, match="another attempt took"):
        checkpoints.save(state_at(4), some_tensors(7), some_tensors(7), first.fence)
    assert checkpoints.steps() == [3]
    clear_stage(stage)
    assert stage.list() == ["lease"]


def test_a_lease_that_is_given_back_is_free_at_once(stage):
    for number in (1, 2):
        lease, waited = acquire(stage)
        assert waited < 5
        with lease:
            assert lease.fence.number == number


def test_events_are_there_after_each_flush_and_go_back_with_the_run(stage):
    write_steps(stage, 0, [0, 1, 2])
    write_steps(stage, 2, [2, 3])
    assert [event["step"] for event in read_events(stage) if event["kind"] == "step"] == [0, 1, 2, 3]
    assert any(name.startswith("events.out.tfevents") for name in (stage / "tensorboard").list())


def test_events_are_there_soon_without_a_flush_so_that_a_lost_groups_steps_are_known(stage, monkeypatch):
    monkeypatch.setattr(events, "UPLOAD_EVERY_S", 0.05)
    lease, _ = acquire(stage)
    fence = lease.fence.for_new_group()
    log = EventLog(stage, 0, fence.require_current)
    log.append("step", **step_event(0))
    deadline = time.monotonic() + 10
    while not read_events(stage):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    lease.fence.for_new_group()  # another group has begun; this one is cut off
    log.append("step", **step_event(1))
    time.sleep(0.5)
    assert [event["step"] for event in read_events(stage)] == [0]
    with pytest.raises(GroupReplaced):
        log.flush()
    EventLog(stage, 0).close()
    (lost,) = read_events(stage)
    assert (lost["kind"], lost["steps"]) == ("lost", 1)


@pytest.mark.slow
def test_a_store_that_is_away_for_longer_than_its_client_tries_costs_no_checkpoint_and_no_event(s3_store, stage):
    warnings = []
    log = EventLog(stage, 0)
    log.append("start", step=0)
    saver = Saver(Checkpoints.of(stage), 2, 0, log.flush, warn=warnings.append)
    with Lease.acquire(stage, renew_every_s=1.0) as lease:
        s3_store.stop()
        saver.save(state_at(3), some_tensors(3), some_tensors(3), time.monotonic())
        assert saver.busy  # and the loop goes on
        threading.Timer(20.0, s3_store.start).start()
        saver.wait()
        lease.fence.require_current()
    assert saver.finished()[0].seconds > 20.0
    assert len(warnings) == 1
    assert Checkpoints.of(stage).newest_valid(pytest.fail) == 3
    assert [event["kind"] for event in read_events(stage)] == ["start"]
