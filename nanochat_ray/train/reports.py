"""What the workers of an attempt leave word of in their stage, for its driver and for the next group of workers.

Each file holds one message, the attempt that left it, and the step at which its group began.
"""

from nanochat_ray.cli import warn
from nanochat_ray.storage import retrying
from nanochat_ray.train.job import TrainingJob

FAILURE = "failure.json"  # why this attempt must not be restarted, written by the worker that knows
LAST_ERROR = "last_error.json"  # what broke the last worker group
LOST_PEER = "lost_peer.json"  # what the others saw of it, if it could not say so itself
WAITED = "waited.json"  # for how long there were too few machines for the group that now begins
REPORTS = (FAILURE, LAST_ERROR, LOST_PEER, WAITED)
REPORT_WITHIN_S = 30.0  # the storage itself may be what has failed, for minutes already


def note_wait(job: TrainingJob, seconds: float) -> None:
    """Tell the next group for how long there were too few machines for it."""
    try:
        job.stage.write_json(WAITED, {"attempt": job.attempt, "message": f"{seconds:.3f}"})
    except OSError as error:  # only the account suffers; who trains finds the storage out
        warn(f"the wait of {seconds:.0f} s for machines was not noted ({error})")


def report_failure(job: TrainingJob, message: str) -> None:
    """Leave word that restarting this attempt cannot help, and why."""
    report(job, FAILURE, message)


def reported_failure(job: TrainingJob) -> str | None:
    """Why this attempt must not be restarted; None while it may."""
    return reported(job, FAILURE)


def report(job: TrainingJob, name: str, message: str, step: int | None = None) -> None:
    content = {"attempt": job.attempt, "step": step, "message": message}
    retrying(lambda: job.stage.write_json(name, content), job.stage, warn, REPORT_WITHIN_S)


def reported(job: TrainingJob, name: str, step: int | None = None) -> str | None:
    """What this attempt left in a file; an earlier one that was killed may have left it there, too.

    Args:
        step: None, or where the group that left it must have begun.
    """
    try:
        content = retrying(lambda: job.stage.read_json(name), job.stage, warn)
    except FileNotFoundError:
        return None
    own = content["attempt"] == job.attempt and (step is None or content.get("step") == step)
    return content["message"] if own else None
