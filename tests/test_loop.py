"""When the loop saves: when it is due, when it is asked to, at a new best evaluation and at the end."""

import math

import pytest

from nanochat_ray.stream.cursor import Cursor, RowId
from nanochat_ray.train import loop
from nanochat_ray.train.cadence import Cadence
from nanochat_ray.train.checkpoint import TrainState
from nanochat_ray.train.loop import LEAVE, SAVE, Hooks
from nanochat_ray.train.step import StepResult, World
from tests.test_checkpoint import IDENTITY, PLAN

STEPS = PLAN.steps  # 9, of one second each


class Left(Exception):
    pass


@pytest.fixture
def run(monkeypatch):
    """A function that trains without a model; returns the saved states and the final one."""

    def run(eval_every=100, bpb=lambda step: 1.0, every_s=lambda: math.inf, request=lambda: 0):
        now, saved = 0.0, []

        def run_step(plan, summed_loss, optimizer, cursor, first_step, micro_batches, world, request):
            nonlocal now
            now += 1.0
            return StepResult(cursor.step, 1.0, 1, "", 0, 0, RowId(0, cursor.step, 0), request, 0.0)

        def leave():
            raise Left

        monkeypatch.setattr(loop, "run_step", run_step)
        hooks = Hooks(bpb, saved.append, lambda *_: None, leave, request, every_s)
        state = TrainState(PLAN, Cursor(IDENTITY))
        world = World(0, 1, None)
        try:
            state = loop.train(state, None, None, iter(()), world, Cadence(eval_every, None), hooks, lambda: now)
        except Left:
            return saved, None
        return saved, state

    return run


def steps_of(saved):
    return [state.cursor.step for state in saved]


def test_the_end_is_saved(run):
    saved, state = run()
    assert steps_of(saved) == [STEPS]
    assert saved[-1] == state


def test_what_is_due_is_saved_in_the_step_that_follows(run):
    assert steps_of(run(every_s=lambda: 3.0)[0]) == [4, 8, 9]


def test_every_step_is_saved_at_an_interval_of_0(run):
    assert steps_of(run(every_s=lambda: 0.0)[0]) == list(range(1, STEPS + 1))


def test_while_one_is_being_written_none_is_begun_but_the_next_step_asks_again(run):
    intervals = iter([0.0, math.inf, math.inf, 0.0, *[math.inf] * STEPS])
    assert steps_of(run(every_s=lambda: next(intervals))[0]) == [1, 4, STEPS]


def test_a_new_best_evaluation_is_saved_with_its_step(run):
    curve = {0: 8.0, 2: 5.0, 4: 6.0, 6: 4.0, 8: 4.0, 9: 4.5}
    saved, state = run(eval_every=2, bpb=curve.get)
    assert steps_of(saved) == [2, 6, STEPS]
    assert [(one.best_step, one.best_val_bpb) for one in saved] == [(2, 5.0), (6, 4.0), (6, 4.0)]
    assert state.best_step == 6


def test_a_notice_is_saved_at_once_and_leaving_comes_after_saving(run):
    requests = iter([0, 0, SAVE, 0, SAVE | LEAVE])
    saved, state = run(request=lambda: next(requests))
    assert steps_of(saved) == [3, 5]
    assert state is None
