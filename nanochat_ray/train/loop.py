"""The training loop: steps, evaluations, checkpoints, in that order. Plain torch; what it needs done it is given."""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

from nanochat_ray.model.optim import MuonAdamW
from nanochat_ray.stream.rows import MicroBatch
from nanochat_ray.train.cadence import Cadence
from nanochat_ray.train.checkpoint import TrainState
from nanochat_ray.train.step import StepResult, SummedLoss, World, run_step

SAVE, LEAVE = 1, 2  # what worker 0 may ask of all in a step; the request of a step is a sum of these


@dataclass(frozen=True)
class Hooks:
    """What the loop cannot do itself. All workers call each at the same steps, but the last two: only worker 0."""

    evaluate: Callable[[int], float]  # step → validation bits per byte
    save: Callable[[TrainState], None]  # may return before it is done; `leave` may not
    on_step: Callable[[StepResult, TrainState, float], None]  # result, state after it, seconds
    leave: Callable[[], None]  # ends this worker, everything being saved; does not return
    request: Callable[[], int]  # SAVE and LEAVE, as seen from outside the loop
    checkpoint_every_s: Callable[[], float]  # as of now; infinite while one is still being written


def train(
    state: TrainState,
    summed_loss: SummedLoss,
    optimizer: MuonAdamW,
    micro_batches: Iterator[MicroBatch],
    world: World,
    cadence: Cadence,
    hooks: Hooks,
    clock: Callable[[], float] = time.monotonic,
) -> TrainState:
    """Train from where `state` stands to the plan's last step; returns the final state, which has been saved.

    Raises:
        UserError, RuntimeError: as `run_step`; the last checkpoint stands.
        StopIteration: never; the stream ending early is an error of the caller's iterator.
    """
    plan, first_step = state.plan, state.cursor.step
    if first_step == 0:
        state = _evaluated(state, hooks)
    saved_at = clock()
    while state.cursor.step < plan.steps:
        began = clock()
        request = 0
        if world.rank == 0:
            due = began - saved_at >= hooks.checkpoint_every_s()
            request = hooks.request() | (SAVE if due else 0)
        result = run_step(plan, summed_loss, optimizer, state.cursor, first_step, micro_batches, world, request)
        state = replace(state, cursor=state.cursor.advanced(result.last_row, plan.batch_tokens))
        hooks.on_step(result, state, clock() - began)

        is_last = state.cursor.step == plan.steps
        if is_last or state.cursor.step % cadence.eval_every_steps == 0:
            state = _evaluated(state, hooks)
        if is_last or result.request or state.best_step == state.cursor.step:
            hooks.save(state)
            saved_at = clock()
        if result.request & LEAVE and not is_last:
            hooks.leave()
    return state


def _evaluated(state: TrainState, hooks: Hooks) -> TrainState:
    """The state after an evaluation; its own step is the best one if no evaluation before was as good."""
    bpb = hooks.evaluate(state.cursor.step)
    if state.best_val_bpb is not None and bpb >= state.best_val_bpb:
        return state
    return replace(state, best_val_bpb=bpb, best_step=state.cursor.step)
