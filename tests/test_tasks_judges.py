"""Which replies to held-out questions are right."""

import pytest

from nanochat_ray.tasks.conversations import exchange_with_tool
from nanochat_ray.tasks.judges import JUDGES, calls, shown

SUM = exchange_with_tool("What is 2 + 3?", "2+3", "5", "The answer is 5.")[1]["content"]


@pytest.mark.parametrize(
    ("source", "reference", "reply", "right"),
    [
        ("documentation", "Return a list of `x`.", "return a list of x", True),
        ("documentation", "Return a list of `x`.", "Return a list of x and y.", False),
        ("arithmetic", SUM, SUM, True),
        ("arithmetic", SUM, "The answer is 5.", False),  # guessed: the calculator was not called
        ("arithmetic", SUM, exchange_with_tool("", "2+4", "6", "The answer is 6.")[1]["content"], False),
        ("counting", SUM, exchange_with_tool("", "1+4", "5", "The answer is 5.")[1]["content"], False),
        ("gsm8k", "so\n#### 1,200", "it is\n#### 1200", True),
        ("gsm8k", "so\n#### 12", "#### 12.00", True),
        ("gsm8k", "so\n#### 12", "#### $12", True),
        ("gsm8k", "so\n#### 12", "it is 12", False),
        ("gsm8k", "so\n#### 12", "#### 1.2.3", False),
        ("gsm8k", "so\n#### 12", "#### ..,", False),
        ("mmlu", "B", "B", True),
        ("mmlu", "B", "B.", True),
        ("mmlu", "B", "Bananas", False),
        ("mmlu", "B", "", False),
    ],
)
def test_each_source_has_its_own_idea_of_right(source, reference, reply, right):
    assert JUDGES[source](reply, reference) is right


def test_every_judge_accepts_the_reference_itself_and_refuses_silence():
    references = {"arithmetic": SUM, "counting": SUM, "gsm8k": "#### 4", "mmlu": "C"}
    for source, judge in JUDGES.items():
        reference = references.get(source, "A")
        assert judge(reference, reference) is True
        assert judge("", reference) is False


def test_a_reply_is_shown_with_its_tool_calls():
    assert shown(SUM) == "[2+3 → 5] The answer is 5."
    assert shown("plain") == "plain"
    assert calls(SUM) == ["2+3"]
