"""Scores of many questions at once are those of one question at a time by the whole network."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels import cpu_step
from nanochat_ray.bench.eval_bench import one_at_a_time
from nanochat_ray.eval.core import core_questions
from nanochat_ray.eval.core_bundle import open_bundle
from nanochat_ray.eval.question import Question, judge
from nanochat_ray.eval.scorer import StepScorer
from nanochat_ray.model.gpt import GPT, GPTConfig
from nanochat_ray.model.ragged import RaggedBatch
from nanochat_ray.model.torch_step import TorchStep
from nanochat_ray.storage import Folder
from tests.fakes import ByteTokenizer, tiny_model

CONTEXT = 256
CLOSE_NATS = 1e-4


@pytest.fixture(scope="module")
def model() -> GPT:
    return tiny_model(context=CONTEXT)


@pytest.fixture(scope="module", params=["torch", "fused"])
def scorer(request, model) -> StepScorer:
    if request.param == "torch":
        return StepScorer(TorchStep(model), batch_tokens=300)
    return StepScorer(cpu_step.CpuStep(model, torch.float32, threads=1), batch_tokens=300)


def assert_same_scores(scorer: StepScorer, model: GPT, questions: list[Question]) -> None:
    scored = list(scorer.score(questions))
    assert [question for question, _ in scored] == questions
    for question, ends in scored:
        expected = one_at_a_time(model, question)
        for end, other, ids, start in zip(ends, expected, question.sequences, question.starts, strict=True):
            assert len(end.nats) == len(ids) - start
            np.testing.assert_allclose(end.nats, other.nats, atol=CLOSE_NATS)
            if question.gold is None:
                np.testing.assert_array_equal(end.likeliest, other.likeliest)


@st.composite
def random_questions(draw) -> Question:
    """Sequences that begin alike, of any lengths, with any scored ends; one of them, or several."""
    ids = st.integers(0, 319)
    common = draw(st.lists(ids, min_size=1, max_size=60))
    tails = draw(st.lists(st.lists(ids, min_size=1, max_size=20), min_size=1, max_size=4))
    sequences = tuple((*common, *tail) for tail in tails)
    starts = tuple(draw(st.integers(1, len(sequence) - 1)) for sequence in sequences)
    return Question("t", 0, sequences, starts, None if len(tails) == 1 else 0, "hash")


@settings(max_examples=15)
@given(st.lists(random_questions(), min_size=1, max_size=6))
def test_any_questions_are_scored_as_each_sequence_by_itself(scorer, model, questions):
    assert_same_scores(scorer, model, questions)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["multiple_choice", "schema", "language_modeling"])
def test_real_questions_of_each_type_get_the_answers_of_the_reference(scorer, model, shared_data, kind):
    tasks = [task for task in open_bundle(Folder.at(shared_data / "eval_bundle")).asked(12) if task.kind == kind]
    tokenizer = ByteTokenizer()
    for task in tasks:
        questions = list(core_questions(task, range(3), tokenizer, scorer.limit))
        assert_same_scores(scorer, model, questions)
        ours = [judge(question, ends, tokenizer.decode) for question, ends in scorer.score(questions)]
        theirs = [judge(question, one_at_a_time(model, question), tokenizer.decode) for question in questions]
        assert [verdict.prediction for verdict in ours] == [verdict.prediction for verdict in theirs]


def test_the_fused_step_gives_every_bit_whatever_else_is_in_the_batch(model):
    step = cpu_step.CpuStep(model, torch.float32, threads=1)
    questions = [
        Question("t", n, tuple((7, *range(n, n + 40), choice) for choice in (1, 2, 3)), (41,) * 3, 0, "")
        for n in range(9)
    ]
    together = [ends for _, ends in StepScorer(step).score(questions)]
    alone = [ends for question in questions for _, ends in StepScorer(step).score([question])]
    for ours, other in zip(together, alone, strict=True):
        assert [end.nats.tobytes() for end in ours] == [end.nats.tobytes() for end in other]


class Counting:
    """A step model that counts what it is asked."""

    def __init__(self, model: GPT):
        self._step = TorchStep(model)
        self.vocab_size, self.context, self.groups = self._step.vocab_size, self._step.context, self._step.groups
        self.tokens, self.rows, self.calls = 0, 0, 0

    def block_bytes(self, group: int) -> int:
        return self._step.block_bytes(group)

    def allocate(self, blocks) -> None:
        self._step.allocate(blocks)

    def forward(self, batch: RaggedBatch) -> np.ndarray:
        self.tokens += len(batch.ids)
        self.rows += len(batch.wanted)
        self.calls += 1
        return self._step.forward(batch)


def test_what_choices_share_is_read_once_and_only_needed_logits_are_computed(model):
    counting = Counting(model)
    common = tuple(range(1, 161))
    choices = tuple((*common, 200 + n, 210 + n, 220 + n) for n in range(4))
    list(StepScorer(counting).score([Question("t", 0, choices, (160,) * 4, 0, "")]))
    # 159 of the common tokens may be shared, in whole blocks of 16; the rest and two of three choice tokens are not.
    assert counting.tokens == 144 + 4 * (16 + 2)
    assert counting.rows == 4 * 3
    letters = tuple((*common, letter) for letter in (65, 66, 67, 68))
    counting.tokens = counting.rows = 0
    list(StepScorer(counting).score([Question("t", 0, letters, (160,) * 4, 0, "")]))
    assert (counting.tokens, counting.rows) == (160, 1)


def test_a_question_longer_than_a_batch_is_a_batch_of_its_own(model):
    counting = Counting(model)
    long = Question("t", 0, (tuple(range(1, 251)),), (200,), None, "")
    short = Question("t", 1, ((1, 2, 3),), (1,), None, "")
    scored = list(StepScorer(counting, batch_tokens=8).score([short, long, short]))
    assert [question for question, _ in scored] == [short, long, short]
    assert counting.calls == 3


def test_grouped_heads_windows_and_a_padded_vocabulary_are_scored_too():
    config = GPTConfig(
        sequence_len=1024, vocab_size=300, n_layer=3, n_head=4, n_kv_head=2, n_embd=128, window_pattern="SSL"
    )
    model = GPT(config)
    model.init_weights(3)
    with torch.no_grad():
        for block in model.blocks:
            block.attn.c_proj.weight.normal_(0, 0.1, generator=torch.Generator().manual_seed(4))
    ids = np.random.default_rng(0).integers(0, 300, 700).tolist()
    question = Question("t", 0, tuple((*ids, a, b) for a, b in ((1, 2), (3, 4))), (700, 700), 0, "")
    assert_same_scores(StepScorer(TorchStep(model.eval())), model, [question])


@pytest.mark.parametrize("fused", [False, True])
def test_questions_may_be_longer_than_the_context_of_training(model, fused):
    longer = 3 * CONTEXT
    step = cpu_step.CpuStep(model, torch.float32, 1, context=longer) if fused else TorchStep(model, longer)
    ids = np.random.default_rng(1).integers(0, 320, longer - 4).tolist()
    question = Question("t", 0, tuple((*ids, a, b) for a, b in ((1, 2), (3, 4))), (longer - 4,) * 2, 0, "")
    assert_same_scores(StepScorer(step), model, [question])
