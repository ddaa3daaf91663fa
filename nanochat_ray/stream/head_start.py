"""A head start on a pipeline that takes seconds to begin: its first items, made on the spot, until it has caught up.

After a restart of a group the first step used to end four seconds after its workers began, since Ray Data had to begin,
too; with a worker that reads, tokenizes and packs its first unit itself it takes two (`jobs.bench recovery`). Both are
the same sequence, so it does not matter who makes an item. No Ray here.
"""

import threading
from collections.abc import Iterator
from typing import Generic, TypeVar

Item = TypeVar("Item")


def with_head_start(pipeline: Iterator[Item], local: Iterator[Item]) -> Iterator[Item]:
    """The items of `pipeline`, of which the first are taken from `local` while it has not yet come so far.

    Args:
        pipeline: read in a thread until it has caught up, then by the caller; what it raises is raised here.
        local: the same sequence, made in the caller's thread; may be longer.
    """
    chase = _Chase(pipeline)
    while not chase.is_over():
        yield next(local)
    yield from chase.caught
    yield from pipeline


class _Chase(Generic[Item]):
    """A thread that passes over the items of the pipeline that were given out already."""

    def __init__(self, pipeline: Iterator[Item]):
        self.caught: list[Item] = []  # the first one that was not
        self._pipeline, self._given = pipeline, 0
        self._lock, self._over = threading.Lock(), False
        self._error: BaseException | None = None
        threading.Thread(target=self._run, name="head start", daemon=True).start()

    def is_over(self) -> bool:
        """Whether the pipeline goes on from here; if not, the caller gives out one more item.

        Raises:
            BaseException: whatever the pipeline raised.
        """
        with self._lock:
            if self._error is not None:
                raise self._error
            self._given += not self._over
            return self._over

    def _run(self) -> None:
        try:
            for number, item in enumerate(self._pipeline):
                with self._lock:
                    if number == self._given:
                        self.caught.append(item)
                        self._over = True
                        return
            self._over = True  # it has ended
        except BaseException as error:  # the caller raises it
            self._error = error
