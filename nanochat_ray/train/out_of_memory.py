"""Which number to lower when a worker has too little memory: a restart would only run out of it again."""

import torch

from nanochat_ray.plan import PRETRAIN, Plan

# How RuntimeErrors of torch's allocators, and of libraries below it, say it.
_SIGNS = ("out of memory", "can't allocate memory", "bad_alloc", "cannot allocate memory")


def out_of_memory_advice(error: BaseException, plan: Plan) -> str | None:
    """One line that says what to change, or None when the error has nothing to do with memory.

    Ray's own OutOfMemoryError, of a task that its memory monitor ended, counts as well.
    """
    text = str(error).strip()
    if isinstance(error, MemoryError | torch.OutOfMemoryError) or type(error).__name__ == "OutOfMemoryError":
        said = True
    else:
        said = isinstance(error, RuntimeError | OSError) and any(sign in text.lower() for sign in _SIGNS)
    if not said:
        return None
    first_line = text.splitlines()[0] if text else type(error).__name__
    return f"a worker ran out of memory; {what_to_lower(plan)} ({first_line})"


def killed_advice(plan: Plan, seen_by_peers: str | None) -> str:
    """For processes that died again and again, without a word, on machines that stayed.

    Args:
        seen_by_peers: how the communication of the others failed, if there were any.
    """
    seen = f" (what the other workers saw: {' '.join(seen_by_peers.split())})" if seen_by_peers else ""
    return (
        f"their processes were killed from outside or crashed, while their machines stayed{seen}; unless that names "
        "another cause, the kernel or Ray has taken one because the machine's memory was full: "
        f"{what_to_lower(plan)}"
    )


def what_to_lower(plan: Plan) -> str:
    """The flag that lowers a worker's memory, its present value, and how much memory the plan estimates."""
    estimate = (
        f"the plan estimates {plan.model.worker_bytes(plan.micro_batch_rows) / 2**30:.1f} GiB for one worker, of "
        f"which {plan.model.activation_bytes(plan.micro_batch_rows) / 2**30:.1f} GiB are for "
        f"{plan.micro_batch_rows} rows at once"
    )
    if plan.stage == PRETRAIN and plan.micro_batch_rows > 1:
        lower = plan.micro_batch_rows // 2
        return f"lower --micro-batch-rows from {plan.micro_batch_rows} to {lower}, with --fresh; {estimate}"
    if plan.stage == PRETRAIN:
        return f"--micro-batch-rows is 1 already, so lower --depth, or give each worker more memory; {estimate}"
    return f"give each worker more memory, or pretrain with a lower --micro-batch-rows; {estimate}"
