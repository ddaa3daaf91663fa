"""What has to be read to score a question: each distinct sequence once, without its last token. Pure."""

from dataclasses import dataclass

from nanochat_ray.eval.question import Question, common_prefix


@dataclass(frozen=True)
class Reading:
    """Tokens read once for some sequences of a question: those that differ in their last token only.

    ids       the sequences without their last token, after which nothing is scored
    first     the first position after which logits are wanted; then after all that follow
    members   the sequences' numbers in the question
    """

    ids: tuple[int, ...]
    first: int
    members: tuple[int, ...]

    @property
    def rows(self) -> int:
        """Rows of logits that are wanted."""
        return len(self.ids) - self.first


def readings_of(question: Question) -> tuple[Reading, ...]:
    """The readings of a question, in the order of its sequences."""
    members: dict[tuple[tuple[int, ...], int], list[int]] = {}
    for number, (sequence, start) in enumerate(zip(question.sequences, question.starts, strict=True)):
        members.setdefault((sequence[:-1], start - 1), []).append(number)
    return tuple(Reading(ids, first, tuple(numbers)) for (ids, first), numbers in members.items())


def shared_prefix(readings: tuple[Reading, ...]) -> int:
    """How many tokens all readings begin with and none wants logits after; 0 where there is one, which shares nothing.

    The position after which logits are wanted is left to each reading, even if it is shared.
    """
    if len(readings) == 1:
        return 0
    return min(common_prefix([reading.ids for reading in readings]), *(reading.first for reading in readings))
