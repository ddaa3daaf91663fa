"""Ends a worker that hangs: no step for far longer than steps take means that none will come.

A collective whose peer is lost without a word, a deadlock, a storage that never answers: none of them raises anything.
A thread of every worker waits for the loop's beats. When they stop, it writes down where every thread of the process
stands and what happened, and ends the process; Ray Train then starts the next group from the last checkpoint. What it
cannot see is native code that hangs while it holds Python's lock, since then this thread stands still, too.
"""

import os
import sys
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median
from typing import NoReturn

from nanochat_ray.cli import warn
from nanochat_ray.storage import RETRY_FOR_S, Folder

STACKS = "stacks"
EXIT_CODE = 70  # EX_SOFTWARE; the process that Ray Train finds dead
SAVE_WITHIN_S = 2 * RETRY_FOR_S  # a write that is tried again for so long raises by itself; one that hangs does not
_RECENT_STEPS = 20
_CHECK_EVERY_S = 1.0
_GRACE_S, _GRACE_FRACTION = 5.0, 0.05  # of the limit: the medians of two workers differ a little
_WRITE_WITHIN_S = 30.0  # the storage itself may be what hangs


@dataclass(frozen=True)
class Patience:
    """How long a worker waits for the end of a step.

    Attributes:
        factor: of the median of the recent steps.
        floor_s: at least so many seconds; an evaluation's first look or a slow storage is no hang.
        first_s: until the first step of a group has ended: it compiles, and waits for the last worker to start.
    """

    factor: float = 10.0
    floor_s: float = 120.0
    first_s: float = 1800.0


PATIENCE = Patience()


class Watchdog:
    """Watches one worker from a thread of its own.

    Args:
        report: told in one line what happened, before the process ends.
        leave: ends the process; does not return.
    """

    def __init__(
        self,
        stage: Folder,
        rank: int,
        step: int,
        report: Callable[[str], None],
        patience: Patience = PATIENCE,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
        leave: Callable[[int], NoReturn] = os._exit,
    ):
        self._stage, self._rank, self._step, self._report, self._patience = stage, rank, step, report, patience
        self._clock, self._sleep, self._leave = clock, sleep, leave
        self._seconds: deque[float] = deque(maxlen=_RECENT_STEPS)
        self._beat = clock()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._follow, name="watchdog", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """No beats are expected any more. May be called twice."""
        self._stop.set()

    def beat(self) -> None:
        """The worker is alive: a part of an evaluation or a checkpoint is done."""
        self._beat = self._clock()

    def pause(self) -> None:
        """The worker waits for a checkpoint, of which a failing storage may make minutes; until the next beat."""
        self._beat = self._clock() + SAVE_WITHIN_S

    def step_ended(self, step: int) -> None:
        """As `beat`, after the update of `step`."""
        now = self._clock()
        self._seconds.append(now - self._beat)
        self._step = step + 1
        self._beat = now

    def limit_s(self) -> float:
        """How long the present silence may last."""
        if not self._seconds:
            return max(self._patience.first_s, self._patience.floor_s)
        return max(self._patience.factor * median(self._seconds), self._patience.floor_s)

    def check(self) -> None:
        """End the process when the silence has lasted too long."""
        silence_s, limit_s = self._clock() - self._beat, self.limit_s()
        if silence_s <= limit_s or self._stop.is_set():
            return
        # In a thread, and not waited for without end: the process must go even when nothing can be written.
        writer = threading.Thread(target=self._write, args=(silence_s,), name="watchdog-writer", daemon=True)
        writer.start()
        writer.join(_WRITE_WITHIN_S)
        # Ray ends the whole group with its first process, so the others' watchdogs get time to write theirs.
        self._sleep(max(_GRACE_S, _GRACE_FRACTION * limit_s))
        if not self._stop.is_set():  # else the worker came to its end after all
            self._leave(EXIT_CODE)

    def _write(self, silence_s: float) -> None:
        name = f"step_{self._step:06d}_rank_{self._rank}.txt"
        message = (
            f"no step ended for {silence_s:.0f} s at step {self._step} ({self._reason()}); "
            f"where the workers stood is in {self._stage / STACKS}"
        )
        warn(message)
        try:
            (self._stage / STACKS).write(name, f"{message}\n\n{stacks_of_all_threads()}")
            self._report(message)
        except OSError as error:
            warn(f"the stacks of worker {self._rank} could not be written ({error})")

    def _reason(self) -> str:
        if not self._seconds:
            return "the first of this group of workers"
        typical = f"{self._patience.factor:g} times the median of {median(self._seconds):.3g} s"
        return f"the limit is {typical}, at least {self._patience.floor_s:g} s"

    def _follow(self) -> None:
        while not self._stop.wait(min(_CHECK_EVERY_S, self._patience.floor_s / 4)):
            self.check()


def stacks_of_all_threads() -> str:
    """Where every Python thread of this process stands, its innermost call last."""
    names = {thread.ident: thread.name for thread in threading.enumerate()}
    own = threading.get_ident()
    parts = []
    for identity, frame in sys._current_frames().items():
        if identity != own:
            name = names.get(identity, "a thread not started by Python")
            parts.append(f"{name} ({identity}):\n{''.join(traceback.format_stack(frame))}")
    return "\n".join(parts)
