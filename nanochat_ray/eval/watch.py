"""The checkpoints of a run that is being trained, as they appear: for evaluation beside it, which nobody waits for."""

import time
from collections.abc import Callable, Iterator

from nanochat_ray.storage import Folder
from nanochat_ray.train.checkpoint import Checkpoints

LOOK_EVERY_S = 5.0
NICENESS = 19  # of evaluation beside training: it gets what nobody else wants


def new_steps(stage: Folder, sleep: Callable[[float], object] = time.sleep) -> Iterator[int]:
    """The newest checkpoint's step, then the newest after it, … until the plan's last; those between are left out.

    Waits for the first, too.
    """
    checkpoints = Checkpoints.of(stage)
    seen = -1
    while True:
        steps = checkpoints.steps()
        if steps and steps[-1] > seen:
            seen = steps[-1]
            last = checkpoints.state(seen).plan.steps
            yield seen
            if seen >= last:
                return
        else:
            sleep(LOOK_EVERY_S)
