"""ChatCORE: letters by their logits, replies by their judges, in one model's hands."""

import numpy as np
import pytest
import torch

from nanochat_ray.chat import render_prompt
from nanochat_ray.engine.engine import Engine
from nanochat_ray.eval.chat_core import (
    HELD_OUT,
    LETTERS,
    NUMBER,
    PROGRAM,
    ChatTask,
    chat_core_of,
    chat_core_tasks,
    held_out_tasks,
    letter_question,
)
from nanochat_ray.eval.chat_exam import chat_grader, write_replies
from nanochat_ray.eval.exam import Piece
from nanochat_ray.model.torch_step import TorchStep
from nanochat_ray.storage import Folder
from nanochat_ray.tasks.conversations import exchange, exchange_with_tool
from nanochat_ray.tasks.gsm8k import problem
from nanochat_ray.tasks.humaneval import Problem
from nanochat_ray.tasks.mixture import Example
from nanochat_ray.tasks.multiple_choice import MultipleChoice
from tests.fakes import ByteTokenizer, ScriptedModel, script, tiny_model

TOKENIZER = ByteTokenizer()
BATCH = 300  # tokens
SUM = exchange_with_tool("What is 2 + 3?", "2+3", "5", "The answer is 5.")
DOUBLE = Problem(
    task_id="x/0",
    prompt='def double(x):\n    """Twice x."""\n',
    test="def check(candidate):\n    assert candidate(4) == 8\n",
    entry_point="double",
    canonical_solution="    return 2 * x\n",
)


def graded(model: ScriptedModel, task: ChatTask, max_tokens: int = 64):
    grade = chat_grader([task], Engine(model, TOKENIZER), max_tokens, BATCH)
    return grade(Piece(task.name, tuple(range(len(task.items)))))


def test_a_lettered_question_reads_as_the_public_one():
    question = MultipleChoice("2+2?", ("three", "four"), 1)
    assert question.render() == (
        "Multiple Choice question: 2+2?\n- three=A\n- four=B\n\nRespond only with the letter of the correct answer."
    )
    assert question.conversation() == exchange(question.render(), "B")


def test_only_the_letter_is_scored_right_where_the_reply_begins():
    task = ChatTask("t", LETTERS, 0.25, (MultipleChoice("2+2?", ("three", "four", "five"), 1),))
    question = letter_question(task, 0, TOKENIZER, None)
    prompt = render_prompt(TOKENIZER, [{"role": "user", "content": task.items[0].render()}])
    assert [list(ids) for ids in question.sequences] == [[*prompt, ord(letter)] for letter in "ABC"]
    assert question.starts == (len(prompt),) * 3
    assert question.gold == 1


def test_the_likeliest_letter_is_the_answer_even_where_another_token_is_likelier():
    model = tiny_model(context=512)
    items = tuple(MultipleChoice(f"Number {n}?", ("a", "b", "c", "d"), 2) for n in range(6))
    task = ChatTask("t", LETTERS, 0.25, items)
    engine = Engine(TorchStep(model), TOKENIZER)
    verdicts = chat_grader([task], engine, 8, BATCH)(Piece("t", tuple(range(6))))
    for verdict, item in zip(verdicts, items, strict=True):
        prompt = render_prompt(TOKENIZER, [{"role": "user", "content": item.render()}])
        logits = model(torch.tensor([prompt]))[0, -1].detach().numpy()
        assert verdict.prediction == str(int(np.argmax([logits[ord(letter)] for letter in "ABCD"])))


def test_replies_are_right_after_letters_were_scored_with_the_same_model():
    engine = Engine(TorchStep(tiny_model(context=512)), TOKENIZER)
    prompts = [[{"role": "user", "content": f"Tell me about {n} things"}] for n in range(3)]
    before = write_replies(engine, prompts, 12)
    task = ChatTask("t", LETTERS, 0.25, (MultipleChoice("Which?", ("a", "b"), 0),) * 40)
    chat_grader([task], engine, 8, BATCH)(Piece("t", tuple(range(40))))
    assert write_replies(engine, prompts, 12) == before


def test_word_problems_are_solved_with_the_calculator():
    items = (problem("Ann has 2 and gets 3.", "She has <<2+3=5>>5.\n#### 5"), problem("Bob has 9.", "#### 9"))
    model = ScriptedModel({"Ann": script("So ", "=2+3", "\n#### 5"), "": script("#### 8")})
    right, wrong = graded(model, ChatTask("GSM8K", NUMBER, 0.0, items))
    assert (right.correct, right.prediction, right.tool_calls) == (True, "5", 1)
    assert right.text == "So [2+3 → 5] \n#### 5"
    assert (wrong.correct, wrong.prediction) == (False, "8")


@pytest.mark.slow
def test_programs_are_right_when_they_pass_their_tests():
    task = ChatTask("HumanEval", PROGRAM, 0.0, (DOUBLE,))
    good = graded(ScriptedModel({"": script("```python\ndef double(x):\n    return x + x\n```")}), task, 200)[0]
    bad = graded(ScriptedModel({"": script("```python\nimport sys\nsys.exit(0)\n```")}), task, 200)[0]
    assert (good.correct, bad.correct) == (True, False)
    assert good.prediction == "def double(x):\n    return x + x"


def test_held_out_questions_are_grouped_by_source_and_judged_by_it():
    examples = [Example("arithmetic", SUM), Example("chats", exchange("Hi", "Hello")), Example("arithmetic", SUM)]
    (task,) = held_out_tasks(examples, None)
    assert (task.name, task.kind, len(task.items)) == ("arithmetic", HELD_OUT, 2)
    assert len(held_out_tasks(examples, 1)[0].items) == 1
    verdicts = graded(ScriptedModel({"": script("=2+3", "The answer is 5.")}), task)
    assert [verdict.correct for verdict in verdicts] == [True, True]


def test_a_question_that_does_not_fit_the_context_counts_as_wrong():
    verdicts = graded(ScriptedModel({}, context=8), ChatTask("arithmetic", HELD_OUT, 0.0, (SUM,)))
    assert [(verdict.correct, verdict.text) for verdict in verdicts] == [(False, "")]


def test_a_task_is_another_when_its_questions_or_answers_are():
    one = ChatTask("t", LETTERS, 0.25, (MultipleChoice("2+2?", ("three", "four"), 1),))
    other = ChatTask("t", LETTERS, 0.25, (MultipleChoice("2+2?", ("three", "four"), 0),))
    assert one.hash != other.hash
    assert one.hash == ChatTask("t", LETTERS, 0.25, one.items).hash


def test_the_real_sets_make_the_five_tasks(shared_data):
    tasks = chat_core_tasks(Folder.at(shared_data / "tasks"), 20)
    assert {task.name: task.kind for task in tasks} == {
        "ARC-Easy": LETTERS, "ARC-Challenge": LETTERS, "MMLU": LETTERS, "GSM8K": NUMBER, "HumanEval": PROGRAM,
    }  # fmt: skip
    assert [len(task.items) for task in tasks] == [20] * 5
    again = chat_core_tasks(Folder.at(shared_data / "tasks"), 20)
    assert [task.hash for task in again] == [task.hash for task in tasks]


@pytest.mark.slow
def test_where_the_questions_are_follows_the_finetuning_mixture(shared_data):
    assert chat_core_of(None, "demo", 5) == []
    assert chat_core_of("none", str(shared_data / "sft"), 5) == []
    assert len(chat_core_of(None, str(shared_data / "sft"), 5)) == 5
    assert len(chat_core_of(str(shared_data / "tasks"), "demo", 5)) == 5
