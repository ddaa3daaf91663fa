"""Is a reply to a held-out question right?

Each source has its own idea of that: the documentation's words, the calculator's result, the letter of a choice.
Sources without one (free chats) give samples only.
"""

import re
from collections.abc import Callable

from nanochat_ray.tasks.conversations import parts_of, spoken_text
from nanochat_ray.tasks.gsm8k import final_number

Content = str | list[dict[str, str]]
Judge = Callable[[Content, Content], bool]  # (reply, reference) → right or not


def same_words(reply: Content, reference: Content) -> bool:
    """The reply says the reference's words and nothing else; case, spacing and punctuation do not count."""
    return _words(spoken_text(reply)) == _words(spoken_text(reference))


def same_calculation(reply: Content, reference: Content) -> bool:
    """The calculator was called as in the reference, and the last number said is the reference's last number."""
    same_calls = calls(reply) == calls(reference)
    return same_calls and _last_number(spoken_text(reply)) == _last_number(spoken_text(reference))


def same_letter(reply: Content, reference: Content) -> bool:
    """The reply begins with the letter of the right choice."""
    return re.match(r"\W*([A-Z])\b", spoken_text(reply) + " ", re.ASCII) is not None and (
        _words(spoken_text(reply))[:1] == _words(spoken_text(reference))[:1]
    )


def same_final_number(reply: Content, reference: Content) -> bool:
    """GSM8K: the numbers after `####` are equal."""
    said, expected = final_number(spoken_text(reply)), final_number(spoken_text(reference))
    return said is not None and said == expected


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


def calls(content: Content) -> list[str]:
    """The expressions that the calculator was given, without spaces."""
    return [part["text"].replace(" ", "") for part in parts_of(content) if part["type"] == "python"]


def _words(text: str) -> list[str]:
    return re.findall(r"\w+", text.casefold())


def _last_number(text: str) -> str | None:
    found = re.findall(r"-?\d+(?:\.\d+)?", text.replace(",", ""))
    return found[-1] if found else None
