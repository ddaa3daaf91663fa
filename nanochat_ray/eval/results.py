"""What became of each question, kept as it comes in: parquet parts while an exam runs, one file when it is over.

    <stage>/evaluations/<name>/part_1f3a….parquet …   while it runs; each appears whole
    <stage>/evaluations/<name>/results.parquet        all of it

The folder's name has the exam's identity, so that a re-run finds its own and goes on, and never another's. Two that run
at once keep both their parts.
"""

import re
import time
import uuid
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from functools import partial

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from nanochat_ray.cli import warn
from nanochat_ray.errors import UserError
from nanochat_ray.eval.exam import Task
from nanochat_ray.eval.question import Verdict
from nanochat_ray.eval.summary import TaskResult
from nanochat_ray.storage import Folder, retrying

WRITE_EVERY_S = 5.0  # what a lost driver loses
RESULTS = "results.parquet"
_SCHEMA = pa.schema(
    [
        ("task", pa.string()),
        ("index", pa.int32()),  # its place in the shuffled task
        ("prompt_hash", pa.string()),
        ("prediction", pa.string()),
        ("scores", pa.list_(pa.float32())),  # mean loss of each choice, in nats
        ("correct", pa.bool_()),
        ("text", pa.string()),  # the whole reply, where one was written
        ("tool_calls", pa.int32()),
        ("detail", pa.string()),  # how a program ended
        ("walls", pa.list_(pa.string())),  # that stood around it
        ("cut", pa.bool_()),  # the question was longer than the model reads
    ]
)


class Results:
    """The verdicts of one exam.

    Raises:
        UserError: what is stored there is damaged.
    """

    def __init__(self, folder: Folder) -> None:
        self.folder = folder
        self._known = {(verdict.task, verdict.index): verdict for verdict in read_results(folder)}
        self._unwritten: list[Verdict] = []
        self._written_at = time.monotonic()

    @property
    def done(self) -> set[tuple[str, int]]:
        """(task, index) of the questions that need not be asked again."""
        return set(self._known)

    def add(self, verdicts: Iterable[Verdict]) -> None:
        """Keep them; written within WRITE_EVERY_S, as long as more come."""
        for verdict in verdicts:
            self._known[verdict.task, verdict.index] = verdict
            self._unwritten.append(verdict)
        if time.monotonic() - self._written_at >= WRITE_EVERY_S:
            self.flush()

    def flush(self) -> None:
        """Write what came since the last time.

        Raises:
            UserError: the storage refuses.
        """
        if self._unwritten:
            self._write(f"part_{uuid.uuid4().hex}.parquet", self._unwritten)
            self._unwritten = []
        self._written_at = time.monotonic()

    def finish(self) -> list[Verdict]:
        """Everything in one file, by task and place; returns it.

        Raises:
            UserError: the storage refuses.
        """
        verdicts = [self._known[key] for key in sorted(self._known)]
        parts = retrying(lambda: _parts(self.folder), self.folder, warn)
        if parts or self._unwritten:
            self._write(RESULTS, verdicts)
            self._unwritten = []
            for name in parts:
                retrying(partial(self.folder.delete, name), self.folder, warn)
        return verdicts

    def _write(self, name: str, verdicts: Sequence[Verdict]) -> None:
        sink = pa.BufferOutputStream()
        pq.write_table(pa.Table.from_pylist([asdict(verdict) for verdict in verdicts], schema=_SCHEMA), sink)
        content = sink.getvalue().to_pybytes()
        retrying(lambda: self.folder.write(name, content), self.folder, warn, when_full=False)


def by_task(tasks: Iterable[Task], verdicts: Iterable[Verdict]) -> dict[str, TaskResult]:
    """Which answers were right, by task; those of tasks that are not asked for are left out."""
    correct: dict[str, list[bool]] = {}
    for verdict in verdicts:
        correct.setdefault(verdict.task, []).append(verdict.correct)
    return {
        task.name: TaskResult(task.kind.replace("_", " "), task.shots, task.baseline, np.array(correct[task.name]))
        for task in tasks
    }


def aligned(ours: Sequence[Verdict], theirs: Sequence[Verdict]) -> tuple[list[Verdict], list[Verdict]]:
    """Two models' verdicts on the same questions, in the same order.

    Raises:
        UserError: they were not asked the same.
    """
    first, second = ({(verdict.task, verdict.index): verdict for verdict in verdicts} for verdicts in (ours, theirs))
    for key in sorted(first.keys() | second.keys()):
        if key not in first or key not in second or first[key].prompt_hash != second[key].prompt_hash:
            raise UserError(
                f"the two models were not asked the same: question {key[1]} of {key[0]} differs or is missing; "
                "evaluate both with the same questions and --max-per-task"
            )
    return [first[key] for key in sorted(first)], [second[key] for key in sorted(first)]


def read_results(folder: Folder) -> list[Verdict]:
    """All verdicts that a folder has, of a finished or an interrupted exam.

    Raises:
        UserError: a file is damaged, which names it, or the storage fails.
    """
    names = retrying(lambda: [*([RESULTS] if folder.exists(RESULTS) else []), *_parts(folder)], folder, warn)
    verdicts: list[Verdict] = []
    for name in names:
        try:
            content = retrying(partial(folder.read, name), folder, warn)
        except FileNotFoundError:  # another process has put it into the one file, which it will read
            continue
        try:
            rows = pq.read_table(pa.BufferReader(content)).cast(_SCHEMA).to_pylist()
            verdicts += [
                Verdict(**{**row, "scores": tuple(row["scores"]), "walls": tuple(row["walls"])}) for row in rows
            ]
        except (pa.ArrowException, ValueError, TypeError) as error:
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise UserError(
                f"{folder / name} is damaged ({reason}); delete it, and its questions are asked again"
            ) from error
    return verdicts


def _parts(folder: Folder) -> list[str]:
    return [name for name in folder.list() if re.fullmatch(r"part_[0-9a-f]{32}\.parquet", name)]
