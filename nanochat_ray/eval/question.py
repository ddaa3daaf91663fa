"""A question as tokens, and how the model's probabilities become an answer. Pure; no torch.

Whatever the task, it comes down to this: some sequences, each with a scored end. With several of them the likeliest
end is the answer; with one, the answer is right when each token of the end is the one the model would have written.
"""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Question:
    """One question.

    index         its place in the shuffled task
    sequences     token ids; the scored tokens of sequence i are sequences[i][starts[i]:], at least one
    gold          which sequence is right; None when there is one, to be met token by token
    prompt_hash   16 hex digits of what is asked, as text: equal between models with other tokenizers
    cut           whether it lost its beginning, because it was longer than the model reads
    """

    task: str
    index: int
    sequences: tuple[tuple[int, ...], ...]
    starts: tuple[int, ...]
    gold: int | None
    prompt_hash: str
    cut: bool = False

    @property
    def tokens(self) -> int:
        """How many a model reads that computes every sequence by itself."""
        return sum(map(len, self.sequences))


@dataclass(frozen=True)
class EndScore:
    """What a model makes of one scored end.

    nats        (scored tokens,) float32: the loss of each token
    likeliest   (scored tokens,) int: what the model would have written instead
    """

    nats: np.ndarray
    likeliest: np.ndarray

    @property
    def mean_nats(self) -> float:
        return float(self.nats.mean(dtype=np.float64))


@dataclass(frozen=True)
class Verdict:
    """What came of a question; a row of the results.

    prediction   the chosen sequence's number, or what was written instead of a scored end, or the answer in a reply
    scores       mean loss of each sequence's end, in nats; empty for replies
    text         the whole reply, where one was written
    tool_calls   in that reply
    detail       how the program in that reply ended
    walls        that stood around it; see `sandbox_walls.WALLS`
    cut          as `Question.cut`
    """

    task: str
    index: int
    prompt_hash: str
    prediction: str
    scores: tuple[float, ...]
    correct: bool
    text: str = ""
    tool_calls: int = 0
    detail: str = ""
    walls: tuple[str, ...] = ()
    cut: bool = False


def as_question(
    task: str,
    index: int,
    texts: Sequence[str],
    sequences: Sequence[Sequence[int]],
    starts: Sequence[int],
    gold: int | None,
    limit: int | None,
) -> Question:
    """Cut what is too long at its beginning, and keep at least one token scored and one before it.

    The public evaluator divides by zero when a choice is the beginning of another, and refuses to cut into what is
    scored; here its last token is scored, or as much as fits.
    """
    kept, begins = [], []
    for sequence, start in zip(sequences, starts, strict=True):
        lost = max(0, len(sequence) - limit) if limit else 0
        kept.append(tuple(sequence[lost:]))
        begins.append(min(max(start - lost, 1), len(kept[-1]) - 1))
    cut = any(len(short) < len(whole) for short, whole in zip(kept, sequences, strict=True))
    return Question(task, index, tuple(kept), tuple(begins), gold, prompt_hash(texts), cut)


def prompt_hash(texts: Sequence[str]) -> str:
    return hashlib.sha256("\0".join(texts).encode(errors="surrogatepass")).hexdigest()[:16]


def judge(question: Question, ends: Sequence[EndScore], decode: Callable[[list[int]], str]) -> Verdict:
    """The answer that the scores of a question's ends amount to.

    Args:
        decode: token ids → text, for what the model would have written.
    """
    scores = tuple(end.mean_nats for end in ends)
    if question.gold is None:
        expected = np.array(question.sequences[0][question.starts[0] :])
        prediction = decode(ends[0].likeliest.tolist())
        correct = bool(np.array_equal(ends[0].likeliest, expected))
    else:
        best = min(range(len(scores)), key=scores.__getitem__)
        prediction, correct = str(best), best == question.gold
    return Verdict(question.task, question.index, question.prompt_hash, prediction, scores, correct, cut=question.cut)


def common_prefix(sequences: Sequence[Sequence[int]]) -> int:
    """How many tokens all sequences begin with."""
    shortest = min(map(len, sequences))
    for place in range(shortest):
        if len({sequence[place] for sequence in sequences}) > 1:
            return place
    return shortest


def common_suffix(sequences: Sequence[Sequence[int]]) -> int:
    """How many tokens all sequences end with."""
    return common_prefix([sequence[::-1] for sequence in sequences])
