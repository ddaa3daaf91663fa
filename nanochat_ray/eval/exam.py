"""An exam: questions in pieces, a grader for them, and the models that sit it. No Ray; `pool.py` spreads one.

exam = CoreExam(RunModel.at(storage, "d12", "base", step=2520, dtype=None), tasks)
grade = exam.begin()                       # loads the model; once per process
for piece in pieces(exam.tasks, 64, done): verdicts = grade(piece)
"""

import hashlib
import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from nanochat_ray.eval.core import CoreTask, core_questions
from nanochat_ray.eval.question import Verdict, judge
from nanochat_ray.storage import Folder, run_folder

# The public evaluator cuts no question for its own models, whose rotary tables are ten contexts long. Behind the first
# context, layers that see all see as many tokens as they did in training.
CONTEXT_TIMES = 10


@dataclass(frozen=True)
class Piece:
    """What is handed out at once: some questions of one task, by their places in it."""

    task: str
    indices: tuple[int, ...]


Grade = Callable[[Piece], list[Verdict]]


class Task(Protocol):
    """What pieces are cut from.

    kind, shots, baseline   for whoever reads the figures; see `summary.TaskResult`
    hash                    64 hex digits: equal when the same questions are asked in the same way
    cost                    about how long one of its questions takes, in any unit
    """

    @property
    def name(self) -> str: ...

    @property
    def kind(self) -> str: ...

    @property
    def shots(self) -> int: ...

    @property
    def baseline(self) -> float: ...

    @property
    def items(self) -> Sequence[Any]: ...

    @property
    def hash(self) -> str: ...

    @property
    def cost(self) -> float: ...


class Exam(Protocol):
    """Plain data that travels to the machine where it is sat."""

    @property
    def tasks(self) -> Sequence[Task]: ...

    def begin(self) -> Grade:
        """Load the model.

        Raises:
            UserError: it cannot be loaded.
        """
        ...


def pieces(tasks: Iterable[Task], size: int, done: set[tuple[str, int]]) -> list[Piece]:
    """All questions that are not done, in pieces of at most `size`; the dearest first, so that no long one is last."""
    found: list[tuple[float, Piece]] = []
    for task in tasks:
        left = [index for index in range(len(task.items)) if (task.name, index) not in done]
        for begin in range(0, len(left), size):
            indices = tuple(left[begin : begin + size])
            found.append((task.cost * len(indices), Piece(task.name, indices)))
    return [piece for _, piece in sorted(found, key=lambda pair: -pair[0])]


@dataclass(frozen=True)
class RunModel:
    """The checkpoint of a step of a run's stage.

    dtype   of the activations, "fp32" or "bf16", or "int8", of the matrices: the same on every machine
    """

    storage: str
    run: str
    stage: str
    step: int
    dtype: str

    @staticmethod
    def at(storage: str, run: str, stage: str, step: int, dtype: str | None) -> "RunModel":
        """With the storage's absolute path, and the dtype that is best here unless one is given.

        The model is loaded by processes that stand in other folders, and may have other hardware.
        """
        return RunModel(str(Folder.at(storage)), run, stage, step, dtype or best_dtype())

    @property
    def digest(self) -> str:
        """sha256 of its weights."""
        from nanochat_ray.train.checkpoint import Checkpoints

        return Checkpoints.of(run_folder(self.storage, self.run) / self.stage).digest(self.step)


def best_dtype() -> str:
    """The name of the dtype that this machine multiplies best."""
    from nanochat_ray.device import DTYPES, pick_device, pick_dtype

    dtype, _ = pick_dtype(pick_device()[0])
    return next(name for name, known in DTYPES.items() if known == dtype)


@dataclass(frozen=True)
class CoreExam:
    """CORE's tasks, shuffled and cut, for a model of a run."""

    model: RunModel
    tasks: Sequence[CoreTask]

    def begin(self) -> Grade:
        from nanochat_ray.engine.load import load_step_model
        from nanochat_ray.eval.scorer import StepScorer, batch_tokens

        model = self.model
        step_model, tokenizer, device = load_step_model(
            model.storage, model.run, model.stage, model.step, model.dtype, CONTEXT_TIMES
        )
        return core_grader(self.tasks, tokenizer, StepScorer(step_model, batch_tokens(device)))


def core_grader(tasks: Sequence[CoreTask], tokenizer: Any, scorer: Any) -> Grade:
    """Grades with any scorer of `Question`s; the longest questions first, for those that pad."""
    by_name = {task.name: task for task in tasks}

    def grade(piece: Piece) -> list[Verdict]:
        questions = core_questions(by_name[piece.task], piece.indices, tokenizer, scorer.limit)
        by_length = sorted(questions, key=lambda question: -question.tokens)
        return [judge(question, ends, tokenizer.decode) for question, ends in scorer.score(by_length)]

    return grade


def identity(name: str, model_digest: str, dtype: str, tasks: Sequence[Task]) -> str:
    """32 hex digits: equal when the same model is asked the same questions in the same way."""
    facts = [name, model_digest, dtype, [[task.name, task.hash] for task in tasks]]
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:32]
