"""Who may write a stage: one attempt at a time, each with a higher number than the one before.

    <stage>/lease/000003.json      the highest number is the owner's; it renews the file while it lives
    <stage>/lease/group.json       which of the owner's groups of workers writes: the last one that began

A driver takes the lease before it writes or deletes anything. Its number fences off the attempt before: worker 0 asks
for it right before a checkpoint becomes visible, so that an old writer that is cut off, but alive, changes nothing. The
same holds between the groups of one attempt: a lost machine may still reach the storage.
Clocks of different machines are never compared: a rival is alive when its file changes while we watch.
"""

import json
import os
import platform
import re
import socket
import threading
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from nanochat_ray.cli import warn
from nanochat_ray.errors import UserError
from nanochat_ray.storage import Folder, storage_failed
from nanochat_ray.train.origin import CHECKPOINTS, ORIGIN, START, checkpoint_name

FOLDER, GROUP = "lease", "group.json"
RENEW_EVERY_S = 4.0
TTL_S = 20.0  # without a renewal for so long the owner counts as dead; several renewals may get lost
LOOK_EVERY_S = 0.5
SETTLE_S = 2.0  # on object stores, between writing a lease and believing in it
Record = dict[str, Any]


class GroupReplaced(Exception):
    """This worker's group counts as lost, and another has begun. Nobody need hear of it but this worker."""


@dataclass(frozen=True)
class Fence:
    """What a writer shows to prove that the stage is still its own. Plain data: it travels to the workers."""

    stage: Folder
    number: int
    token: str  # of this attempt: on object stores two may write the same number
    group: str | None = None  # of workers; None: for the driver

    def for_new_group(self) -> "Fence":
        """The fence of a group that begins; those of the attempt's groups before are worth nothing from now on."""
        fence = replace(self, group=uuid.uuid4().hex)
        (self.stage / FOLDER).write_json(GROUP, {"token": fence.token, "group": fence.group})
        return fence

    def require_current(self) -> None:
        """Check that no other attempt has taken the stage since, and no other group of this one has begun.

        Raises:
            UserError: another attempt has; names it.
            GroupReplaced: another group has.
            OSError: the storage failed.
        """
        self._require_attempt()
        if self.group is not None and (self.stage / FOLDER).read_json(GROUP)["group"] != self.group:
            raise GroupReplaced(f"another group of workers has begun to write {self.stage}")

    def _require_attempt(self) -> None:
        number, record = _newest(self.stage)
        if number < self.number:
            raise UserError(f"the lease of {self.stage} is gone: its files were deleted under the run, which ends here")
        if number > self.number or (record is not None and record["token"] != self.token):
            raise UserError(
                f"another attempt took {self.stage} over ({_who(record)}; lease {number}, ours was {self.number}): "
                "this one ends. Let that one finish, or stop it and run the same command again"
            )


class Lease:
    """The right to write a stage, held and renewed by a thread of this process until the block ends.

    with Lease.acquire(stage) as lease: ...
    """

    def __init__(self, fence: Fence, record: Record, renew_every_s: float):
        self.fence = fence
        self._record, self._renew_every_s = record, renew_every_s
        self._warned = False
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._keep, daemon=True)

    @staticmethod
    def acquire(
        stage: Folder,
        say: Callable[[str], None] = print,
        sleep: Callable[[float], object] = time.sleep,
        clock: Callable[[], float] = time.monotonic,
        renew_every_s: float = RENEW_EVERY_S,
    ) -> "Lease":
        """Take the stage; adopts it from an owner that is dead, for which it may have to watch for TTL_S.

        Raises:
            UserError: another process is at work on the stage, says which and since when; or the storage failed.
        """
        try:
            return Lease._acquire(stage, say, sleep, clock, renew_every_s)
        except OSError as error:
            raise storage_failed(stage, error) from error

    @staticmethod
    def _acquire(
        stage: Folder,
        say: Callable[[str], None],
        sleep: Callable[[float], object],
        clock: Callable[[], float],
        renew_every_s: float,
    ) -> "Lease":
        while True:
            number, rival = _newest(stage)
            if number and not _is_over(rival):
                say(f"{stage} is leased by {_who(rival)}; seeing for up to {TTL_S:g} s whether that is still alive")
                _require_dead(stage, number, rival, sleep, clock)
            fence = Fence(stage, number + 1, uuid.uuid4().hex)
            record = {
                "token": fence.token,
                "host": socket.gethostname(),
                "pid": os.getpid(),
                "process_space": _process_space(),
                "began": time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime()),
                "renewals": 0,
                "released": False,
            }
            if _create(fence, record, sleep):
                for name in (stage / FOLDER).list():
                    if name < _name(fence.number):
                        (stage / FOLDER).delete(name)
                return Lease(fence, record, renew_every_s)

    def __enter__(self) -> "Lease":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()
        try:
            self._write(released=True)  # it stays, so that the next number is higher
        except OSError as error:
            warn(f"the lease of {self.fence.stage} could not be given back ({error}); it ends by itself")

    def renew(self) -> None:
        """Show that the owner lives."""
        self._record["renewals"] += 1
        self._write(released=False)

    def _keep(self) -> None:
        while not self._stop.wait(self._renew_every_s):
            try:
                self.renew()
                self._warned = False
            except OSError as error:
                if not self._warned:
                    warn(f"the lease of {self.fence.stage} was not renewed ({error}); trying again")
                self._warned = True

    def _write(self, released: bool) -> None:
        try:
            self.fence.require_current()
        except UserError:
            return  # another has it; the workers end at their next checkpoint, with this message
        self._record["released"] = released
        (self.fence.stage / FOLDER).write_json(_name(self.fence.number), self._record)


