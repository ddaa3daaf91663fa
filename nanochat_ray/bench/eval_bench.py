"""Questions of CORE per second, beside an evaluator that takes one question at a time, and the same answers.

The peer does what public evaluators do: it stacks a question's sequences, padded, runs the whole network on all of
them, and computes every logit. It is the reference of the tests, too.
"""

import os
import time
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F

from nanochat_ray.bench import sizes
from nanochat_ray.bench.measurement import Line, Watch, in_fresh_process
from nanochat_ray.device import pick_device, pick_used_dtype
from nanochat_ray.eval.core import CoreTask, core_questions
from nanochat_ray.eval.question import EndScore, Question, Verdict, judge
from nanochat_ray.eval.scorer import StepScorer
from nanochat_ray.model.gpt import GPT
from nanochat_ray.plan import Plan
from nanochat_ray.tokenizer import Tokenizer
from nanochat_ray.train.checkpoint import build_model

SIZES = sizes.FULL | {"depth": 4, "sequence_len": 1024}
QUICK = sizes.QUICK | {"sequence_len": 256}
LEAST_PER_TASK = 12  # the tasks with ten shots need eleven
COMPARED_PER_TASK = 3


def measure(plan: Plan, tokenizer: Tokenizer, tasks: Sequence[CoreTask], dtype: str | None) -> dict[str, Any]:
    """Figures of an untrained model of the plan; JSON-able."""
    with Watch() as watch:
        figures = in_fresh_process(evaluation_figures, plan, tokenizer, tasks, dtype)
    return {**figures, "machine": watch.to_dict()}


def evaluation_figures(
    plan: Plan, tokenizer: Tokenizer, tasks: Sequence[CoreTask], dtype_name: str | None
) -> dict[str, Any]:
    """Both evaluators in turn, task by task, in this process."""
    from kernels import dispatch

    device, _ = pick_device()
    dtype, _ = pick_used_dtype(device, dtype_name)
    torch.set_num_threads(os.cpu_count() or 1)
    model = _model(plan, device)
    step_model, how = dispatch.step_model(model, dtype)  # also freezes the model
    scorer = StepScorer(step_model)
    by_kind: dict[str, dict[str, float]] = {}
    for number, task in enumerate([tasks[0], *tasks]):  # the first task twice: once to warm up
        indices = range(len(task.items))
        began = time.perf_counter()
        _ours(scorer, task, indices, tokenizer)
        middle = time.perf_counter()
        _theirs(model, scorer.limit, task, indices, tokenizer)
        end = time.perf_counter()
        if number:
            kind = by_kind.setdefault(task.kind, {"questions": 0, "ours_s": 0.0, "one_at_a_time_s": 0.0})
            kind["questions"] += len(indices)
            kind["ours_s"] += middle - began
            kind["one_at_a_time_s"] += end - middle
    questions, ours_s, theirs_s = (
        sum(kind[name] for kind in by_kind.values()) for name in ("questions", "ours_s", "one_at_a_time_s")
    )
    same, compared = _same_predictions(plan, device, tasks, tokenizer)
    return {
        "depth": plan.depth,
        "vocab_size": plan.model.vocab_size,
        "sequence_len": plan.model.sequence_len,
        "dtype": str(dtype),
        "model_step": how,
        "tasks": len(tasks),
        "questions": questions,
        "same_prediction": same,
        "compared": compared,
        "per_s": round(questions / ours_s, 2),
        "one_at_a_time_per_s": round(questions / theirs_s, 2),
        "by_kind": by_kind,
    }


def lines(figures: dict[str, Any]) -> list[Line]:
    """The figures as a table for people."""

    def line(name: str, ours: float, theirs: float) -> Line:
        return Line(name, f"{ours:,.1f} questions/s", f"one at a time {theirs:,.1f} ({ours / theirs:.1f} x)")

    table = [line(f"{figures['tasks']} tasks", figures["per_s"], figures["one_at_a_time_per_s"])]
    table += [
        line(
            kind.replace("_", " "), found["questions"] / found["ours_s"], found["questions"] / found["one_at_a_time_s"]
        )
        for kind, found in figures["by_kind"].items()
    ]
    same = f"{figures['same_prediction']:,} of {figures['compared']:,}"
    speed = f"the speed is in {figures['dtype'].removeprefix('torch.')}, {figures['model_step']}"
    return [*table, Line("same prediction", same, f"in fp32, without rounding's part in near ties; {speed}")]


def _model(plan: Plan, device: torch.device) -> GPT:
    """Untrained, but with output projections, which begin at zero: every layer counts."""
    model = build_model(plan).to(device)
    generator = torch.Generator(device).manual_seed(1)
    with torch.no_grad():
        for block in model.blocks:
            for projection in (block.attn.c_proj, block.mlp.c_proj):
                projection.weight.normal_(0.0, 0.02, generator=generator)
    return model


def _same_predictions(
    plan: Plan, device: torch.device, tasks: Sequence[CoreTask], tokenizer: Tokenizer
) -> tuple[int, int]:
    """How many answers are the same in fp32, of the first few of each task."""
    from kernels import dispatch

    model = _model(plan, device)
    scorer = StepScorer(dispatch.step_model(model, torch.float32)[0])
    pairs = [
        pair
        for task in tasks
        for pair in zip(
            _ours(scorer, task, range(COMPARED_PER_TASK), tokenizer),
            _theirs(model, scorer.limit, task, range(COMPARED_PER_TASK), tokenizer),
            strict=True,
        )
    ]
    return sum(ours.prediction == theirs.prediction for ours, theirs in pairs), len(pairs)


def _ours(scorer: StepScorer, task: CoreTask, indices: Sequence[int], tokenizer: Tokenizer) -> list[Verdict]:
    scored = scorer.score(list(core_questions(task, indices, tokenizer, scorer.limit)))
    return [judge(question, ends, tokenizer.decode) for question, ends in scored]


def _theirs(
    model: GPT, limit: int | None, task: CoreTask, indices: Sequence[int], tokenizer: Tokenizer
) -> list[Verdict]:
    questions = core_questions(task, indices, tokenizer, limit)
    return [judge(question, one_at_a_time(model, question), tokenizer.decode) for question in questions]


@torch.inference_mode()
def one_at_a_time(model: GPT, question: Question) -> list[EndScore]:
    """A question's scores by the whole network on all of its sequences, padded at their end."""
    length = max(map(len, question.sequences))
    ids_BT = torch.tensor([[*ids, *[0] * (length - len(ids))] for ids in question.sequences], device=model.device)
    logits_BTV = model(ids_BT)
    losses_BT = F.cross_entropy(logits_BTV[:, :-1].flatten(0, 1), ids_BT[:, 1:].flatten(), reduction="none")
    losses_BT = losses_BT.view(len(ids_BT), -1).cpu()
    likeliest_BT = logits_BTV.argmax(dim=-1).cpu()
    return [
        EndScore(losses_BT[row, start - 1 : len(ids) - 1].numpy(), likeliest_BT[row, start - 1 : len(ids) - 1].numpy())
        for row, (ids, start) in enumerate(zip(question.sequences, question.starts, strict=True))
    ]
