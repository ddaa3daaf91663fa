"""How sure one can be of an accuracy, and of the difference between two models that answered the same questions.

Intervals are percentile bootstrap intervals (Efron 1979): the answers are drawn again with replacement, many times, and
the middle 95 % of the figures so found is the interval. It tells how much the figure would change with other questions
of the same kind; it does not tell how much it would change with another seed of training.

Drawing n right-or-wrong answers with replacement and counting the right ones is a binomial draw with n and the share
that was right, and drawing n pairs of answers is a multinomial one. So that is what is done: the distribution is the
same, exactly, and it costs one number per resample where indices would cost n.

Everything is decided by the seed, a task's name and its answers: neither the order of tasks nor which others there are
changes a task's interval.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass

import numpy as np

RESAMPLES = 10_000  # with other seeds the ends of an interval then move by about 1 % of its width (measured)
SEED = 42
_TAIL = 0.025  # on each side of a 95 % interval


@dataclass(frozen=True)
class Interval:
    """A figure and the ends of its 95 % interval."""

    value: float
    low: float
    high: float

    def centred(self, baseline: float) -> "Interval":
        """The same of an accuracy's centred form, which is 0 for guessing and 1 for all right."""
        return Interval(*(centred(figure, baseline) for figure in (self.value, self.low, self.high)))

    def to_dict(self) -> dict[str, float]:
        return asdict(self)


@dataclass(frozen=True)
class Difference(Interval):
    """A figure of one model minus the other's, with the two-sided p value of there being no difference."""

    p: float


def centred(accuracy: float, baseline: float) -> float:
    """(accuracy − baseline) / (1 − baseline); the baseline is what guessing gets, in [0, 1)."""
    return (accuracy - baseline) / (1 - baseline)


def interval(correct: np.ndarray, resamples: int = RESAMPLES, seed: int = SEED, name: str = "") -> Interval:
    """The accuracy of a task with its 95 % interval.

    Where all answers are right, or all wrong, every resample is the same and the bootstrap would claim certainty. There
    the interval is the exact one of Clopper and Pearson (1934) instead: 0 right of n gives [0, 1 − 0.025^(1/n)].

    Args:
        correct: bool [examples], at least one.
        name: of the task; tasks of different names are resampled independently.

    Raises:
        ValueError: there is no example.
    """
    right, examples = _count(correct, name)
    if right in (0, examples):
        reach = 1 - _TAIL ** (1 / examples)
        return Interval(1.0, 1 - reach, 1.0) if right else Interval(0.0, 0.0, reach)
    return _between(right / examples, _accuracies(correct, resamples, seed, name))


def mean_centred(
    tasks: Mapping[str, tuple[np.ndarray, float]], resamples: int = RESAMPLES, seed: int = SEED
) -> Interval:
    """The mean over tasks of centred accuracies with its 95 % interval; every task is resampled for itself.

    Tasks count alike, however many examples they have. The interval is too narrow where tasks share questions (CORE
    has HellaSwag twice), and where many tasks are all right or all wrong: those add nothing to its width.

    Args:
        tasks: by name, (correct bool [examples], baseline in [0, 1)); at least one task.

    Raises:
        ValueError: there is no task, or one without examples; names it.
    """
    if not tasks:
        raise ValueError("there is no task to take the mean of")
    value, draws_R = 0.0, np.zeros(resamples)
    for name in sorted(tasks):  # sums of floats depend on their order
        correct, baseline = tasks[name]
        right, examples = _count(correct, name)
        value += centred(right / examples, baseline)
        draws_R += (_accuracies(correct, resamples, seed, name) - baseline) / (1 - baseline)
    return _between(value / len(tasks), draws_R / len(tasks))


def paired(
    a: np.ndarray, b: np.ndarray, resamples: int = RESAMPLES, seed: int = SEED, name: str = "", baseline: float = 0.0
) -> Difference:
    """Accuracy of `a` minus that of `b`, both centred, on the same examples, which are resampled together.

    What both models have right or both wrong cancels, so this finds differences that two intervals beside each other
    hide (the paired bootstrap: Koehn 2004, "Statistical significance tests for machine translation evaluation").

    p is exact: with no difference, each example that only one of the two got right is equally likely to be either's, so
    flipping the signs of these m examples in all 2^m ways tells how often chance alone gives a difference as large
    (McNemar 1947 in its exact form; Dror et al. 2018, "The hitchhiker's guide to testing statistical significance in
    NLP", recommend both for accuracies).

    Args:
        a, b: bool [examples], aligned: the same index is the same example.

    Raises:
        ValueError: there is no example, or the arrays differ in length.
    """
    only_a, only_b, examples = _discordant(a, b, name)
    draws_R = _differences(a, b, resamples, seed, name) / (1 - baseline)
    found = _between((only_a - only_b) / examples / (1 - baseline), draws_R)
    return Difference(found.value, found.low, found.high, _sign_test(only_a, only_b))


