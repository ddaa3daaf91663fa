"""RAY SHELL: an exam sat by actors that come and go. Pieces are handed out as actors become free.

An actor that dies costs the pieces it had in hand, which others get; a new one takes its place as soon as the cluster
has room. Two pieces are in an actor's hands at a time, so that it never waits for the driver.
"""

from collections import Counter
from collections.abc import Callable, Generator, Sequence
from typing import Any

import ray
from ray.exceptions import ObjectLostError, OutOfMemoryError, RayActorError, RayTaskError

from nanochat_ray.errors import UserError
from nanochat_ray.eval.exam import Exam, Piece
from nanochat_ray.eval.question import Verdict
from nanochat_ray.precedence import only_when_idle

IN_HAND = 2
DEATHS_PER_PIECE = 3  # then it is not the machines' fault
_LOST = (RayActorError, OutOfMemoryError, ObjectLostError)  # with the actor, or its machine, or for want of memory


def load() -> None:
    """Import what an examiner needs; for processes that shall be ready before they are one."""
    import nanochat_ray.engine.load
    import nanochat_ray.eval.scorer
    import nanochat_ray.model.gpt  # noqa: F401


class _Examiner:
    """One process with the model."""

    def begin(self, exam: Exam, beside: bool) -> None:
        """Not a constructor: what a method raises reaches the driver as it is."""
        if beside:
            only_when_idle()
        self._grade = exam.begin()

    def grade(self, piece: Piece) -> list[Verdict]:
        return self._grade(piece)


def sit(
    exam: Exam,
    pieces: Sequence[Piece],
    workers: int,
    resources: dict[str, float],
    beside: bool = False,
    tell_workers: Callable[[int], None] = lambda workers: None,
) -> Generator[list[Verdict], None, None]:
    """The verdicts of each piece, as they come, in any order; each piece once.

    Args:
        workers: most actors at a time; fewer work while the cluster has room for fewer.
        resources: of each, {"CPU": …} and "GPU" if it has any.
        beside: whether they only take what others leave of their machines.
        tell_workers: called with the number of actors that work whenever it changes.

    Raises:
        UserError: the model cannot be loaded, or actors die over and over with the same piece or before they begin.
    """
    examiner: Any = ray.remote(num_cpus=resources["CPU"], num_gpus=resources.get("GPU", 0))(_Examiner)
    placed = ray.put(exam)

    def hire() -> tuple[ray.actor.ActorHandle, ray.ObjectRef]:
        actor = examiner.remote()
        return actor, actor.begin.remote(placed, beside)

    hall = _Hall(list(pieces), min(workers, len(pieces)), hire, tell_workers)
    try:
        yield from hall.sit()
    finally:
        hall.close()


class _Hall:
    """The actors, what each has in hand, and what nobody has."""

    def __init__(
        self,
        pieces: list[Piece],
        workers: int,
        hire: Callable[[], tuple[ray.actor.ActorHandle, ray.ObjectRef]],
        tell_workers: Callable[[int], None],
    ) -> None:
        self._queue = pieces[::-1]  # the next one is at the end
        self._new_actor, self._tell = hire, tell_workers
        self._deaths: Counter[Piece | None] = Counter()  # by the oldest piece in hand; None: while loading
        self._loading_deaths = DEATHS_PER_PIECE * workers  # one machine takes many with it
        self._began: set[ray.actor.ActorHandle] = set()
        self._in_hand: dict[ray.ObjectRef, tuple[ray.actor.ActorHandle, Piece | None]] = {}
        for _ in range(workers):
            self._hire()

    def sit(self) -> Generator[list[Verdict], None, None]:
        while self._queue or any(piece is not None for _, piece in self._in_hand.values()):
            for ref in ray.wait(list(self._in_hand), num_returns=1)[0]:
                if ref not in self._in_hand:  # of an actor that another reference has shown to be dead
                    continue
                actor, piece = self._in_hand[ref]
                try:
                    verdicts = ray.get(ref)
                except _LOST as error:
                    self._lose(actor, error)
                    continue
                except RayTaskError as error:  # what the worker raised, without the pages that Ray puts around it
                    raise error.cause from error
                del self._in_hand[ref]
                self._deaths.pop(piece, None)
                if piece is None:
                    self._began.add(actor)
                    self._tell(len(self._began))
                self._hand_out(actor)
                if piece is not None:
                    yield verdicts

    def close(self) -> None:
        for actor in {actor for actor, _ in self._in_hand.values()} | self._began:
            ray.kill(actor)

    def _hire(self) -> None:
        actor, begun = self._new_actor()
        self._in_hand[begun] = (actor, None)

    def _hand_out(self, actor: ray.actor.ActorHandle) -> None:
        held = sum(other is actor for other, _ in self._in_hand.values())
        for _ in range(min(IN_HAND - held, len(self._queue))):
            piece = self._queue.pop()
            self._in_hand[actor.grade.remote(piece)] = (actor, piece)

    def _lose(self, actor: ray.actor.ActorHandle, error: Exception) -> None:
        """Give back what a dead actor had in hand, and hire another."""
        held = [(ref, piece) for ref, (other, piece) in self._in_hand.items() if other is actor]
        for ref, _ in held:
            del self._in_hand[ref]
        ray.kill(actor)  # one that is only unreachable must not work on
        oldest = held[0][1]
        self._deaths[oldest] += 1
        if self._deaths[oldest] >= (self._loading_deaths if oldest is None else DEATHS_PER_PIECE):
            doing = "loading the model" if oldest is None else f"the same questions of {oldest.task}"
            raise UserError(
                f"{self._deaths[oldest]} workers died over {doing} ({str(error).strip().splitlines()[-1].strip()}); "
                "if they ran out of memory, give fewer --eval-workers"
            ) from error
        self._queue += [piece for _, piece in reversed(held) if piece is not None]
        if actor in self._began:
            self._began.remove(actor)
            self._tell(len(self._began))
        for other in list(self._began):  # who had nothing left to do
            self._hand_out(other)
        self._hire()
