"""Who waits when all cores are busy: the model's threads, or the many small processes around them. Linux only.

A step of the model is shared among threads, and all of them wait for the one that is interrupted: a millisecond of
somebody else's work on one core is a millisecond lost on all. So everything around the model is scheduled as
SCHED_BATCH (sched(7)): it runs at once where a core is free, and else waits for the end of a time slice.
"""

import os
import sys


def give_way() -> None:
    """The calling thread, and every thread and process that it starts from now on, interrupts nobody."""
    if sys.platform == "linux":
        os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))


def take_precedence() -> None:
    """The opposite, the system's default."""
    if sys.platform == "linux":
        os.sched_setscheduler(0, os.SCHED_OTHER, os.sched_param(0))
