"""ChatCORE and held-out questions as an exam: one model that scores letters and writes replies, in turn."""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from nanochat_ray.chat import render_prompt
from nanochat_ray.engine.engine import Engine
from nanochat_ray.engine.sampler import SamplingParams
from nanochat_ray.eval.chat_core import LETTERS, ChatTask, judge_reply, letter_question, prompt_of
from nanochat_ray.eval.exam import Grade, Piece, RunModel
from nanochat_ray.eval.question import Verdict, judge
from nanochat_ray.eval.sandbox import Limits, ProgramResult, run_program
from nanochat_ray.eval.scorer import StepScorer, batch_tokens
from nanochat_ray.tasks.conversations import Conversation
from nanochat_ray.tasks.humaneval import CheckedProgram

# A program is right or wrong by what it computes in the CPU time it has, on however busy a machine.
PROGRAM_LIMITS = Limits(wall_s=60.0)


@dataclass(frozen=True)
class ChatExam:
    """Tasks for a chat model of a run.

    max_tokens   of a reply, tool calls included
    """

    model: RunModel
    tasks: Sequence[ChatTask]
    max_tokens: int

    def begin(self) -> Grade:
        from nanochat_ray.engine.load import load_chat_model

        model = self.model
        loaded = load_chat_model(model.storage, model.run, model.stage, dtype=model.dtype, step=model.step)
        return chat_grader(self.tasks, loaded.engine, self.max_tokens, batch_tokens(loaded.about["device"]))


def chat_grader(tasks: Sequence[ChatTask], engine: Engine, max_tokens: int, scored_at_once: int) -> Grade:
    """Grades with an engine, whose model's blocks it takes for scoring between replies.

    Args:
        max_tokens: of a reply.
        scored_at_once: tokens of a batch of lettered questions.
    """
    by_name = {task.name: task for task in tasks}
    tokenizer: Any = engine.tokenizer

    def run(checked: CheckedProgram) -> ProgramResult:
        return run_program(checked.program, checked.tests, PROGRAM_LIMITS)

    def grade(piece: Piece) -> list[Verdict]:
        task = by_name[piece.task]
        if task.kind == LETTERS:
            scorer = StepScorer(engine.model, scored_at_once)
            questions = [letter_question(task, index, tokenizer, scorer.limit) for index in piece.indices]
            verdicts = [judge(question, ends, tokenizer.decode) for question, ends in scorer.score(questions)]
            engine.reset()
            return verdicts
        replies = write_replies(engine, [prompt_of(task, index) for index in piece.indices], max_tokens)
        with ThreadPoolExecutor(torch.get_num_threads()) as pool:  # as many cores as are this process's to use
            return list(pool.map(partial(judge_reply, task, run=run), piece.indices, replies))

    return grade


def write_replies(engine: Engine, prompts: Sequence[Conversation], max_tokens: int) -> list[list[dict[str, str]]]:
    """A greedy reply to each conversation, as parts, all of them at once; [] where the prompt leaves no room.

    Raises:
        Exception: what the model's step raised.
    """
    tokenizer: Any = engine.tokenizer
    params = SamplingParams(temperature=0.0, max_tokens=max_tokens)
    replies: list[list[dict[str, str]]] = [[] for _ in prompts]
    place = {}
    for number, messages in enumerate(prompts):
        ids = render_prompt(tokenizer, messages)
        if len(ids) < engine.context:
            place[engine.add(ids, params)] = number
    while engine.busy:
        for reply, outcome in engine.step():
            if isinstance(outcome, Exception):
                raise outcome
            for piece in outcome:
                if piece.tool is not None and piece.tool.result is not None:
                    replies[place[reply]].append({"type": "python", "text": piece.tool.expression})
                    replies[place[reply]].append({"type": "python_output", "text": piece.tool.result})
                if piece.text:
                    replies[place[reply]].append({"type": "text", "text": piece.text})
    return replies
