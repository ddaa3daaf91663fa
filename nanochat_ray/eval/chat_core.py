"""ChatCORE's tasks, and a run's own held-out questions: what a chat model is asked, and when its answer is right.

Questions with lettered choices are answered by the logits: the likeliest of the letters as the reply's first token.
The others are answered by a greedy reply, calculator calls included: GSM8K by the number after `####`, HumanEval by
running what was written (`sandbox.py`), held-out questions by their source's own judge.
"""

import hashlib
import json
import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from nanochat_ray.chat import render_prompt
from nanochat_ray.eval.core import ORDER_SEED
from nanochat_ray.eval.question import Question, Verdict, as_question, prompt_hash
from nanochat_ray.eval.sandbox import ProgramResult, described
from nanochat_ray.storage import Folder
from nanochat_ray.tasks.conversations import Conversation, spoken_text
from nanochat_ray.tasks.gsm8k import final_number, load_gsm8k
from nanochat_ray.tasks.humaneval import CheckedProgram, Problem, checked_program, extract_program, load_humaneval
from nanochat_ray.tasks.judges import JUDGES, Content, calls, same_final_number, shown
from nanochat_ray.tasks.mixture import Example
from nanochat_ray.tasks.multiple_choice import ARC_CHALLENGE, ARC_EASY, MultipleChoice, read_arc, read_mmlu
from nanochat_ray.tasks.recipes import tasks_of
from nanochat_ray.tokenizer import Tokenizer

LETTERS, NUMBER, PROGRAM, HELD_OUT = "lettered choice", "number", "program", "held out"
_COST = {LETTERS: 1.0, HELD_OUT: 10.0, NUMBER: 50.0, PROGRAM: 50.0}  # of a question: a prompt, or that and a reply


@dataclass(frozen=True)
class ChatTask:
    """One task.

    kind       how it is judged
    baseline   accuracy of guessing, 0 … 1
    shots      solved examples before each question
    items      MultipleChoice for LETTERS, Problem for PROGRAM, else whole conversations
    """

    name: str
    kind: str
    baseline: float
    items: tuple[Any, ...]
    shots: int = 0

    @property
    def cost(self) -> float:
        return _COST[self.kind]

    @cached_property
    def hash(self) -> str:
        """64 hex digits: equal when the same questions are asked in the same way."""
        facts = [self.kind, [(_prompt(self, item), _expected(item)) for item in self.items]]
        return hashlib.sha256(json.dumps(facts).encode()).hexdigest()


def chat_core_of(tasks: str | None, sft: str, most: int | None) -> list[ChatTask]:
    """ChatCORE's tasks, or none of them.

    Args:
        tasks: hub, none, or where a folder of them is; None: from where the finetuning mixture `sft` has its sets.

    Raises:
        UserError: as `chat_core_tasks`.
    """
    if tasks == "hub" or (tasks is None and sft == "hub"):
        return chat_core_tasks(None, most)
    place = None if tasks == "none" else tasks_of(sft, tasks)
    return [] if place is None else chat_core_tasks(place, most)


def chat_core_tasks(place: Folder | None, most: int | None) -> list[ChatTask]:
    """The five tasks of ChatCORE: from a folder laid out as the hub's files, or from the hub when `place` is None.

    Args:
        most: questions of each, the first of a fixed random order; None: all.

    Raises:
        UserError: a set is missing or damaged.
    """

    def task(name: str, kind: str, baseline: float, items: Sequence[Any]) -> ChatTask:
        order = list(items)
        random.Random(ORDER_SEED).shuffle(order)
        return ChatTask(name, kind, baseline, tuple(order[:most]))

    return [
        task("ARC-Easy", LETTERS, 0.25, read_arc(ARC_EASY, "test", place)),
        task("ARC-Challenge", LETTERS, 0.25, read_arc(ARC_CHALLENGE, "test", place)),
        task("MMLU", LETTERS, 0.25, read_mmlu("test", place)),
        task("GSM8K", NUMBER, 0.0, load_gsm8k("test", place)),
        task("HumanEval", PROGRAM, 0.0, load_humaneval("test", place)),
    ]


def held_out_tasks(examples: Sequence[Example], most: int | None) -> list[ChatTask]:
    """A mixture's test examples whose source has a judge, by source."""
    by_source: dict[str, list[Conversation]] = {}
    for example in examples:
        if example.source in JUDGES:
            by_source.setdefault(example.source, []).append(example.messages)
    return [ChatTask(source, HELD_OUT, 0.0, tuple(items[:most])) for source, items in sorted(by_source.items())]


def prompt_of(task: ChatTask, index: int) -> Conversation:
    """The messages that the model answers."""
    return _prompt(task, task.items[index])


def letter_question(task: ChatTask, index: int, tokenizer: Tokenizer, limit: int | None) -> Question:
    """A LETTERS question: one sequence per letter, of which only the letter is scored."""
    item: MultipleChoice = task.items[index]
    prompt = render_prompt(tokenizer, prompt_of(task, index))
    sequences = [[*prompt, *tokenizer.encode(letter)] for letter in item.letters]
    texts = [item.render()]
    return as_question(task.name, index, texts, sequences, [len(prompt)] * len(sequences), item.answer, limit)


def judge_reply(task: ChatTask, index: int, reply: Content, run: Callable[[CheckedProgram], ProgramResult]) -> Verdict:
    """What came of a written answer.

    Args:
        run: a program with its tests.
    """
    item = task.items[index]
    text = spoken_text(reply)
    detail = ""
    walls: tuple[str, ...] = ()
    if task.kind == PROGRAM:
        result = run(checked_program(item, text))
        prediction, correct, walls = extract_program(text), result.passed, result.walls
        detail = f"{result.outcome}: {result.detail}" if result.detail else str(result.outcome)
    elif task.kind == NUMBER:
        found = final_number(text)
        prediction, correct = "" if found is None else str(found), same_final_number(reply, item[-1]["content"])
    else:
        prediction, correct = text, JUDGES[task.name](reply, item[-1]["content"])
    asked = prompt_hash([json.dumps(prompt_of(task, index))])
    tool_calls = len(calls(reply))
    return Verdict(task.name, index, asked, prediction, (), correct, shown(reply), tool_calls, detail, walls)


def protections_of(verdicts: Iterable[Verdict]) -> tuple[str, ...]:
    """What stood between generated programs and the machines that ran them, in words: the weakest of them all."""
    walls = [set(verdict.walls) for verdict in verdicts if verdict.detail]
    return described(set.intersection(*walls)) if walls else ()


def _prompt(task: ChatTask, item: Any) -> Conversation:
    if isinstance(item, MultipleChoice):
        return [{"role": "user", "content": item.render()}]
    if isinstance(item, Problem):
        return [{"role": "user", "content": item.prompt}]
    return item[:-1]


def _expected(item: Any) -> Any:
    if isinstance(item, MultipleChoice):
        return item.answer
    return item.test if isinstance(item, Problem) else item[-1]["content"]
