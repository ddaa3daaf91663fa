"""One step on one worker: what is not a number stops it before the update, and names the rows it came from."""

import re

import numpy as np
import pytest
import torch

from nanochat_ray.errors import UserError
from nanochat_ray.model.optim import build_optimizer
from nanochat_ray.plan import make_plan
from nanochat_ray.stream.cursor import Cursor, RowId, StreamIdentity
from nanochat_ray.stream.rows import MicroBatch
from nanochat_ray.train.checkpoint import build_model
from nanochat_ray.train.step import World, run_step

PLAN = make_plan(depth=1, vocab_size=300, head_size=64, sequence_len=16, batch_tokens=512, micro_batch_rows=2)
ALONE = World(0, 1, torch.device("cpu"))
UNIT_ROWS = 5  # so that micro-batches cross units


def micro_batches():
    random = np.random.default_rng(0)
    for index in range(PLAN.micro_batches):
        ids = [(0, *divmod(row, UNIT_ROWS)) for row in (2 * index, 2 * index + 1)]
        tokens = random.integers(0, 300, (2, 17), dtype=np.int32)
        yield MicroBatch(np.array(ids, dtype=np.int64), tokens, *np.array([[0, 0], [3, 1]], dtype=np.int32))


class Training:
    """A model of one layer; the loss or the gradient of some micro-batches of its step is poisoned."""

    def __init__(self, bad_losses: tuple[int, ...] = (), bad_gradients: tuple[int, ...] = ()):
        self.model = build_model(PLAN)
        self.optimizer = build_optimizer(self.model, PLAN.rates)
        self.before = {name: weight.clone() for name, weight in self.model.state_dict().items()}
        self.bad_losses, self.bad_gradients, self.calls = bad_losses, bad_gradients, 0

    def summed_loss(self, inputs_BT, targets_BT):
        index, self.calls = self.calls, self.calls + 1
        loss = self.model(inputs_BT, targets_BT, reduction="sum")
        if index in self.bad_gradients:
            loss.register_hook(lambda gradient: gradient * float("inf"))
        return loss * float("nan") if index in self.bad_losses else loss

    def step(self):
        cursor = Cursor(StreamIdentity("c", "t", 16, 2, PLAN.micro_batches, 42))
        return run_step(PLAN, self.summed_loss, self.optimizer, cursor, 0, micro_batches(), ALONE)

    def is_untouched(self) -> bool:
        return all(torch.equal(weight, self.before[name]) for name, weight in self.model.state_dict().items())


def test_a_sound_step_updates_the_weights():
    training = Training()
    result = training.step()
    assert result.last_row == RowId(0, 6, 1)
    assert (result.cropped_tokens, result.padding_tokens) == (0, 4 * PLAN.micro_batches)
    assert not training.is_untouched()


def test_bad_losses_are_named_with_the_rows_of_their_micro_batches():
    training = Training(bad_losses=(2, 5))
    with pytest.raises(UserError) as caught:
        training.step()
    said = str(caught.value)
    assert "the loss of step 0 is not finite in 2 of 16 micro-batches" in said
    assert "(2: rows 0/0/4 to 0/1/0, 5: rows 0/2/0 to 0/2/1 as epoch/unit position/row)" in said
    assert "\n" not in said
    assert training.is_untouched()


def test_of_a_diverged_model_only_a_few_rows_are_named():
    with pytest.raises(UserError) as caught:
        Training(bad_losses=tuple(range(16))).step()
    assert len(re.findall(r"rows \d", str(caught.value))) == 8
    assert "…" in str(caught.value)


def test_a_gradient_that_is_not_finite_is_found_though_the_loss_is():
    training = Training(bad_gradients=(3,))
    with pytest.raises(UserError, match="step 0 is finite, but its gradient is not on 1 of 1 workers") as caught:
        training.step()
    assert "rows 0/0/0 to 0/6/1 as epoch" in str(caught.value)
    assert training.is_untouched()
