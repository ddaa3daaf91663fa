"""CORE and ChatCORE of a model, from its questions to what the report shows: figures with intervals, and their origin.

<stage>/evaluations/<name>-<identity>/results.parquet    what became of each question
<stage>/evaluations/<name>-<identity>/score.json         the mean, its step, and when
<stage>/evaluations.jsonl                                the scores of all of them, in the order of time
"""

import hashlib
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from nanochat_ray.cli import warn
from nanochat_ray.errors import UserError
from nanochat_ray.eval.core import ORDER_SEED, SHOTS_SEED
from nanochat_ray.eval.exam import Exam, RunModel, Task, identity
from nanochat_ray.eval.kept import BASE_EVAL, CHAT_EVAL, SCORES, read_evaluation
from nanochat_ray.eval.question import Verdict
from nanochat_ray.eval.results import RESULTS, aligned, by_task, read_results
from nanochat_ray.eval.sitting import sit
from nanochat_ray.eval.statistics import RESAMPLES, SEED
from nanochat_ray.eval.summary import caveats, compare, comparison_table, summarise, table
from nanochat_ray.storage import Folder, retrying

EVALUATIONS, SCORE = "evaluations", "score.json"
_FILES = {"CORE": BASE_EVAL, "ChatCORE": CHAT_EVAL}


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
    return Subject(title, stage, model.step, model.digest, model.dtype)


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
    beside: bool = False,
    manner: str = "",
) -> Measured:
    """Have an exam sat, or go on with it, and sum it up.

    Args:
        name: CORE or ChatCORE.
        manner: what else decides the answers, in any words; results under another manner are not gone on with.

    Raises:
        UserError: as `sit`.
    """
    folder, verdicts, per_second = answer(name, exam, subject, workers, address, beside, manner)
    summary = {
        "name": name,
        "title": subject.title,
        "step": subject.step,
        "model_digest": subject.digest,
        "questions_hash": _hash(exam.tasks),
        "max_per_task": max_per_task,
        "seeds": {**_shots_seed(exam.tasks), "order": ORDER_SEED, "bootstrap": SEED},
        "resamples": RESAMPLES,
        "dtype": subject.dtype,
        "examples_per_s": per_second and round(per_second, 2),
        "cut": sum(verdict.cut for verdict in verdicts),
        **summarise(by_task(exam.tasks, verdicts)),
        "references": {},
        "comparison": None,
        "results": f"{EVALUATIONS}/{folder.uri.rpartition('/')[2]}/{RESULTS}",  # in the stage, which may move
    }
    retrying(lambda: _note(subject.stage, folder, summary), subject.stage, warn, when_full=False)
    return Measured(summary, verdicts)


def answer(
    name: str, exam: Exam, subject: Subject, workers: int, address: str | None, beside: bool = False, manner: str = ""
) -> tuple[Folder, list[Verdict], float | None]:
    """Where an exam's results are, the results, and questions per second; the arguments are those of `measure`."""
    key = identity(f"{name} {manner}".strip(), subject.digest, subject.dtype, exam.tasks)
    folder = subject.stage / EVALUATIONS / f"{name.lower()}-{key[:12]}"
    return folder, *sit(exam, folder, name, workers, address, beside)


def compared(ours: Measured, tasks: Sequence[Task], theirs: "Before") -> dict[str, Any]:
    """The paired comparison with another model.

    Raises:
        UserError: its results are damaged, or not of the same questions.
    """
    pairs = aligned(ours.verdicts, read_results(theirs.folder))
    first, second = (by_task(tasks, verdicts) for verdicts in pairs)
    return {"with": theirs.title, **compare(first, second)}


@dataclass(frozen=True)
class Before:
    """A model that was measured before, in words, and the folder of its results."""

    title: str
    folder: Folder


def measured_before(stage: Folder, name: str, tasks: Sequence[Task]) -> Before:
    """A stage that was measured before, to compare with; looked for before anything is measured anew.

    Raises:
        UserError: it was not, was asked other questions, or its answers are gone.
    """
    file = _FILES[name]
    if not stage.exists():
        raise UserError(f"there is no {stage}, to compare with; check --compare and --storage")
    found = read_evaluation(stage, file).get(SCORES[file])
    if found is None:
        raise UserError(
            f"{name} of {stage} was not measured: there is nothing to compare with; evaluate that run first"
        )
    if "questions_hash" not in found or not isinstance(found.get("results"), str):
        raise UserError(f"{name} of {stage} was measured by an earlier version; evaluate that run again")
    if found["questions_hash"] != _hash(tasks):
        most = found["max_per_task"]
        asked = f"at most {most:,} of each task" if most else "all of each task"
        raise UserError(
            f"{found['title']} was asked other questions ({asked}), so there is nothing to compare; evaluate both with "
            "the same questions and --max-per-task"
        )
    folder = stage / found["results"].removesuffix(f"/{RESULTS}")
    if not folder.exists(RESULTS):
        raise UserError(f"{folder / RESULTS}, to compare with, is gone; evaluate {found['title']} again")
    return Before(found["title"], folder)


def tell(summary: Mapping[str, Any], stage: Folder) -> None:
    """Print a stage's summary for people."""
    print(f"\n{summary['title']}\n{table(dict(summary))}")
    for caveat in caveats(dict(summary)):
        print(caveat)
    if summary["comparison"] is not None:
        print(f"\ncompared with {summary['comparison']['with']}\n{comparison_table(summary['comparison'])}")
    print(f"each question: {stage / summary['results']}", flush=True)


def _shots_seed(tasks: Sequence[Task]) -> dict[str, str]:
    return {"few_shot": f"{SHOTS_SEED} + index"} if any(task.shots for task in tasks) else {}


def _hash(tasks: Sequence[Task]) -> str:
    """64 hex digits of all questions that were asked."""
    return hashlib.sha256("".join(task.hash for task in tasks).encode()).hexdigest()


def _note(stage: Folder, folder: Folder, summary: Mapping[str, Any]) -> None:
    """Keep an exam's score beside its results, and collect all of the stage: two at once lose nothing."""
    entry = {key: summary[key] for key in ("name", "step", "max_per_task")} | summary["mean"]
    if not folder.exists(SCORE):
        folder.write_json(SCORE, {**entry, "time": round(time.time(), 3)})
    places = [stage / EVALUATIONS / name for name in (stage / EVALUATIONS).list()]
    entries = [place.read_json(SCORE) for place in places if place.exists(SCORE)]
    entries.sort(key=lambda entry: entry["time"])
    stage.write(f"{EVALUATIONS}.jsonl", "".join(json.dumps(entry) + "\n" for entry in entries))
