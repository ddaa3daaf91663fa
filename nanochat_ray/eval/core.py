"""CORE's prompts: which examples are shown before a question, how it all reads, and which tokens are scored.

    core_questions(task, indices, tokenizer, limit) → Question, …

Follows the public evaluator to the letter, so that figures compare: a task's items are shuffled by Random(1337) before
any are left out; the examples shown to item i are drawn by Random(1234 + i) from the others; examples are joined by a
blank line, each `query + delimiter + answer`; BOS stands in front; what does not fit the model keeps its end.
"""

import hashlib
import json
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Protocol

from nanochat_ray.errors import UsageError, UserError
from nanochat_ray.eval.question import Question, as_question, common_prefix, common_suffix

ORDER_SEED, SHOTS_SEED = 1337, 1234
MULTIPLE_CHOICE, SCHEMA, LANGUAGE_MODELING = "multiple_choice", "schema", "language_modeling"
_FIELDS: dict[str, dict[str, type]] = {
    MULTIPLE_CHOICE: {"query": str, "choices": list, "gold": int},
    SCHEMA: {"context_options": list, "continuation": str, "gold": int},
    LANGUAGE_MODELING: {"context": str, "continuation": str},
}
_OPTIONS = {MULTIPLE_CHOICE: "choices", SCHEMA: "context_options"}

Item = Mapping[str, Any]


class TextTokenizer(Protocol):
    """What rendering asks of a tokenizer, ours or another's."""

    @property
    def bos(self) -> int: ...

    def encode(self, text: str) -> list[int]: ...


@dataclass(frozen=True)
class CoreTask:
    """One task.

    kind        MULTIPLE_CHOICE: the likeliest of several answers; SCHEMA: the context under which one ending is
                likeliest; LANGUAGE_MODELING: the ending is what the model would have written
    shots       solved examples before each question
    delimiter   between a query and its answer
    baseline    accuracy of guessing, 0 … 1
    """

    name: str
    kind: str
    shots: int
    delimiter: str
    baseline: float
    items: tuple[Item, ...]

    def shuffled(self, most: int | None) -> "CoreTask":
        """The task as it is asked: its items in their fixed random order, at most `most` of them.

        Raises:
            UsageError: too few items are left to show `shots` others.
        """
        items = list(self.items)
        random.Random(ORDER_SEED).shuffle(items)
        items = items[:most]
        if len(items) <= self.shots:
            raise UsageError(
                f"{len(items)} examples of {self.name} are too few: each question shows {self.shots} others; "
                f"give --max-per-task {self.shots + 1} or more"
            )
        return replace(self, items=tuple(items))

    @property
    def cost(self) -> float:
        """Characters that a model reads for the first question, with all its choices."""
        return float(sum(map(len, render(self, 0))))

    @cached_property
    def hash(self) -> str:
        """64 hex digits: equal when the same questions are asked in the same way."""
        facts = [self.kind, self.shots, self.delimiter, self.items]
        return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def check_items(items: Sequence[Any], kind: str, where: str) -> None:
    """Refuse what cannot be asked.

    Raises:
        UserError: an unknown kind, or an item without its fields; says where.
    """
    if kind not in _FIELDS:
        raise UserError(f"{where}: tasks of type {kind!r} are not known; these are: {', '.join(_FIELDS)}")
    for number, item in enumerate(items, start=1):
        for name, expected in _FIELDS[kind].items():
            if not isinstance(item, dict) or not isinstance(item.get(name), expected):
                raise UserError(f"{where}, item {number} has no {name!r} of type {expected.__name__}")
        options = item.get(_OPTIONS.get(kind, ""), [])
        if kind in _OPTIONS and not (
            len(options) > 1 and all(isinstance(option, str) for option in options) and 0 <= item["gold"] < len(options)
        ):
            raise UserError(f"{where}, item {number}: gold {item['gold']} is not the index of one of its choices")


def core_questions(
    task: CoreTask, indices: Sequence[int], tokenizer: TextTokenizer, limit: int | None
) -> Iterator[Question]:
    """The questions at these places of a shuffled task, as tokens.

    Args:
        limit: most tokens that the model reads; None: any number.
    """
    for index in indices:
        prompts = render(task, index)
        yield as_question(task.name, index, prompts, *_scored(task, prompts, tokenizer), _gold(task, index), limit)


def render(task: CoreTask, index: int) -> list[str]:
    """The texts that are compared: one per choice or context; for LANGUAGE_MODELING without and with the ending."""
    shown = "".join(f"{_solved(task, other)}\n\n" for other in _examples(task, index))
    item = task.items[index]
    if task.kind == MULTIPLE_CHOICE:
        return [f"{shown}{item['query']}{task.delimiter}{choice}" for choice in item["choices"]]
    if task.kind == SCHEMA:
        return [f"{shown}{context}{task.delimiter}{item['continuation']}" for context in item["context_options"]]
    opening = f"{shown}{item['context'].strip()}{task.delimiter}"
    # White space at the end belongs to the first token of the ending.
    return [opening.strip(), opening + item["continuation"]]


def _examples(task: CoreTask, index: int) -> list[Item]:
    """The solved examples before a question: never itself."""
    if not task.shots:
        return []
    others = [other for other in range(len(task.items)) if other != index]
    return [task.items[other] for other in random.Random(SHOTS_SEED + index).sample(others, task.shots)]


def _solved(task: CoreTask, item: Item) -> str:
    if task.kind == MULTIPLE_CHOICE:
        return f"{item['query']}{task.delimiter}{item['choices'][item['gold']]}"
    if task.kind == SCHEMA:
        return f"{item['context_options'][item['gold']]}{task.delimiter}{item['continuation']}"
    return f"{item['context'].strip()}{task.delimiter}{item['continuation']}"


def _scored(task: CoreTask, prompts: list[str], tokenizer: TextTokenizer) -> tuple[list[list[int]], list[int]]:
    """Token sequences, and where in each the scored tokens begin; they end with it."""
    sequences = [[tokenizer.bos, *tokenizer.encode(prompt)] for prompt in prompts]
    if task.kind == MULTIPLE_CHOICE:
        return sequences, [common_prefix(sequences)] * len(sequences)
    if task.kind == SCHEMA:
        length = common_suffix(sequences)
        return sequences, [len(sequence) - length for sequence in sequences]
    return sequences[1:], [common_prefix(sequences)]


def _gold(task: CoreTask, index: int) -> int | None:
    return None if task.kind == LANGUAGE_MODELING else task.items[index]["gold"]
