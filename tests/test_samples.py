"""Samples during training: greedy continuations of fixed prompts, which change nothing."""

import copy

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nanochat_ray.model.optim import build_optimizer
from nanochat_ray.plan import make_plan
from nanochat_ray.plan.record import PRETRAIN, SFT
from nanochat_ray.report.document import Table
from nanochat_ray.report.samples import samples_section
from nanochat_ray.report.training import read_training
from nanochat_ray.storage import Folder
from nanochat_ray.stream.cursor import Cursor, RowId, StreamIdentity
from nanochat_ray.stream.rows import micro_batches
from nanochat_ray.train.checkpoint import build_model
from nanochat_ray.train.events import EventLog
from nanochat_ray.train.samples import OPENINGS, QUESTIONS, continue_greedily, write_samples
from nanochat_ray.train.step import World, run_step
from tests.fakes import ByteTokenizer, tiny_model
from tests.stream_fakes import NumberedRows
from tests.test_rows import as_units

TOKENIZER = ByteTokenizer()


@pytest.fixture(scope="module")
def model():
    return tiny_model(seed=3)


ids = st.integers(0, 319)


@settings(max_examples=10)
@given(prompts=st.lists(st.lists(ids, min_size=1, max_size=9), min_size=1, max_size=4), tokens=st.integers(1, 6))
def test_each_prompt_goes_on_as_if_it_were_alone(model, prompts, tokens):
    alone = [list(model.generate(prompt, tokens, temperature=0)) for prompt in prompts]
    assert continue_greedily(model, prompts, tokens) == alone


def test_a_continuation_ends_before_the_first_stop(model):
    prompt = [72, 101, 108, 108, 111]
    whole = continue_greedily(model, [prompt], 12)[0]
    stop = whole[4]
    assert continue_greedily(model, [prompt], 12, {stop}) == [whole[: whole.index(stop)]]


def test_nothing_is_written_beyond_the_context():
    model = tiny_model(context=16)
    assert [len(said) for said in continue_greedily(model, [[1] * 12, [2] * 15, [3]], 9)] == [4, 1, 9]
    assert continue_greedily(model, [], 9) == []


def test_pretraining_goes_on_with_openings_and_finetuning_answers_questions(model):
    openings, answers = write_samples(model, TOKENIZER, PRETRAIN, 5), write_samples(model, TOKENIZER, SFT, 5)
    assert [sample.prompt for sample in openings] == list(OPENINGS)
    assert [sample.prompt for sample in answers] == list(QUESTIONS)
    prompt = [TOKENIZER.bos, *TOKENIZER.encode(OPENINGS[2])]
    assert openings[2].text == TOKENIZER.decode(continue_greedily(model, [prompt], 5, {TOKENIZER.bos})[0])
    user, end, begin = map(TOKENIZER.special, ("user_start", "user_end", "assistant_start"))
    chat = [TOKENIZER.bos, user, *TOKENIZER.encode(QUESTIONS[1]), end, begin]
    stops = {TOKENIZER.bos, TOKENIZER.special("assistant_end"), TOKENIZER.special("python_end")}
    assert answers[1].text == TOKENIZER.decode(continue_greedily(model, [chat], 5, stops)[0])


def test_prompts_that_a_short_context_cannot_hold_are_left_out():
    short = write_samples(tiny_model(context=24), TOKENIZER, PRETRAIN, 5)
    assert [sample.prompt for sample in short] == [text for text in OPENINGS if len(text) + 1 < 24]


@pytest.mark.slow
def test_training_is_the_same_to_the_last_bit_with_samples_and_without():
    plan = make_plan(
        depth=2, vocab_size=320, head_size=64, sequence_len=64, batch_tokens=512, micro_batch_rows=4, steps=4
    )
    seen = []
    for sampling in (False, True):
        torch.manual_seed(0)
        model = build_model(plan)
        optimizer = build_optimizer(model, plan.rates)
        cursor = Cursor(StreamIdentity("c", "t", 64, 4, plan.micro_batches, 42))
        rows = micro_batches(NumberedRows(64), as_units([9, 30]), 4, RowId(0, 0, 0), 42)
        history = []
        for _ in range(plan.steps):
            if sampling:
                before = copy.deepcopy(model.state_dict())
                assert write_samples(model, TOKENIZER, PRETRAIN, 4)
                assert all(torch.equal(weight, before[name]) for name, weight in model.state_dict().items())
            result = run_step(
                plan,
                lambda inputs_BT, targets_BT, model=model: model(inputs_BT, targets_BT, reduction="sum"),
                optimizer,
                cursor,
                0,
                rows,
                World(0, 1, torch.device("cpu")),
            )
            cursor = cursor.advanced(result.last_row, plan.batch_tokens)
            history.append((result.loss, result.stream_hash))
        seen.append((history, torch.rand(1).item(), {k: v.numpy().copy() for k, v in model.state_dict().items()}))
    (plain, plain_random, plain_weights), (sampled, sampled_random, sampled_weights) = seen
    assert plain == sampled
    assert plain_random == sampled_random
    assert all(np.array_equal(weight, sampled_weights[name]) for name, weight in plain_weights.items())


def test_the_report_shows_the_first_a_middle_and_the_last_set_folded(tmp_path):
    stage = Folder.at(tmp_path)
    log = EventLog(stage, 0)
    log.append("start", step=0, workers=1)
    log.append("step", step=0, loss=1.0, tokens=1, workers=1, tok_per_s=1.0)
    for step in (0, 10, 20, 30, 40):
        log.append("samples", step=step, samples=[{"prompt": "Once", "text": f"| said at {step}\x1b[31m"}], seconds=0.1)
    log.close()
    section = samples_section("Samples", read_training(stage))
    assert section.folded
    (table,) = [block for block in section.blocks if isinstance(block, Table)]
    assert table.columns == ("prompt", "after 0 steps", "after 20 steps", "after 40 steps")
    assert table.rows == (("Once", "| said at 0�[31m", "| said at 20�[31m", "| said at 40�[31m"),)


def test_a_run_without_samples_has_no_such_section(tmp_path):
    log = EventLog(Folder.at(tmp_path), 0)
    log.append("step", step=0, loss=1.0, tokens=1, workers=1, tok_per_s=1.0)
    log.append("samples", step=0, samples=[], seconds=0.0)
    log.close()
    assert samples_section("Samples", read_training(Folder.at(tmp_path))) is None
