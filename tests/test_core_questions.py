"""CORE's prompts: what is shown, how it reads, what is scored. Expected texts are written out by hand."""

import random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nanochat_ray.errors import UsageError
from nanochat_ray.eval.core import (
    LANGUAGE_MODELING,
    MULTIPLE_CHOICE,
    ORDER_SEED,
    SCHEMA,
    CoreTask,
    core_questions,
    render,
)
from nanochat_ray.eval.core_bundle import open_bundle
from nanochat_ray.eval.question import EndScore, Question, as_question, common_prefix, common_suffix, judge
from nanochat_ray.eval.reading import readings_of, shared_prefix
from nanochat_ray.storage import Folder
from tests.fakes import ByteTokenizer

TOKENIZER = ByteTokenizer()


def choice_task(count: int = 4, shots: int = 0, delimiter: str = " ") -> CoreTask:
    items = tuple({"query": f"Q{n}?", "choices": [f"yes{n}", f"no{n}"], "gold": n % 2} for n in range(count))
    return CoreTask("choose", MULTIPLE_CHOICE, shots, delimiter, 0.5, items)


def only_question(task: CoreTask, index: int = 0, limit: int | None = None) -> Question:
    return next(core_questions(task, [index], TOKENIZER, limit))


def scored_texts(question: Question) -> list[str]:
    return [TOKENIZER.decode(ids[start:]) for ids, start in zip(question.sequences, question.starts, strict=True)]


def test_a_choice_is_scored_after_what_all_choices_have_in_common():
    task = CoreTask("t", MULTIPLE_CHOICE, 0, " ", 0.25, ({"query": "2+2 is", "choices": ["four", "five"], "gold": 0},))
    question = only_question(task)
    assert render(task, 0) == ["2+2 is four", "2+2 is five"]
    assert [ids[0] for ids in question.sequences] == [TOKENIZER.bos] * 2
    assert scored_texts(question) == ["our", "ive"]  # of bytes, the f is common to both
    assert question.gold == 0


def test_a_schema_is_scored_on_the_ending_under_each_context():
    item = {
        "context_options": ["The cat sat because the cat", "The cat sat because the mat"],
        "continuation": "was tired",
    }
    task = CoreTask("t", SCHEMA, 0, " ", 0.5, ({**item, "gold": 0},))
    assert render(task, 0) == ["The cat sat because the cat was tired", "The cat sat because the mat was tired"]
    assert scored_texts(only_question(task)) == ["at was tired", "at was tired"]


def test_an_ending_is_scored_whole_and_its_context_is_trimmed():
    items = ({"context": "  The sky is \n", "continuation": "blue"},)
    task = CoreTask("t", LANGUAGE_MODELING, 0, " ", 0.0, items)
    assert render(task, 0) == ["The sky is", "The sky is blue"]
    question = only_question(task)
    assert len(question.sequences) == 1
    assert scored_texts(question) == [" blue"]
    assert question.gold is None


def test_shown_examples_are_solved_and_joined_by_blank_lines():
    task = choice_task(3, shots=2, delimiter="\nAnswer: ")
    order = random.Random(1234 + 1).sample([0, 2], 2)
    shown = "".join(f"Q{n}?\nAnswer: {['yes', 'no'][n % 2]}{n}\n\n" for n in order)
    assert render(task, 1) == [f"{shown}Q1?\nAnswer: yes1", f"{shown}Q1?\nAnswer: no1"]

    schema = ({"context_options": ["a b", "a c"], "continuation": "d", "gold": 1},) * 2
    assert render(CoreTask("t", SCHEMA, 1, " ", 0.5, schema), 0)[0] == "a c d\n\na b d"
    endings = ({"context": "one two ", "continuation": "three"}, {"context": "uno dos", "continuation": "tres"})
    assert render(CoreTask("t", LANGUAGE_MODELING, 1, " ", 0.0, endings), 0) == [
        "uno dos tres\n\none two",
        "uno dos tres\n\none two three",
    ]


@given(st.integers(2, 40), st.integers(1, 10), st.data())
def test_a_question_never_shows_itself_and_shows_as_many_others_as_it_should(count, shots, data):
    if count <= shots:
        with pytest.raises(UsageError, match=f"--max-per-task {shots + 1} or more"):
            choice_task(count, shots).shuffled(None)
        return
    task = choice_task(count, shots).shuffled(None)
    index = data.draw(st.integers(0, count - 1))
    *shown, asked = render(task, index)[0].split("\n\n")
    own = task.items[index]["query"]
    assert asked.startswith(own)
    assert len(set(shown)) == shots
    assert not [text for text in shown if text.startswith(own)]


