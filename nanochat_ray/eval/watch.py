"""The checkpoints of a run that is being trained, as they appear: for evaluation beside it, which nobody waits for."""

import time
from collections.abc import Callable, Iterator

from nanochat_ray.cli import warn
from nanochat_ray.errors import UserError
from nanochat_ray.storage import Folder, retrying
from nanochat_ray.train.checkpoint import Checkpoints

LOOK_EVERY_S = 5.0


def watch(
    stage: Folder, measure: Callable[[int], float], sleep: Callable[[float], object] = time.sleep
) -> dict[int, float]:
    """The figure of each step of `new_steps`, also of those that were measured before.

    Training deletes its older checkpoints, and waits for nobody: one that went while it was measured is left out, with
    a warning.

    Raises:
        UserError: as `measure`, of a checkpoint that is still there.
    """
    figures = {}
    for step in new_steps(stage, sleep):
        try:
            figures[step] = measure(step)
        except (UserError, FileNotFoundError) as error:
            if step in Checkpoints.of(stage).steps():
                raise
            warn(f"the checkpoint of step {step} was deleted while it was measured; going on ({error})")
    return figures


def new_steps(stage: Folder, sleep: Callable[[float], object] = time.sleep) -> Iterator[int]:
    """The newest checkpoint's step, then the newest after it, … until the plan's last; those between are left out.

    Waits for the first, too.
    """
    checkpoints = Checkpoints.of(stage)
    seen, told = -1, False
    while True:
        newest, last = retrying(lambda: _newest(checkpoints), stage, warn)
        if newest > seen:
            seen, told = newest, False
            yield seen
            if seen >= last:
                return
        else:
            if not told:
                after = f" after step {seen}" if seen >= 0 else ""
                print(f"waiting for a checkpoint{after} in {checkpoints.folder}", flush=True)
                told = True
            sleep(LOOK_EVERY_S)


def _newest(checkpoints: Checkpoints) -> tuple[int, int]:
    """The newest step and the plan's last; (−1, 0) where there is none, or it is being deleted just now."""
    newest = max(checkpoints.steps(), default=-1)
    try:
        return newest, checkpoints.state(newest).plan.steps if newest >= 0 else 0
    except FileNotFoundError:
        return -1, 0
