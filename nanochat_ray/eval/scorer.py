"""Scores the ends of many questions at once with a model of ours: nothing is padded, nothing shared is computed twice.

The sequences of a question mostly begin alike: ten solved examples and the question itself, then one of four answers.
What they share is read once, and its blocks of keys and values stand in the tables of all. Logits are asked for only
where a scored token comes next, and the last token of a sequence, after which nothing is scored, is not read at all: a
choice of one letter costs one row of logits.

On a CPU with the fused step the scores are those of each question by itself, to the last bit; see `model/ragged.py`.
Not run on a GPU.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from nanochat_ray.eval.question import EndScore, Question
from nanochat_ray.eval.reading import Reading, readings_of, shared_prefix
from nanochat_ray.model.ragged import BLOCK, RaggedBatch, StepModel

CPU_BATCH_TOKENS, GPU_BATCH_TOKENS = 1024, 16384
LOGITS_BYTES = 2**27  # of a batch, in fp32


def batch_tokens(device: str) -> int:
    """How many tokens a batch should have there: enough for the matrix units, and no more memory than that."""
    return CPU_BATCH_TOKENS if device == "cpu" else GPU_BATCH_TOKENS


@dataclass(frozen=True)
class _Plan:
    """How a question is computed.

    shared   positions that all readings begin with, in whole blocks, before any logits are wanted
    """

    question: Question
    readings: tuple[Reading, ...]
    shared: int

    @property
    def tokens(self) -> int:
        return self.shared + sum(len(reading.ids) - self.shared for reading in self.readings)

    @property
    def rows(self) -> int:
        return sum(reading.rows for reading in self.readings)

    @property
    def blocks(self) -> int:
        tails = sum(_blocks(len(reading.ids) - self.shared) for reading in self.readings)
        return self.shared // BLOCK + tails


class StepScorer:
    """A model and room for the questions of one batch. Takes the model's blocks for itself: not beside an engine.

    Args:
        batch_tokens: tokens of a batch, unless a single question has more.
    """

    def __init__(self, model: StepModel, batch_tokens: int = CPU_BATCH_TOKENS) -> None:
        self.limit: int | None = model.context
        self._model = model
        self._batch_tokens = batch_tokens
        self._batch_rows = max(1, LOGITS_BYTES // 4 // model.vocab_size)
        self._blocks = 0

    def score(self, questions: Sequence[Question]) -> Iterator[tuple[Question, list[EndScore]]]:
        """Each question with the scores of its sequences' ends, in order."""
        batch: list[_Plan] = []
        tokens = rows = 0
        for plan in map(_plan, questions):
            tokens, rows = tokens + plan.tokens, rows + plan.rows
            if batch and (tokens > self._batch_tokens or rows > self._batch_rows):
                yield from self._scores(batch)
                batch, tokens, rows = [], plan.tokens, plan.rows
            batch.append(plan)
        if batch:
            yield from self._scores(batch)

    def _scores(self, plans: list[_Plan]) -> Iterator[tuple[Question, list[EndScore]]]:
        logits_RV = self._logits(plans)
        row_of: list[int] = []
        targets: list[int] = []
        spans = []
        row = 0
        for plan in plans:
            ends: dict[int, slice] = {}
            for reading in plan.readings:
                count = reading.rows
                for member in reading.members:
                    ends[member] = slice(len(targets), len(targets) + count)
                    row_of += range(row, row + count)
                    targets += plan.question.sequences[member][reading.first + 1 :]
                row += count
            spans.append(ends)
        nats_E, likeliest_R = _losses(logits_RV, row_of, targets, any(plan.question.gold is None for plan in plans))
        rows_E = np.array(row_of)
        for plan, ends in zip(plans, spans, strict=True):
            found = [EndScore(nats_E[ends[member]], likeliest_R[rows_E[ends[member]]]) for member in sorted(ends)]
            yield plan.question, found

    def _logits(self, plans: list[_Plan]) -> np.ndarray:
        """fp32 (R, V): after each wanted position, by question, reading and position."""
        needed = sum(plan.blocks for plan in plans)
        if needed > self._blocks:
            self._blocks = max(needed, self._batch_tokens // BLOCK)
            self._model.allocate([self._blocks] * len(self._model.groups))
        shared: list[_Part] = []
        tails: list[_Part] = []
        free = 0
        for plan in plans:
            prefix = list(range(free, free + plan.shared // BLOCK))
            free += len(prefix)
            if plan.shared:
                shared.append(_Part(plan.readings[0].ids[: plan.shared], 0, plan.shared, prefix))
            for reading in plan.readings:
                own = range(free, free + _blocks(len(reading.ids) - plan.shared))
                free += len(own)
                tails.append(_Part(reading.ids, plan.shared, reading.first, [*prefix, *own]))
        if shared:
            self._model.forward(_batch(shared, len(self._model.groups)))
        return self._model.forward(_batch(tails, len(self._model.groups)))


@dataclass(frozen=True)
class _Part:
    """A sequence's part in a step: ids[begin:] are read, and logits wanted after positions `first` and on."""

    ids: Sequence[int]
    begin: int
    first: int
    blocks: list[int]


def _plan(question: Question) -> _Plan:
    readings = readings_of(question)
    return _Plan(question, readings, shared_prefix(readings) // BLOCK * BLOCK)


def _blocks(positions: int) -> int:
    return -(-positions // BLOCK)


def _batch(parts: Sequence[_Part], groups: int) -> RaggedBatch:
    lengths = [len(part.ids) - part.begin for part in parts]
    starts = np.concatenate(([0], np.cumsum(lengths)))
    table = np.full((len(parts), max(len(part.blocks) for part in parts)), -1, np.int32)
    previous: list[int] = []
    positions: list[int] = []
    wanted: list[int] = []
    for row, part, start in zip(table, parts, starts, strict=False):
        row[: len(part.blocks)] = part.blocks
        previous += [part.ids[part.begin - 1] if part.begin else -1, *part.ids[part.begin : -1]]
        positions += range(part.begin, len(part.ids))
        wanted += range(start + part.first - part.begin, start + len(part.ids) - part.begin)
    ids = [token for part in parts for token in part.ids[part.begin :]]
    flat = [np.array(values, np.int32) for values in (ids, previous, positions, starts, wanted)]
    return RaggedBatch(flat[0], flat[1], flat[2], flat[3], (table,) * groups, flat[4])


def _losses(
    logits_RV: np.ndarray, rows: list[int], targets: list[int], likeliest: bool
) -> tuple[np.ndarray, np.ndarray]:
    """Losses (E,) of targets given rows of logits, and the likeliest token (R,) of each row, or zeros if not wanted.

    The logits are soft-capped, so the exponentials need no shift; they overwrite the logits.
    """
    logits = torch.from_numpy(logits_RV)
    chosen_R = logits.argmax(dim=-1).numpy() if likeliest else np.zeros(len(logits), np.int64)
    picked_E = logits[rows, targets]
    norm_R = logits.exp_().sum(dim=-1).log_()
    return (norm_R[rows] - picked_E).numpy(), chosen_R
