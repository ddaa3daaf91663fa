"""Multiple-choice questions as chats: MMLU and ARC. The answer is one letter.

Hendrycks et al., "Measuring Massive Multitask Language Understanding", 2021; Clark et al., "Think you have Solved
Question Answering? Try ARC", 2018.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from string import ascii_uppercase

from nanochat_ray.errors import UserError
from nanochat_ray.storage import Folder
from nanochat_ray.tasks.conversations import Conversation, exchange
from nanochat_ray.tasks.public_sets import PublicSet, read_split

MMLU = PublicSet("cais/mmlu", "all", "mmlu/all", ("question", "choices", "answer"))
ARC_EASY = PublicSet("allenai/ai2_arc", "ARC-Easy", "arc/ARC-Easy", ("question", "choices", "answerKey"))
ARC_CHALLENGE = PublicSet("allenai/ai2_arc", "ARC-Challenge", "arc/ARC-Challenge", ("question", "choices", "answerKey"))


@dataclass(frozen=True)
class MultipleChoice:
    """One question; `answer` is the index of the right choice."""

    question: str
    choices: tuple[str, ...]
    answer: int

    @property
    def letters(self) -> str:
        """The names of the choices: A, B, C … whatever the set calls them."""
        return ascii_uppercase[: len(self.choices)]

    def render(self) -> str:
        """The user's message, worded as the public nanochat words it, so that its chat models understand it too.

        The one wording for training and for evaluation. Each letter stands right after its choice, so that answering is
        looking up what follows.
        """
        lines = [f"- {choice}={letter}" for choice, letter in zip(self.choices, self.letters, strict=True)]
        return "\n".join(
            [
                f"Multiple Choice question: {self.question}",
                *lines,
                "",
                "Respond only with the letter of the correct answer.",
            ]
        )

    def conversation(self) -> Conversation:
        return exchange(self.render(), self.letters[self.answer])


def read_mmlu(split: str, tasks: Folder | None) -> list[MultipleChoice]:
    """MMLU's `auxiliary_train`, `dev`, `validation` or `test`; the answer column is the index of the right choice.

    Raises:
        UserError: the split cannot be read, or an answer is not one of the choices.
    """
    return [
        _checked(where, row["question"], row["choices"], row["answer"]) for where, row in read_split(MMLU, split, tasks)
    ]


def read_arc(public_set: PublicSet, split: str, tasks: Folder | None) -> list[MultipleChoice]:
    """`train`, `validation` or `test` of ARC_EASY or ARC_CHALLENGE; the answer column is the label of the right choice.

    Raises:
        UserError: the split cannot be read, or an answer is not one of the labels.
    """
    questions = []
    for where, row in read_split(public_set, split, tasks):
        texts, labels = row["choices"]["text"], row["choices"]["label"]
        if row["answerKey"] not in labels:
            raise UserError(f"{where}: the answer {row['answerKey']!r} is not one of the labels {labels}")
        questions.append(_checked(where, row["question"], texts, labels.index(row["answerKey"])))
    return questions


def load_mmlu(split: str, tasks: Folder | None) -> list[Conversation]:
    """As `read_mmlu`, as chats."""
    return [question.conversation() for question in read_mmlu(split, tasks)]


def load_arc(public_set: PublicSet, split: str, tasks: Folder | None) -> list[Conversation]:
    """As `read_arc`, as chats."""
    return [question.conversation() for question in read_arc(public_set, split, tasks)]


def _checked(where: str, question: str, choices: Sequence[str], answer: int) -> MultipleChoice:
    if not 0 <= answer < len(choices) <= len(ascii_uppercase):
        raise UserError(f"{where}: the answer {answer} is not one of the {len(choices)} choices")
    return MultipleChoice(question, tuple(choices), answer)
