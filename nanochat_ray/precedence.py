"""Who waits when all cores are busy: the model's threads, or the many small processes around them. Linux only.

A step of the model is shared among threads, and all of them wait for the one that is interrupted: a millisecond of
somebody else's work on one core is a millisecond lost on all. So everything around the model is scheduled as
SCHED_BATCH (sched(7)): it runs at once where a core is free, and else waits for the end of a time slice.

Who runs us under another policy (chrt) wants that one, so it is left alone; where a sandbox forbids to change it, all
stays as it is and is only slower.
"""

import os
import sys
from contextlib import suppress


def give_way() -> None:
    """The calling thread, and every thread and process that it starts from now on, interrupts nobody."""
    if sys.platform == "linux":
        _change(os.SCHED_OTHER, os.SCHED_BATCH)


def take_precedence() -> None:
    """Undo `give_way` for the calling thread, and for what it starts from now on."""
    if sys.platform == "linux":
        _change(os.SCHED_BATCH, os.SCHED_OTHER)


def only_when_idle() -> None:
    """The calling thread, and what it starts from now on, runs where nobody else wants the core (SCHED_IDLE).

    Evaluation beside training on the same two cores made a step 10 % longer so, and 25 % with the lowest nice value.
    """
    if sys.platform == "linux":
        _change(os.SCHED_OTHER, os.SCHED_IDLE)
    else:
        os.nice(19)


if sys.platform == "linux":

    def _change(before: int, after: int) -> None:
        with suppress(OSError):
            if os.sched_getscheduler(0) == before:
                os.sched_setscheduler(0, after, os.sched_param(0))