def paired_mean(
    tasks: Mapping[str, tuple[np.ndarray, np.ndarray, float]], resamples: int = RESAMPLES, seed: int = SEED
) -> Difference:
    """The difference of two models in the mean over tasks of centred accuracies; every task is resampled for itself.

    p is that of `paired`, with signs flipped at random `resamples` times, since the tasks' examples weigh differently:
    (1 + how many flips give as much) / (1 + resamples), which is never 0 (Phipson and Smyth 2010).

    Args:
        tasks: by name, (a, b bool [examples], aligned; baseline in [0, 1)); at least one task.

    Raises:
        ValueError: there is no task, one has no examples, or its arrays differ in length; names it.
    """
    if not tasks:
        raise ValueError("there is no task to compare")
    value, draws_R, flipped_R = 0.0, np.zeros(resamples), np.zeros(resamples)
    for name in sorted(tasks):
        a, b, baseline = tasks[name]
        only_a, only_b, examples = _discordant(a, b, name)
        scale = 1 / (1 - baseline) / len(tasks)
        value += (only_a - only_b) / examples * scale
        draws_R += _differences(a, b, resamples, seed, name) * scale
        heads_R = _generator(seed, name, "flip").binomial(only_a + only_b, 0.5, resamples)
        flipped_R += (2 * heads_R - (only_a + only_b)) / examples * scale
    as_large = int(np.count_nonzero(np.abs(flipped_R) >= abs(value) - 1e-12))  # sums of floats that should be equal
    found = _between(value, draws_R)
    return Difference(found.value, found.low, found.high, (1 + as_large) / (1 + resamples))


def _count(correct: np.ndarray, name: str) -> tuple[int, int]:
    """(right ones, examples)."""
    if not len(correct):
        raise ValueError(f"task {name!r} has no examples: there is no accuracy")
    return int(np.count_nonzero(correct)), len(correct)


def _discordant(a: np.ndarray, b: np.ndarray, name: str) -> tuple[int, int, int]:
    """(right only for a, right only for b, examples)."""
    if len(a) != len(b):
        raise ValueError(f"task {name!r} has {len(a)} examples of one model and {len(b)} of the other")
    _count(a, name)
    a, b = np.asarray(a, bool), np.asarray(b, bool)
    return int(np.count_nonzero(a & ~b)), int(np.count_nonzero(b & ~a)), len(a)


def _accuracies(correct: np.ndarray, resamples: int, seed: int, name: str) -> np.ndarray:
    """Accuracies of resampled answers, fp64 [resamples]."""
    right, examples = _count(correct, name)
    return _generator(seed, name).binomial(examples, right / examples, resamples) / examples


def _differences(a: np.ndarray, b: np.ndarray, resamples: int, seed: int, name: str) -> np.ndarray:
    """Differences of accuracy on resampled examples, fp64 [resamples]."""
    only_a, only_b, examples = _discordant(a, b, name)
    shares = np.array([only_a, only_b, examples - only_a - only_b]) / examples
    counts_R3 = _generator(seed, name).multinomial(examples, shares, resamples)
    return (counts_R3[:, 0] - counts_R3[:, 1]) / examples


def _between(value: float, draws_R: np.ndarray) -> Interval:
    low, high = np.quantile(draws_R, (_TAIL, 1 - _TAIL))
    return Interval(value, float(low), float(high))


def _sign_test(only_a: int, only_b: int) -> float:
    """Two-sided probability that fair coins split only_a + only_b as unevenly, in whole numbers until the last step."""
    flips, term, ways = only_a + only_b, 1, 0
    for heads in range(min(only_a, only_b) + 1):
        ways += term
        term = term * (flips - heads) // (heads + 1)
    return min(1.0, 2 * ways / 2**flips)


def _generator(seed: int, name: str, purpose: str = "") -> np.random.Generator:
    return np.random.default_rng([seed, *f"{name}\0{purpose}".encode()])
