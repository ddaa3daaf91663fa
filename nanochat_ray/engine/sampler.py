"""Chooses the next token. Pure: the choice depends on the logits, the parameters and (seed, position), nothing else.

There is no generator that advances from call to call. The one random number a position needs is the first output of
the counter-based generator Philox keyed by (seed, position), so that a reply can be continued on another machine, in
another batch, or from its middle, with the same tokens.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from nanochat_ray.errors import UserError

MAX_STOPS = 4
MAX_STOP_CHARS = 64
MAX_LOGPROBS = 20
GROUP = 64  # tokens whose maximum stands for them when the k likeliest are sought
_MASK_64 = (1 << 64) - 1


@dataclass(frozen=True)
class SamplingParams:
    """How a reply is sampled and where it ends.

    temperature   0 is greedy; 1 is the model's own distribution
    top_k         keep the k most likely tokens; None keeps all
    top_p         of those, keep the fewest that hold this much probability
    min_p         of those, drop what is less likely than this fraction of the likeliest
    repetition_penalty   divides the positive logits of all tokens before and multiplies the negative ones
                         (arXiv:1909.05858); 1 changes nothing
    presence_penalty     taken from the logits of tokens that the reply has already, as OpenAI's
    frequency_penalty    the same, times how often it has them
    seed          any 64-bit integer
    max_tokens    upper bound on the reply's tokens, tool calls and their results included
    stop          the reply ends before the first of these strings
    logprobs      None, or how many of the likeliest tokens are reported beside each sampled one

    Raises:
        UserError: naming the parameter, its value and its range.
    """

    temperature: float = 0.8
    top_k: int | None = 50
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    seed: int = 0
    max_tokens: int = 256
    stop: tuple[str, ...] = ()
    logprobs: int | None = None

    def __post_init__(self) -> None:
        # `not (a <= x <= b)` rather than `x < a or x > b`: NaN fails every comparison.
        if not 0.0 <= self.temperature <= 10.0:
            raise UserError(f"temperature is {self.temperature}; it must be between 0 (greedy) and 10")
        if self.top_k is not None and self.top_k < 1:
            raise UserError(f"top_k is {self.top_k}; it must be 1 or more")
        if not 0.0 < self.top_p <= 1.0:
            raise UserError(f"top_p is {self.top_p}; it must be above 0 and at most 1")
        if not 0.0 <= self.min_p <= 1.0:
            raise UserError(f"min_p is {self.min_p}; it must be between 0 and 1")
        if not 0.1 <= self.repetition_penalty <= 10.0:
            raise UserError(f"repetition_penalty is {self.repetition_penalty}; it must be between 0.1 and 10")
        for name in ("presence_penalty", "frequency_penalty"):
            if not -2.0 <= getattr(self, name) <= 2.0:
                raise UserError(f"{name} is {getattr(self, name)}; it must be between -2 and 2")
        if not -(1 << 63) <= self.seed < 1 << 63:
            raise UserError(f"seed is {self.seed}; it must fit in 64 bits")
        if self.max_tokens < 1:
            raise UserError(f"max_tokens is {self.max_tokens}; it must be 1 or more")
        if len(self.stop) > MAX_STOPS:
            raise UserError(f"stop has {len(self.stop)} strings; at most {MAX_STOPS} are allowed")
        for text in self.stop:
            if not 1 <= len(text) <= MAX_STOP_CHARS:
                raise UserError(f"a stop string has {len(text)} characters; 1 to {MAX_STOP_CHARS} are allowed")
        if self.logprobs is not None and not 0 <= self.logprobs <= MAX_LOGPROBS:
            raise UserError(f"logprobs is {self.logprobs}; it must be between 0 and {MAX_LOGPROBS}")

    @property
    def penalised(self) -> bool:
        """Whether the choice of a token depends on which ones were there before."""
        return (self.repetition_penalty, self.presence_penalty, self.frequency_penalty) != (1.0, 0.0, 0.0)


@dataclass(frozen=True)
class TokenLogprob:
    """Natural logarithms of the model's own probabilities: of a sampled token, and of the likeliest, best first."""

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