def clear_stage(stage: Folder) -> None:
    """Delete all that a stage holds but its lease, which the caller has, and the weights that were imported into it."""
    imported = stage.exists(ORIGIN)
    for name in stage.list():
        if imported and name == CHECKPOINTS:
            for step in (stage / name).list():
                if step != checkpoint_name(START):
                    (stage / name).delete(step)
        elif name != FOLDER and not (imported and name == ORIGIN):
            stage.delete(name)


def _require_dead(
    stage: Folder, number: int, rival: Record | None, sleep: Callable[[float], object], clock: Callable[[], float]
) -> None:
    """Return when the owner has given the lease back, or has not renewed it for TTL_S.

    Raises:
        UserError: it renewed it, or another took it.
    """
    began = clock()
    while clock() - began < TTL_S:
        sleep(LOOK_EVERY_S)
        number_now, now = _newest(stage)
        if number_now == number and _is_over(now):
            return
        if now is not None and rival is not None and (number_now != number or now["renewals"] != rival["renewals"]):
            raise UserError(
                f"{stage} is being written by {_who(now)}: two writers would destroy each other's work. Wait for it, "
                "stop it (the same command then goes on where it stood), or use another --run"
            )
        rival = rival or now  # its first content may not have been there yet


def _create(fence: Fence, record: Record, sleep: Callable[[float], object]) -> bool:
    """Write the first content of a lease unless another has the number; whether it is ours."""
    folder, name = fence.stage / FOLDER, _name(fence.number)
    if folder.is_local:
        os.makedirs(folder.uri, exist_ok=True)
        try:
            with open(f"{folder}/{name}", "x") as file:  # O_EXCL: one of two wins
                json.dump(record, file)
        except FileExistsError:
            return False
        return True
    # pyarrow cannot ask an object store to write only what is not there. Two that come at once write the same name,
    # the later content stays, and after a pause both read who that was. One that hesitates for longer than the pause
    # between looking and writing can still displace an owner; the displaced one finds a foreign token in the lease
    # before it commits anything (`Fence.require_current`), so that a checkpoint still has one writer.
    folder.write_json(name, record)
    sleep(SETTLE_S)
    number, now = _newest(fence.stage)
    return number == fence.number and now is not None and now["token"] == fence.token


def _newest(stage: Folder) -> tuple[int, Record | None]:
    """The highest lease and its content; None: it is being written at this moment. (0, None): there is none."""
    numbers = [int(name[:6]) for name in (stage / FOLDER).list() if re.fullmatch(r"\d{6}\.json", name)]
    if not numbers:
        return 0, None
    try:
        record = json.loads((stage / FOLDER).read(_name(max(numbers))))
    except (FileNotFoundError, ValueError):
        return max(numbers), None
    return max(numbers), record


def _is_over(record: Record | None) -> bool:
    """Whether the owner gave the lease back, or was a process of this machine that is no more."""
    if record is None:
        return False
    return record["released"] or (record["process_space"] == _process_space() and not _is_running(record["pid"]))


def _is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # another user's
        return True
    return True


def _process_space() -> str:
    """Where a process number means the same process: this boot of this machine, and this container on it."""
    try:
        return f"{Path('/proc/sys/kernel/random/boot_id').read_text().strip()} {os.readlink('/proc/self/ns/pid')}"
    except OSError:  # not Linux
        return f"{platform.node()} {uuid.getnode()}"


def _who(record: Record | None) -> str:
    if record is None:
        return "another process"
    return f"process {record['pid']} on {record['host']} since {record['began']}"


def _name(number: int) -> str:
    return f"{number:06d}.json"
