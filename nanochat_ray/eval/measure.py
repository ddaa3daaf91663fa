"""CORE and ChatCORE of a model, from its questions to what the report shows: figures with intervals, and their origin.

<stage>/evaluations/<name>-<identity>/results.parquet    what became of each question
<stage>/evaluations.jsonl                                the mean of every step that was measured
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from nanochat_ray.errors import UserError
from nanochat_ray.eval.core import ORDER_SEED, SHOTS_SEED
from nanochat_ray.eval.exam import Exam, RunModel, Task, identity
from nanochat_ray.eval.question import Verdict
from nanochat_ray.eval.results import RESULTS, aligned, by_task, read_results
from nanochat_ray.eval.sitting import sit
from nanochat_ray.eval.statistics import RESAMPLES, SEED
from nanochat_ray.eval.summary import compare, comparison_table, summarise, table
from nanochat_ray.storage import Folder

EVALUATIONS, BASE_EVAL, CHAT_EVAL = "evaluations.jsonl", "base_eval.json", "chat_eval.json"
_ARTIFACTS = {"CORE": (BASE_EVAL, "core"), "ChatCORE": (CHAT_EVAL, "chat_core")}


@dataclass(frozen=True)
class Subject:
    """Which model is measured, in words and by its weights.

    title    for people, "d12, base, step 2520"
    stage    the folder that its evaluations are kept in
    digest   sha256 of its weights
    """

    title: str
    stage: Folder
    step: int
    digest: str
    dtype: str


def subject_of(model: RunModel, stage: Folder) -> Subject:
    """A run's checkpoint."""
    title = f"{model.run}, {model.stage}, step {model.step}"
    return Subject(title, stage, model.step, model.digest, model.dtype or "default")


@dataclass(frozen=True)
class Measured:
    """The summary for artifacts and the report, and every verdict."""

    summary: dict[str, Any]
    verdicts: list[Verdict]


def measure(
    name: str,
    exam: Exam,
    subject: Subject,
    *,
    max_per_task: int | None,
    workers: int,
    address: str | None,
    niceness: int = 0,
    mean_over: Sequence[Task] | None = None,
    manner: str = "",
) -> Measured:
    """Have an exam sat, or go on with it, and sum it up.

    Args:
        name: CORE or ChatCORE.
        mean_over: the tasks of the mean, where the exam has others besides.
        manner: what else decides the answers, in any words; results under another manner are not gone on with.

    Raises:
        UserError: as `sit`.
    """
    key = identity(f"{name} {manner}".strip(), subject.digest, subject.dtype, exam.tasks)
    folder = subject.stage / "evaluations" / f"{name.lower()}-{key[:12]}"
    verdicts, per_second = sit(exam, folder, name, workers, address, niceness)
    tasks = exam.tasks if mean_over is None else mean_over
    summary = {
        "name": name,
        "title": subject.title,
        "step": subject.step,
        "model_digest": subject.digest,
        "questions_hash": _hash(tasks),
        "max_per_task": max_per_task,
        "seeds": {"few_shot": f"{SHOTS_SEED} + index", "order": ORDER_SEED, "bootstrap": SEED},
        "resamples": RESAMPLES,
        "dtype": subject.dtype,
        "examples_per_s": per_second and round(per_second, 2),
        **(summarise(by_task(tasks, verdicts)) if tasks else {}),
        "references": {},
        "comparison": None,
        "results": str(folder / RESULTS),
    }
    if tasks:
        _note(subject.stage, summary)
    return Measured(summary, verdicts)


def compared(ours: Measured, tasks: Sequence[Task], theirs: Mapping[str, Any]) -> dict[str, Any]:
    """The paired comparison with another model, of which this is the summary, as `measured_before` gives it.

    Raises:
        UserError: its results are damaged, or not of the same questions.
    """
    names = {task.name for task in tasks}
    found = read_results(_folder_of(theirs))
    pairs = aligned(*([verdict for verdict in each if verdict.task in names] for each in (ours.verdicts, found)))
    first, second = (by_task(tasks, verdicts) for verdicts in pairs)
    return {"with": theirs["title"], **compare(first, second)}


def measured_before(stage: Folder, name: str, tasks: Sequence[Task]) -> dict[str, Any]:
    """The summary of a stage that was measured before, to compare with; asked before anything is measured anew.

    Raises:
        UserError: it was not, was asked other questions, or its answers are gone.
    """
    file, key = _ARTIFACTS[name]
    found = stage.read_json(file).get(key) if stage.exists(file) else None
    if found is None:
        raise UserError(
            f"{name} of {stage} was not measured: there is nothing to compare with; evaluate that run first"
        )
    if found["questions_hash"] != _hash(tasks):
        most = found["max_per_task"]
        asked = f"at most {most:,} of each task" if most else "all of each task"
        raise UserError(
            f"{found['title']} was asked other questions ({asked}), so there is nothing to compare; evaluate both with "
            "the same questions and --max-per-task"
        )
    if not _folder_of(found).exists(RESULTS):
        raise UserError(f"{found['results']}, to compare with, is gone; evaluate {found['title']} again")
    return found


def tell(summary: Mapping[str, Any]) -> None:
    """Print a summary for people."""
    print(f"\n{summary['title']}\n{table(dict(summary))}")
    if summary["comparison"] is not None:
        print(f"\ncompared with {summary['comparison']['with']}\n{comparison_table(summary['comparison'])}")
    print(f"each question: {summary['results']}", flush=True)


def _folder_of(summary: Mapping[str, Any]) -> Folder:
    return Folder.at(summary["results"].rpartition("/")[0])


def keep(stage: Folder, file: str, subject: Subject, figures: Mapping[str, Any]) -> dict[str, Any]:
    """Add figures to those that a stage's file has of the same weights, in place of those of others; returns all.

    Raises:
        UserError: the storage refuses.
    """
    known = stage.read_json(file) if stage.exists(file) else {}
    if known.get("model_digest") != subject.digest:
        known = {}
    everything = {**known, "step": subject.step, "model_digest": subject.digest, **figures}
    try:
        stage.write_json(file, everything)
    except OSError as error:
        raise UserError(f"{stage / file} cannot be written ({error}); free space, then run it again") from error
    return everything


def _hash(tasks: Sequence[Task]) -> str:
    """64 hex digits of all questions that were asked."""
    return hashlib.sha256("".join(task.hash for task in tasks).encode()).hexdigest()


def _note(stage: Folder, summary: Mapping[str, Any]) -> None:
    """Add a step's mean to the stage's evaluations, in place of an earlier one of the same kind."""
    entry = {key: summary[key] for key in ("name", "step", "max_per_task")} | summary["mean"]
    lines = stage.read(EVALUATIONS).decode().splitlines() if stage.exists(EVALUATIONS) else []
    kept = [
        other
        for other in map(json.loads, lines)
        if any(other[key] != entry[key] for key in ("name", "step", "max_per_task"))
    ]
    entries = sorted([*kept, entry], key=lambda entry: (entry["name"], entry["step"]))
    try:
        stage.write(EVALUATIONS, "".join(json.dumps(entry) + "\n" for entry in entries))
    except OSError as error:
        raise UserError(f"{stage / EVALUATIONS} cannot be written ({error}); free space") from error