def sample(logits_V: Any, params: SamplingParams, position: int) -> int:
    """The token id at `position` (its index in the whole sequence, prompt included).

    Args:
        logits_V: float array-like of one position's logits; −inf excludes a token.

    Raises:
        UserError: the logits are NaN, all −inf or +inf, which a healthy checkpoint never gives.
    """
    z_V = np.asarray(logits_V)
    best = int(np.argmax(z_V))  # the first NaN, if there is one; ties go to the lowest id
    if not math.isfinite(z_V[best]):
        raise UserError(f"the model's logits at position {position} are not finite; its checkpoint is damaged")
    if params.temperature == 0.0:
        return best
    ids = _top_k(z_V, params.top_k)
    p = np.exp((z_V[ids].astype(np.float64) - float(z_V[best])) / params.temperature)
    if params.top_p < 1.0:
        ids, p = _top_p(ids, p, params.top_p)
    if params.min_p > 0.0:
        ids, p = ids[p >= params.min_p], p[p >= params.min_p]  # the likeliest has p = 1
    cumulative = np.cumsum(p)
    # Clamped because u * total may round up to the total.
    chosen = np.searchsorted(cumulative, uniform(params.seed, position) * cumulative[-1], side="right")
    return int(ids[min(int(chosen), _last_positive(p))])


def penalise(logits_V: np.ndarray, params: SamplingParams, before: Mapping[int, int], said: Mapping[int, int]) -> Any:
    """Logits after the penalties, in float64.

    Args:
        before: how often each token stands in the whole sequence, prompt included.
        said: how often each token stands in the reply.
    """
    z_V = np.array(logits_V, dtype=np.float64)
    if before and params.repetition_penalty != 1.0:
        ids = np.fromiter(before, dtype=np.int64)
        z_V[ids] = np.where(z_V[ids] > 0, z_V[ids] / params.repetition_penalty, z_V[ids] * params.repetition_penalty)
    if said:
        ids, counts = np.fromiter(said, dtype=np.int64), np.fromiter(said.values(), dtype=np.float64)
        z_V[ids] -= params.presence_penalty + params.frequency_penalty * counts
    return z_V


def logprob_of(logits_V: np.ndarray, token: int, top: int) -> TokenLogprob:
    """The log-probability of a token at temperature 1 without penalties, and those of the `top` likeliest."""
    z_V = np.asarray(logits_V, dtype=np.float64)
    best = _top_k(z_V, top) if top else np.empty(0, dtype=np.int64)
    best = best[np.argsort(-z_V[best], kind="stable")]
    log_total = np.log(np.sum(np.exp(z_V - z_V.max()))) + z_V.max()
    return TokenLogprob(token, float(z_V[token] - log_total), tuple((int(i), float(z_V[i] - log_total)) for i in best))


def uniform(seed: int, position: int) -> float:
    """The number in [0, 1) that belongs to (seed, position): 53 bits of Philox keyed by the pair."""
    key = np.array([seed & _MASK_64, position & _MASK_64], dtype=np.uint64)
    return (int(np.random.Philox(key=key).random_raw()) >> 11) * 2.0**-53


def _top_k(z_V: np.ndarray, k: int | None) -> np.ndarray:
    """Ids of the k largest logits, ascending; among equal logits the lower ids."""
    if k is None or k >= z_V.size:
        return np.arange(z_V.size)
    ids = np.flatnonzero(z_V >= _below_kth_largest(z_V, k))
    z = z_V[ids]
    threshold = np.partition(z, z.size - k)[z.size - k]
    above, level = ids[z > threshold], ids[z == threshold]
    return np.sort(np.concatenate([above, level[: k - above.size]]))


def _below_kth_largest(z_V: np.ndarray, k: int) -> float:
    """A lower bound of the k-th largest that few tokens reach: the k-th largest of the maxima of groups of tokens.

    To partition a whole vocabulary takes ten times as long.
    """
    groups = z_V.size // GROUP
    if groups < k:
        return -math.inf
    maxima = z_V[: groups * GROUP].reshape(GROUP, groups).max(axis=0)
    return float(np.partition(maxima, groups - k)[groups - k])


def _top_p(ids: np.ndarray, p: np.ndarray, top_p: float) -> tuple[np.ndarray, np.ndarray]:
    """The smallest set of likeliest tokens whose share of the probability reaches top_p; never empty."""
    order = np.argsort(-p, kind="stable")
    before = np.cumsum(p[order]) - p[order]  # what the likelier ones already hold
    kept = np.sort(order[before < top_p * p.sum()])
    return ids[kept], p[kept]


def _last_positive(p: np.ndarray) -> int:
    return int(np.flatnonzero(p)[-1])
