"""Scoring held-out questions with a model that is a plain function."""

import pytest

from jobs.chat_eval import answerer
from nanochat_ray.engine.engine import Engine
from nanochat_ray.tasks.conversations import exchange, exchange_with_tool
from nanochat_ray.tasks.evaluate import JUDGES, accuracies, ask, first_of_each, shown
from nanochat_ray.tasks.mixture import Example
from tests.fakes import ByteTokenizer, ScriptedModel, script

SUM = exchange_with_tool("What is 2 + 3?", "2+3", "5", "The answer is 5.")
DOC = exchange("What does f do?", "Return a list of `x`.")


def reply_of(source, reference, reply):
    example = Example(source, [{"role": "user", "content": "?"}, {"role": "assistant", "content": reference}])
    (answer,) = ask(lambda messages: reply, [example])
    return answer.right


@pytest.mark.parametrize(
    ("source", "reference", "reply", "right"),
    [
        ("documentation", "Return a list of `x`.", "return a list of x", True),
        ("documentation", "Return a list of `x`.", "Return a list of x and y.", False),
        ("arithmetic", SUM[1]["content"], SUM[1]["content"], True),
        ("arithmetic", SUM[1]["content"], "The answer is 5.", False),  # guessed: the calculator was not called
        ("arithmetic", SUM[1]["content"], exchange_with_tool("", "2+4", "6", "The answer is 6.")[1]["content"], False),
        ("counting", SUM[1]["content"], exchange_with_tool("", "1+4", "5", "The answer is 5.")[1]["content"], False),
        ("gsm8k", "so\n#### 1,200", "it is\n#### 1200", True),
        ("gsm8k", "so\n#### 12", "it is 12", False),
        ("mmlu", "B", "B", True),
        ("mmlu", "B", "B.", True),
        ("mmlu", "B", "Bananas", False),
        ("mmlu", "B", "", False),
        ("chats", "anything", "something", None),
    ],
)
def test_each_source_has_its_own_idea_of_right(source, reference, reply, right):
    assert reply_of(source, reference, reply) is right


def test_every_judge_accepts_the_reference_itself_and_refuses_silence():
    references = {"arithmetic": SUM[1]["content"], "counting": SUM[1]["content"], "gsm8k": "#### 4", "mmlu": "C"}
    for source in JUDGES:
        reference = references.get(source, "A")
        assert reply_of(source, reference, reference) is True
        assert reply_of(source, reference, "") is False


def test_accuracies_count_examples_and_tool_calls_per_source():
    examples = [Example("documentation", DOC), Example("arithmetic", SUM), Example("arithmetic", SUM)]
    replies = iter([DOC[1]["content"], SUM[1]["content"], "I do not know."])
    answers = ask(lambda messages: next(replies), examples)
    assert accuracies(answers) == {
        "arithmetic": {"accuracy": 0.5, "examples": 2, "tool_calls": 1},
        "documentation": {"accuracy": 1.0, "examples": 1, "tool_calls": 0},
    }


def test_the_model_sees_everything_before_the_last_reply():
    seen = []
    two_turns = [*exchange("Hi", "Hello"), *DOC]
    ask(lambda messages: seen.append(messages) or "x", [Example("chats", two_turns)])
    assert seen == [two_turns[:3]]


def test_at_most_so_many_of_each_source_in_their_order():
    examples = [Example(name, exchange(f"{name}{i}", "x")) for i in range(5) for name in ("a", "b")]
    assert [e.messages[0]["content"] for e in first_of_each(examples, 2)] == ["a0", "b0", "a1", "b1"]


def test_a_reply_is_shown_with_its_tool_calls():
    assert shown(SUM[1]["content"]) == "[2+3 → 5] The answer is 5."
    assert shown("plain") == "plain"


def test_the_job_asks_the_engine_and_keeps_its_tool_calls():
    model = ScriptedModel({"2 + 3": script("=2+3", "The answer is 5."), "": []})
    engine = Engine(model, ByteTokenizer())
    (answer,) = ask(answerer(engine, max_tokens=64), [Example("arithmetic", SUM)])
    assert answer.right
    assert answer.answer == "[2+3 → 5] The answer is 5."


def test_a_question_that_does_not_fit_the_context_counts_as_wrong():
    engine = Engine(ScriptedModel({}, context=8), ByteTokenizer())
    (answer,) = ask(answerer(engine, max_tokens=64), [Example("arithmetic", SUM)])
    assert answer.right is False
