"""From answers that were right or wrong to what is told of them: figures by task, their mean, a table, a comparison."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from nanochat_ray.eval.statistics import RESAMPLES, SEED, interval, mean_centred, paired, paired_mean

Json = dict[str, Any]


@dataclass(frozen=True)
class TaskResult:
    """How a model did at one task.

    Attributes:
        type: of its questions, for people: "multiple choice", "schema", "language modelling", …
        shots: examples with their answers in front of each question.
        baseline: the accuracy of guessing, in [0, 1).
        correct: bool [examples].
    """

    type: str
    shots: int
    baseline: float
    correct: np.ndarray


def summarise(tasks: Mapping[str, TaskResult], resamples: int = RESAMPLES, seed: int = SEED) -> Json:
    """Accuracies with their 95 % intervals, as plain data for JSON; tasks stay in their order.

    Returns:
        mean: {value, low, high} of the centred accuracies' mean.
        tasks: by name, {type, shots, examples, baseline, accuracy: {value, low, high}, centred: {value, low, high}}.

    Raises:
        ValueError: there is no task, or one without examples; names it.
    """
    mean = mean_centred({name: (task.correct, task.baseline) for name, task in tasks.items()}, resamples, seed)
    by_task: Json = {}
    for name, task in tasks.items():
        accuracy = interval(task.correct, resamples, seed, name)
        by_task[name] = {
            "type": task.type,
            "shots": task.shots,
            "examples": len(task.correct),
            "baseline": task.baseline,
            "accuracy": accuracy.to_dict(),
            "centred": accuracy.centred(task.baseline).to_dict(),
        }
    return {"mean": mean.to_dict(), "tasks": by_task}


def compare(
    a: Mapping[str, TaskResult], b: Mapping[str, TaskResult], resamples: int = RESAMPLES, seed: int = SEED
) -> Json:
    """Centred accuracies of `a` minus those of `b` on the same examples: the same index of `correct` is the same one.

    Returns:
        mean: {value, low, high, p}, the difference of the means.
        tasks: by name, {value, low, high, p, examples}.

    Raises:
        ValueError: the two have other tasks, baselines or numbers of examples; names the first that differs.
    """
    if other := set(a) ^ set(b):
        raise ValueError(f"only one of the two models has done {', '.join(sorted(other))}")
    for name in a:
        if a[name].baseline != b[name].baseline:
            raise ValueError(f"task {name!r} has the baselines {a[name].baseline} and {b[name].baseline}")
    mean = paired_mean({name: (a[name].correct, b[name].correct, a[name].baseline) for name in a}, resamples, seed)
    by_task: Json = {}
    for name, ours in a.items():
        difference = paired(ours.correct, b[name].correct, resamples, seed, name, ours.baseline)
        by_task[name] = {**difference.to_dict(), "examples": len(ours.correct)}
    return {"mean": mean.to_dict(), "tasks": by_task}


def reference_mean(summary: Json, name: str) -> float | None:
    """A reference's mean over the tasks of the summary, so that the two compare; None where it lacks one of them."""
    reference = summary["references"][name]
    known, tasks = reference.get("tasks", {}), summary["tasks"]
    if set(known) == set(tasks) and "mean" in reference:
        return float(reference["mean"])
    return sum(known[task] for task in tasks) / len(tasks) if set(tasks) <= set(known) else None


def caveats(summary: Json) -> list[str]:
    """What else one must know of a mean, in sentences."""
    alike = sum(task["accuracy"]["value"] in (0, 1) for task in summary["tasks"].values())
    said = []
    if alike:
        said.append(
            f"{alike} of {len(summary['tasks'])} tasks were answered all wrong or all right; they add nothing to the "
            "width of the mean's interval, which is too narrow for it."
        )
    if summary.get("cut"):
        said.append(f"{summary['cut']:,} questions were longer than the model reads, and lost their beginning.")
    return said


def table(summary: Json) -> str:
    """A summary for a terminal: a line for each task with its interval, beside it the references' centred accuracies.

    Args:
        summary: what `summarise` returns, with or without `name`, `references` ({name: {mean, tasks: {task: centred}}})
            and `comparison` ({with, mean, tasks} of `compare`).
    """
    names = list(summary.get("references", {}))
    header = ["task", "examples", "accuracy", "95 % interval", "centred", *names]
    rows = [
        [
            name,
            f"{task['examples']:,}",
            f"{task['accuracy']['value']:.3f}",
            _ends(task["accuracy"]),
            f"{task['centred']['value']:+.3f}",
            *(_figure(summary["references"][reference].get("tasks", {}).get(name)) for reference in names),
        ]
        for name, task in summary["tasks"].items()
    ]
    mean, examples = summary["mean"], sum(task["examples"] for task in summary["tasks"].values())
    ours = [f"{examples:,}", "", _ends(mean, sign="+"), f"{mean['value']:+.3f}"]
    rows.append([summary.get("name", "mean"), *ours, *(_figure(reference_mean(summary, name)) for name in names)])
    lines = _aligned([header, *rows])
    return "\n".join(lines if len(rows) < 3 else [*lines[:-1], "-" * len(lines[0]), lines[-1]])


def comparison_table(comparison: Json) -> str:
    """A paired comparison for a terminal: differences of centred accuracies, their intervals and p values."""
    header = ["task", "examples", "difference", "95 % interval", "p"]
    rows = [
        [name, f"{task['examples']:,}", f"{task['value']:+.3f}", _ends(task, sign="+"), p_value(task["p"])]
        for name, task in comparison["tasks"].items()
    ]
    mean = comparison["mean"]
    rows.append(["mean", "", f"{mean['value']:+.3f}", _ends(mean, sign="+"), p_value(mean["p"])])
    return "\n".join(_aligned([header, *rows]))


def p_value(p: float) -> str:
    """`0.043`, `< 0.001`."""
    return f"{p:.3f}" if p >= 0.001 else "< 0.001"


def _ends(found: Json, sign: str = "") -> str:
    return f"[{found['low']:{sign}.3f}, {found['high']:{sign}.3f}]"


def _figure(centred: float | None) -> str:
    return "" if centred is None else f"{centred:+.3f}"


def _aligned(rows: list[list[str]]) -> list[str]:
    """Columns as wide as their widest cell; the first to the left, all others to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(f"{cell:<{width}}" if not column else f"{cell:>{width}}" for column, (cell, width) in line).rstrip()
        for line in (enumerate(zip(row, widths, strict=True)) for row in rows)
    ]
