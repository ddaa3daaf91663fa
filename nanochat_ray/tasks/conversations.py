"""What a conversation is, and the three shapes of it that the question sets are built from.

A conversation is a list of messages {"role", "content"}; content is a string, or a list of parts {"type", "text"} of
type text, python (a tool call) or python_output. `nanochat_ray.chat.check_conversation` is the judge of its form.
"""

import random
from collections.abc import Iterable
from typing import Any

Message = dict[str, Any]
Conversation = list[Message]


def exchange(question: str, answer: str) -> Conversation:
    """One question and its plain answer."""
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def exchange_with_tool(question: str, expression: str, output: str, answer: str) -> Conversation:
    """A question that is answered by calling the calculator first and then saying what it returned."""
    parts = [
        {"type": "python", "text": expression},
        {"type": "python_output", "text": output},
        {"type": "text", "text": answer},
    ]
    return [{"role": "user", "content": question}, {"role": "assistant", "content": parts}]


def parts_of(content: str | list[dict[str, str]]) -> list[dict[str, str]]:
    """A message's content as parts, whichever of its two forms it has."""
    return [{"type": "text", "text": content}] if isinstance(content, str) else content


def spoken_text(content: str | list[dict[str, str]]) -> str:
    """What a reader is told: the text parts, without tool calls and their outputs."""
    return "".join(part["text"] for part in parts_of(content) if part["type"] == "text")


def generator(seed: int, *key: object) -> random.Random:
    """The random numbers of one generated item: a function of (seed, key) alone, equal on every machine."""
    return random.Random(":".join(str(item) for item in (seed, *key)))


def held_out(key: Iterable[object], every: int) -> bool:
    """Whether an item belongs to the test split: about one in `every`, by the item's own content.

    Independent of seed, sizes and order, so that a question never trains in one run and tests in another.
    """
    return random.Random("held out:" + ":".join(str(item) for item in key)).randrange(every) == 0
