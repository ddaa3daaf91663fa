"""One writer per stage: a living rival is refused, a dead one succeeded, and an old writer commits nothing."""

import json
import os
import subprocess
import sys
import threading

import pytest

from nanochat_ray.errors import UserError
from nanochat_ray.storage import Folder
from nanochat_ray.train.checkpoint import Checkpoints
from nanochat_ray.train.lease import TTL_S, GroupReplaced, Lease, clear_stage
from tests.test_checkpoint import some_tensors, state_at


@pytest.fixture
def stage(tmp_path):
    return Folder.at(tmp_path / "base")


class Clock:
    """Time that passes only by sleeping, with something that happens meanwhile."""

    def __init__(self, meanwhile=lambda: None):
        self.now, self.meanwhile = 0.0, meanwhile

    def __call__(self):
        return self.now

    def sleep(self, seconds):
        self.now += seconds
        self.meanwhile()


def acquire(stage, meanwhile=lambda: None):
    clock = Clock(meanwhile)
    lease = Lease.acquire(stage, say=lambda line: None, sleep=clock.sleep, clock=clock)
    return lease, clock.now


def edit_record(stage, number, **changes):
    folder, name = stage / "lease", f"{number:06d}.json"
    folder.write_json(name, {**folder.read_json(name), **changes})


def test_numbers_rise_and_only_the_newest_is_current(stage):
    for number in (1, 2, 3):
        with Lease.acquire(stage) as lease:
            assert lease.fence.number == number
            lease.fence.require_current()
    assert (stage / "lease").list() == ["000003.json"]


def test_only_the_last_group_of_workers_of_an_attempt_commits(stage):
    lease, _ = acquire(stage)
    cut_off, present = lease.fence.for_new_group(), lease.fence.for_new_group()
    checkpoints = Checkpoints.of(stage)
    with pytest.raises(GroupReplaced):
        checkpoints.save(state_at(6), some_tensors(1), some_tensors(1), cut_off)
    checkpoints.save(state_at(3), some_tensors(2), some_tensors(2), present)
    assert checkpoints.steps() == [3]
    lease.fence.require_current()  # the driver's own
    edit_record(stage, 1, released=True)
    acquire(stage)
    with pytest.raises(UserError, match="another attempt"):
        present.require_current()


def test_a_living_rival_is_refused_with_who_and_what_to_do(stage):
    owner, _ = acquire(stage)
    said = []
    clock = Clock(owner.renew)
    with pytest.raises(UserError, match=rf"process {os.getpid()} on .* since .* another --run"):
        Lease.acquire(stage, say=said.append, sleep=clock.sleep, clock=clock)
    assert clock.now < TTL_S
    assert len(said) == 1
    owner.fence.require_current()  # it was not disturbed


def test_a_rival_on_another_machine_that_does_not_renew_is_succeeded_after_a_while(stage):
    old, _ = acquire(stage)
    edit_record(stage, 1, process_space="elsewhere")
    new, waited = acquire(stage)
    assert waited >= TTL_S
    assert new.fence.number == 2
    with pytest.raises(UserError, match=r"another attempt took .*base over \(process \d+ .*lease 2, ours was 1"):
        old.fence.require_current()


def test_a_rival_of_this_machine_whose_process_is_gone_is_succeeded_at_once(stage):
    code = (
        "import os, sys; from nanochat_ray.storage import Folder; from nanochat_ray.train.lease import Lease\n"
        "Lease.acquire(Folder.at(sys.argv[1])); os.kill(os.getpid(), 9)"
    )
    subprocess.run([sys.executable, "-c", code, str(stage)], timeout=60)
    assert (stage / "lease").list() == ["000001.json"]
    new, waited = acquire(stage)
    assert (new.fence.number, waited) == (2, 0.0)


def test_a_rival_that_finishes_while_we_watch_is_succeeded(stage):
    owner, _ = acquire(stage)
    owner.__enter__()
    new, waited = acquire(stage, meanwhile=lambda: owner.__exit__())
    assert new.fence.number == 2
    assert waited < TTL_S


def test_a_lease_that_its_writer_never_filled_in_is_succeeded(stage):
    (stage / "lease").write("000004.json", "")
    new, _ = acquire(stage)
    assert new.fence.number == 5