def test_items_are_shuffled_before_any_are_left_out():
    task = choice_task(30)
    order = list(task.items)
    random.Random(ORDER_SEED).shuffle(order)
    assert list(task.shuffled(7).items) == order[:7]
    assert list(task.shuffled(None).items) == order
    assert task.shuffled(7).hash != task.shuffled(8).hash
    assert task.shuffled(7).hash == choice_task(30).shuffled(7).hash


@given(st.lists(st.integers(0, 9), min_size=2, max_size=30), st.integers(0, 40), st.integers(2, 12))
def test_what_is_too_long_keeps_its_end_and_something_to_score(ids, start, limit):
    question = as_question("t", 0, ["x"], [ids], [start], None, limit)
    (kept,), (begin,) = question.sequences, question.starts
    assert list(kept) == ids[-limit:]
    assert 1 <= begin < len(kept)
    if 1 <= start - (len(ids) - len(kept)) < len(kept):
        assert list(kept[begin:]) == ids[start:]


def test_a_choice_that_is_the_beginning_of_another_has_its_last_token_scored():
    task = CoreTask("t", MULTIPLE_CHOICE, 0, " ", 0.5, ({"query": "Is it", "choices": ["a", "ab"], "gold": 1},))
    assert scored_texts(only_question(task)) == ["a", "b"]


def test_prompt_hashes_tell_questions_apart_and_not_tokenizers():
    first, second = only_question(choice_task(), 0), only_question(choice_task(), 1)
    assert first.prompt_hash != second.prompt_hash
    assert first.prompt_hash == only_question(choice_task(), 0, limit=4).prompt_hash


def test_the_likeliest_choice_by_mean_loss_is_the_answer_whatever_the_lengths():
    question = Question("t", 3, ((1, 2, 3), (1, 4, 5, 6)), (1, 1), 1, "hash")
    ends = [EndScore(np.float32([1.0, 1.0]), np.zeros(2)), EndScore(np.float32([0.9, 0.9, 0.9]), np.zeros(3))]
    verdict = judge(question, ends, str)
    assert (verdict.prediction, verdict.correct) == ("1", True)
    assert verdict.scores == pytest.approx((1.0, 0.9))


def test_an_ending_is_right_when_every_token_is_the_likeliest():
    question = Question("t", 0, ((1, 2, 3),), (1,), None, "hash")
    right = judge(question, [EndScore(np.float32([9, 9]), np.array([2, 3]))], str)
    wrong = judge(question, [EndScore(np.float32([0, 0]), np.array([2, 4]))], str)
    assert (right.correct, wrong.correct) == (True, False)
    assert wrong.prediction == "[2, 4]"


sequences = st.lists(st.lists(st.integers(0, 2), min_size=2, max_size=12), min_size=1, max_size=4)


@given(sequences)
def test_common_ends_are_what_all_sequences_begin_and_end_with(found):
    length = common_prefix(found)
    assert len({tuple(ids[:length]) for ids in found}) == 1
    assert length == min(map(len, found)) or len({ids[length] for ids in found}) > 1
    assert common_suffix(found) == common_prefix([ids[::-1] for ids in found])


@given(sequences, st.data())
def test_readings_cover_every_scored_token_once_and_share_only_what_is_common(found, data):
    starts = [data.draw(st.integers(1, len(ids) - 1)) for ids in found]
    question = Question("t", 0, tuple(map(tuple, found)), tuple(starts), 0, "hash")
    readings = readings_of(question)
    assert sorted(member for reading in readings for member in reading.members) == list(range(len(found)))
    assert len({(reading.ids, reading.first) for reading in readings}) == len(readings)
    for reading in readings:
        for member in reading.members:
            assert tuple(found[member][:-1]) == reading.ids
            assert reading.first == starts[member] - 1
    shared = shared_prefix(readings)
    assert len({reading.ids[:shared] for reading in readings}) == 1
    assert all(shared <= reading.first for reading in readings) or len(readings) == 1


def test_letters_are_read_once_for_all_choices():
    items = ({"query": "Pick", "choices": ["A", "B", "C", "D"], "gold": 2},)
    readings = readings_of(only_question(CoreTask("t", MULTIPLE_CHOICE, 0, " ", 0.25, items)))
    assert [(reading.members, reading.rows) for reading in readings] == [((0, 1, 2, 3), 1)]


@pytest.mark.slow
def test_all_tasks_of_the_real_bundle_can_be_asked(shared_data):
    bundle = open_bundle(Folder.at(shared_data / "eval_bundle"))
    tasks = bundle.asked(12)
    assert len(tasks) == 22
    for task in tasks:
        for question in core_questions(task, range(2), TOKENIZER, 2048):
            assert all(
                1 <= start < len(ids) <= 2048 for ids, start in zip(question.sequences, question.starts, strict=True)
            )
            assert question.gold is None or question.gold < len(question.sequences)
    assert bundle.references["GPT-2 1.5B"]["mean"] == pytest.approx(0.256525)
