"""Has an exam sat: what is not done yet, here or by workers of a cluster, with a line of progress; results are kept."""

import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager

from nanochat_ray.eval.exam import Exam, Piece, pieces
from nanochat_ray.eval.question import Verdict
from nanochat_ray.eval.results import Results
from nanochat_ray.plan import duration
from nanochat_ray.precedence import only_when_idle
from nanochat_ray.storage import Folder

PIECE = 32  # questions handed out at once: as many replies as an engine writes at a time
TELL_EVERY_S = 5.0


def sit(
    exam: Exam, folder: Folder, title: str, workers: int, address: str | None, beside: bool = False
) -> tuple[list[Verdict], float | None]:
    """Every question's verdict, by task and place; and questions per second, None if all were done before.

    One worker and no cluster named: in this process, without Ray. So it is in a submitted job, too: where there is one
    GPU the job has it, and another process would wait for it for ever.

    Args:
        beside: whether the processes that compute only take what others leave of their machines.

    Raises:
        UserError: the model, the storage or the cluster fails; what is done is kept for the next time.
    """
    results = Results(folder)
    total = sum(len(task.items) for task in exam.tasks)
    todo = pieces(exam.tasks, PIECE, results.done)
    if not todo:
        print(f"{title}: all {total:,} questions were answered before", flush=True)
        return results.finish(), None
    if results.done:
        print(f"{title}: {len(results.done):,} of {total:,} questions are done, going on", flush=True)
    folder.require_writable()
    progress = _Progress(title, len(results.done), total)
    try:
        with _grading(exam, todo, workers, address, beside, progress) as graded:
            for verdicts in graded:
                results.add(verdicts)
                progress.add(len(verdicts))
    finally:
        results.flush()
    progress.end()
    return results.finish(), progress.per_second


@contextmanager
def _grading(
    exam: Exam, todo: Sequence[Piece], workers: int, address: str | None, beside: bool, progress: "_Progress"
) -> Iterator[Iterator[list[Verdict]]]:
    if workers == 1 and address is None:
        if beside:
            only_when_idle()
        grade = exam.begin()
        progress.workers(1)
        yield map(grade, todo)
        return
    from nanochat_ray.cluster import connect, require_room
    from nanochat_ray.eval import pool

    with ExitStack() as stack:
        cluster = stack.enter_context(connect(address, workers, pool.load))
        require_room(cluster, 1, cluster.per_worker)
        graded = pool.sit(exam, todo, workers, cluster.per_worker, beside, progress.workers)
        stack.callback(graded.close)
        yield graded


class _Progress:
    """`CORE: 1,234/8,800 questions | 55.1/s | workers 3 | eta 2m18s`, every few seconds."""

    def __init__(self, title: str, done: int, total: int) -> None:
        self._title, self._before, self._done, self._total = title, done, done, total
        self._workers = 0
        self._began: float | None = None
        self._told = time.monotonic()

    def workers(self, count: int) -> None:
        """So many work now; the time counts from the first."""
        self._began = self._began or time.monotonic()
        if self._workers and count != self._workers:
            print(f"{self._title}: workers {self._workers} → {count}", flush=True)
        self._workers = count

    def add(self, questions: int) -> None:
        self._done += questions
        if time.monotonic() - self._told >= TELL_EVERY_S:
            self._tell(f"eta {duration((self._total - self._done) / self.per_second)}")

    def end(self) -> None:
        assert self._began is not None
        self._tell(f"in {duration(time.monotonic() - self._began)}")

    @property
    def per_second(self) -> float:
        assert self._began is not None
        return (self._done - self._before) / max(time.monotonic() - self._began, 1e-9)

    def _tell(self, when: str) -> None:
        self._told = time.monotonic()
        print(
            f"{self._title}: {self._done:,}/{self._total:,} questions | {self.per_second:,.1f}/s | "
            f"workers {self._workers} | {when}",
            flush=True,
        )
