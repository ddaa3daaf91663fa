"""Does the finetuned model answer held-out questions rightly? Scored per source; the model is a callable.

Each source has its own idea of right: the documentation's words, the calculator's result, the letter of a choice.
Sources without one (free chats) give samples only.
"""

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, TypeVar

from nanochat_ray.tasks.conversations import Conversation, parts_of, spoken_text
from nanochat_ray.tasks.gsm8k import final_number
from nanochat_ray.tasks.mixture import Example

Content = str | list[dict[str, str]]
Generate = Callable[[Conversation], Content]  # the conversation so far → the reply, tool calls as parts
Judge = Callable[[Content, Content], bool]  # (reply, reference) → right or not


@dataclass(frozen=True)
class Answer:
    """One scored question; `right` is None where the source has no judge."""

    source: str
    question: str
    answer: str  # tool calls shown as [expression → output]
    right: bool | None
    tool_calls: int


FromSource = TypeVar("FromSource", Example, Answer)


def same_words(reply: Content, reference: Content) -> bool:
    """The reply says the reference's words and nothing else; case, spacing and punctuation do not count."""
    return _words(spoken_text(reply)) == _words(spoken_text(reference))


def same_calculation(reply: Content, reference: Content) -> bool:
    """The calculator was called as in the reference, and the last number said is the reference's last number."""
    same_calls = _calls(reply) == _calls(reference)
    return same_calls and _last_number(spoken_text(reply)) == _last_number(spoken_text(reference))


def same_letter(reply: Content, reference: Content) -> bool:
    """The reply begins with the letter of the right choice."""
    return re.match(r"\W*([A-Z])\b", spoken_text(reply) + " ", re.ASCII) is not None and (
        _words(spoken_text(reply))[:1] == _words(spoken_text(reference))[:1]
    )


def same_final_number(reply: Content, reference: Content) -> bool:
    """GSM8K: the numbers after `####` are equal."""
    said, expected = final_number(spoken_text(reply)), final_number(spoken_text(reference))
    return said is not None and expected is not None and float(said) == float(expected)


JUDGES: dict[str, Judge] = {
    "documentation": same_words,
    "identity": same_words,
    "small talk": same_words,
    "spelling": same_words,
    "arithmetic": same_calculation,
    "counting": same_calculation,
    "gsm8k": same_final_number,
    "mmlu": same_letter,
    "arc-easy": same_letter,
    "arc-challenge": same_letter,
}


def ask(generate: Generate, examples: Iterable[Example]) -> list[Answer]:
    """Put each example's messages up to its last reply to the model, and judge what comes back against that reply."""
    answers = []
    for example in examples:
        prompt, reference = example.messages[:-1], example.messages[-1]["content"]
        reply = generate(prompt)
        judge = JUDGES.get(example.source)
        answers.append(
            Answer(
                source=example.source,
                question=spoken_text(prompt[-1]["content"]),
                answer=shown(reply),
                right=judge(reply, reference) if judge else None,
                tool_calls=len(_calls(reply)),
            )
        )
    return answers


def first_of_each(items: Iterable[FromSource], per_source: int) -> list[FromSource]:
    """At most `per_source` examples or answers of each source, in the order in which they come."""
    taken: dict[str, int] = {}
    chosen = []
    for item in items:
        taken[item.source] = taken.get(item.source, 0) + 1
        if taken[item.source] <= per_source:
            chosen.append(item)
    return chosen


def accuracies(answers: Iterable[Answer]) -> dict[str, dict[str, Any]]:
    """Per judged source: the fraction that is right, how many were asked, and how many replies called the tool."""
    judged: dict[str, list[Answer]] = {}
    for answer in answers:
        if answer.right is not None:
            judged.setdefault(answer.source, []).append(answer)
    return {
        source: {
            "accuracy": sum(bool(answer.right) for answer in given) / len(given),
            "examples": len(given),
            "tool_calls": sum(answer.tool_calls > 0 for answer in given),
        }
        for source, given in sorted(judged.items())
    }


def shown(content: Content) -> str:
    """A reply for people to read: `[12+34 → 46] The answer is 46.`"""
    pieces = []
    for part in parts_of(content):
        if part["type"] == "python":
            pieces.append(f"[{part['text']}]")
        elif part["type"] == "python_output" and pieces and pieces[-1].endswith("]"):
            pieces[-1] = f"{pieces[-1][:-1]} → {part['text']}] "
        else:
            pieces.append(part["text"])
    return "".join(pieces).strip()


def _calls(content: Content) -> list[str]:
    return [part["text"].replace(" ", "") for part in parts_of(content) if part["type"] == "python"]


def _words(text: str) -> list[str]:
    return re.findall(r"\w+", text.casefold())


def _last_number(text: str) -> str | None:
    found = re.findall(r"-?\d+(?:\.\d+)?", text.replace(",", ""))
    return found[-1] if found else None
