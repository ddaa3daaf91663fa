"""When a run that keeps failing should end: a mistake repeats itself at one step, while machines come and go."""

from collections.abc import Callable, Iterable
from collections.abc import Set as AbstractSet
from typing import Any

RESTARTS_WITHOUT_PROGRESS = 2  # lost machines may restart a run for ever, a bug must not


def why_to_give_up(
    events: Iterable[dict[str, Any]],
    attempt: str,
    step: int,
    error: str,
    usable_machines: Callable[[], AbstractSet[str]],
) -> str | None:
    """One line for the user when too many groups of this attempt began at `step` and failed; None to go on.

    Args:
        events: of the stage; each start of a group says on which machines.
        error: what the workers of the last of these groups reported.
        usable_machines: asked only when there are so many. A group whose machine is gone was not in vain: there the
            machine was lost.
    """
    starts = [event for event in events if event["kind"] == "start" and event.get("attempt") == attempt]
    in_vain = [start for start in starts if start["step"] == step]
    if len(in_vain) <= RESTARTS_WITHOUT_PROGRESS:
        return None
    usable = usable_machines()
    in_vain = [start for start in in_vain if usable >= set(start["machines"])]
    if len(in_vain) <= RESTARTS_WITHOUT_PROGRESS:
        return None
    return f"the workers failed {len(in_vain)} times at step {step}; the last error: {error}"
