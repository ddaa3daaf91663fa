"""An exam without a model, in a module of its own so that Ray's workers can import it."""

import os
import signal
import time
from dataclasses import dataclass
from pathlib import Path

from nanochat_ray.errors import UserError
from nanochat_ray.eval.exam import Grade, Piece
from nanochat_ray.eval.question import Verdict


@dataclass(frozen=True)
class Numbers:
    """A task without meaning."""

    name: str
    items: tuple[int, ...]
    cost: float = 1.0
    kind: str = "numbers"
    shots: int = 0
    baseline: float = 0.0

    @property
    def hash(self) -> str:
        return f"{self.name}{len(self.items)}"


@dataclass(frozen=True)
class ScriptedExam:
    """Answers every question with its number.

    folder      where each process notes its id as soon as it is asked something
    seconds     per piece
    deadly      an index at which the process dies, `deaths` times
    unloadable  what `begin` complains about
    """

    tasks: tuple[Numbers, ...]
    folder: str
    seconds: float = 0.0
    deadly: int | None = None
    deaths: int = 0
    unloadable: str = ""

    def begin(self) -> Grade:
        if self.unloadable:
            raise UserError(self.unloadable)

        def grade(piece: Piece) -> list[Verdict]:
            Path(self.folder, f"{os.getpid()}.pid").touch()
            died = list(Path(self.folder).glob("death_*"))
            if self.deadly in piece.indices and len(died) < self.deaths:
                Path(self.folder, f"death_{len(died)}").touch()
                os.kill(os.getpid(), signal.SIGKILL)
            time.sleep(self.seconds)
            return [Verdict(piece.task, index, "", str(os.getpid()), (), True) for index in piece.indices]

        return grade