def test_of_many_that_come_at_once_one_wins(stage):
    came, done, outcomes = threading.Barrier(4), threading.Barrier(4), []

    def come():
        came.wait()
        try:
            with Lease.acquire(stage, say=lambda line: None, renew_every_s=0.02) as lease:
                outcomes.append(lease.fence.number)
                done.wait()
        except UserError:
            outcomes.append("refused")
            done.wait()

    threads = [threading.Thread(target=come) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(outcomes, key=str) == [1, "refused", "refused", "refused"]


def test_an_owner_that_was_succeeded_neither_renews_nor_commits(stage):
    old, _ = acquire(stage)
    edit_record(stage, 1, process_space="elsewhere")
    new, _ = acquire(stage)
    old.renew()
    assert (stage / "lease").list() == ["000002.json"]
    checkpoints = Checkpoints.of(stage)
    checkpoints.save(state_at(3), some_tensors(1), some_tensors(2), new.fence)
    with pytest.raises(UserError, match="another attempt took"):
        checkpoints.save(state_at(3), some_tensors(7), some_tensors(7), old.fence)
    assert checkpoints.newest_valid(pytest.fail) == 3  # of the new owner, untouched
    manifest = (stage / "checkpoints" / "step_000003").read_json("manifest.json")
    assert manifest["lease"] == 2


def test_an_owner_that_is_succeeded_while_it_writes_does_not_commit(stage):
    old, _ = acquire(stage)
    fence, seen = old.fence, []

    class Late:
        number = fence.number

        def require_current(self):
            seen.append(1)
            if len(seen) == 2:  # right before the manifest
                edit_record(stage, 1, released=True)
                acquire(stage)
            fence.require_current()

    with pytest.raises(UserError, match="another attempt took"):
        Checkpoints.of(stage).save(state_at(3), some_tensors(1), some_tensors(2), Late())
    assert Checkpoints.of(stage).steps() == []


def test_two_that_wrote_the_same_number_to_an_object_store_are_told_apart(tmp_path):
    stage = Folder.at(f"file://{tmp_path}/base")
    first, waited = acquire(stage)
    assert waited > 0  # it waited for others that came at the same moment
    edit_record(stage, 1, token="another's")
    with pytest.raises(UserError, match="another attempt"):
        first.fence.require_current()


def test_who_is_displaced_while_the_lease_settles_sees_a_rival(tmp_path):
    stage = Folder.at(f"file://{tmp_path}/base")
    renewals = iter(range(1, 1000))

    def displace():
        edit_record(stage, 1, token="another's", renewals=next(renewals))

    with pytest.raises(UserError, match="two writers"):
        acquire(stage, meanwhile=displace)


def test_a_lease_whose_files_were_deleted_under_it_says_so(stage):
    with Lease.acquire(stage) as lease:
        stage.delete()
        with pytest.raises(UserError, match="is gone"):
            lease.fence.require_current()
    assert not stage.exists("lease")  # giving it back does not bring it back


def test_clearing_a_stage_leaves_its_lease(stage):
    stage.write("events.jsonl", "{}")
    with Lease.acquire(stage) as lease:
        Checkpoints.of(stage).save(state_at(3), some_tensors(1), some_tensors(2), lease.fence)
        clear_stage(stage)
        assert stage.list() == ["lease"]
        lease.fence.require_current()


def test_the_owner_renews_by_itself_and_survives_a_storage_that_fails(stage, capsys):
    renewed = threading.Event()
    lease = Lease.acquire(stage, renew_every_s=0.01)
    write, failures = lease._write, iter([OSError("unplugged")] * 3)

    def failing_write(released):
        if (error := next(failures, None)) is not None:
            raise error
        write(released)
        renewed.set()

    lease._write = failing_write
    with lease:
        assert renewed.wait(10)
    assert capsys.readouterr().err.count("unplugged") == 1
    assert json.loads((stage / "lease").read("000001.json"))["released"]


def test_storage_that_cannot_be_written_is_the_users_to_mend(tmp_path):
    (tmp_path / "base").write_text("a file where the folder should be")
    with pytest.raises(UserError, match="storage .*base failed"):
        Lease.acquire(Folder.at(tmp_path / "base"))
