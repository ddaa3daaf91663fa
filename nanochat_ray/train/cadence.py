"""When to look at the model and when to save it. Pure."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

LEAST_S, MOST_S = 5.0, 1800.0
# What is assumed of machines before they have been seen, one failure in 6 h, counts as a tenth of a failure: clouds and
# hours differ by orders of magnitude, so the first real failures should say more than we do.
PRIOR_FAILURES, PRIOR_S = 0.1, 0.1 * 6 * 3600.0


@dataclass(frozen=True)
class Cadence:
    """How often to evaluate and to save.

    Attributes:
        checkpoint_every_s: None: as `checkpoint_interval_s` says; 0: at every step, even if training has to wait.
    """

    eval_every_steps: int
    checkpoint_every_s: float | None


def checkpoint_interval_s(stall_s: float | None, mtbf_s: float) -> float:
    """Seconds between checkpoints that lose the least time to saving and to repeating (Young 1974; Daly 2006).

    Args:
        stall_s: how long training stands still for one; None, before the first, asks for one soon, to measure it.
        mtbf_s: mean time between failures that come without notice.
    """
    if stall_s is None:
        return LEAST_S
    return min(max(math.sqrt(2 * stall_s * mtbf_s), LEAST_S), MOST_S)


def mean_time_between_failures_s(events: Iterable[Mapping[str, Any]]) -> float:
    """Of a stage, in seconds, from its events: training time over failures, both beginning with the prior.

    A failure is a group of workers that starts in an attempt whose last group neither left nor finished. Between
    attempts nothing is counted: how they ended is the user's business, or the driver's.
    """
    failures, seconds = PRIOR_FAILURES, PRIOR_S
    attempt: Any = None
    running, last_time = False, 0.0
    for event in events:
        kind, same = event["kind"], True
        if kind == "start":
            same = event.get("attempt") == attempt and attempt is not None
            failures += running and same
            attempt, running = event.get("attempt"), True
        elif kind in ("leave", "finish"):
            running = False
        if same and attempt is not None:
            seconds += max(0.0, event["time"] - last_time)
        last_time = event["time"]
    return seconds / failures
