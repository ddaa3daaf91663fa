"""A model without weights whose logits are an exact function of all tokens before, so that replies can be compared.

It keeps what it has read in the blocks of its sequences and nowhere else, as a real one keeps keys and values: behind
each position the token and a number that stands for the whole beginning. Whatever is wrong in a batch or a block makes
it raise.
"""

from collections.abc import Iterator, Sequence
from itertools import pairwise
from zlib import crc32

import numpy as np

from nanochat_ray.engine.reply import Piece, Reply
from nanochat_ray.engine.sampler import SamplingParams, logprob_of, penalise, sample
from nanochat_ray.model.ragged import BLOCK, RaggedBatch, WindowGroup
from tests.fakes import ByteTokenizer

TOKENIZER = ByteTokenizer()
VOCAB = TOKENIZER.vocab_size


def _tastes() -> np.ndarray:
    """Replies are short, mostly of few letters and characters of several bytes, and call the calculator often."""
    bias_V = np.full(VOCAB, -2.0)
    bias_V[list("abé日🙂".encode())] = 2.0
    bias_V[list(b"0123+*")] = 1.0
    bias_V[[TOKENIZER.special(name) for name in ("python_start", "python_end")]] = 2.0
    bias_V[TOKENIZER.special("assistant_end")] = 0.5
    return bias_V


TASTES_V = _tastes()


def logits_after(ids: Sequence[int]) -> np.ndarray:
    """(V,) float32: what the model says behind these tokens."""
    return logits_of(chain(ids)[-1])


def chain(ids: Sequence[int], before: int = 0) -> list[int]:
    """Behind each token, a number that stands for it and all tokens before."""
    numbers = []
    for token in ids:
        before = crc32(int(token).to_bytes(4, "little"), before)
        numbers.append(before)
    return numbers


def logits_of(number: int) -> np.ndarray:
    noise_V = np.random.Generator(np.random.Philox(key=number)).standard_normal(VOCAB)
    return (2 * noise_V + TASTES_V).astype(np.float32)


class ExactModel:
    """A `StepModel`. `damaged` maps a token to what happens when it is the last one read: "raise" or "nan"."""

    vocab_size = VOCAB

    def __init__(self, context: int = 160, windows: Sequence[int] = (), damaged: dict[int, str] | None = None) -> None:
        self.context = context
        self.groups = tuple(WindowGroup(window, (layer,)) for layer, window in enumerate([*windows, context]))
        self.damaged = damaged or {}
        self.batches: list[RaggedBatch] = []

    def block_bytes(self, group: int) -> int:
        return 12 * BLOCK

    def allocate(self, blocks: Sequence[int]) -> None:
        self._ids = [np.full((count, BLOCK), -1, dtype=np.int64) for count in blocks]
        self._chain = [np.full((count, BLOCK), -1, dtype=np.int64) for count in blocks]

    def forward(self, batch: RaggedBatch) -> np.ndarray:
        self._check(batch)
        self.batches.append(batch)
        bounds = list(pairwise(batch.starts.tolist()))
        for sequence, (start, end) in enumerate(bounds):
            self._read(batch, sequence, start, end)
        wanted = batch.wanted.tolist()
        rows = [self._logits(batch, sequence, end) for sequence, (_, end) in enumerate(bounds) if end - 1 in wanted]
        return np.array(rows, dtype=np.float32).reshape(len(wanted), VOCAB)

    def _check(self, batch: RaggedBatch) -> None:
        assert all(array.dtype == np.int32 for array in (batch.ids, batch.previous, batch.positions, batch.starts))
        assert all(table.dtype == np.int32 for table in batch.tables)
        assert len(batch.tables) == len(self.groups)
        assert batch.starts[0] == 0
        assert batch.starts[-1] == len(batch.ids) == len(batch.positions) == len(batch.previous)
        assert np.all(np.diff(batch.starts) > 0), "a sequence without tokens"
        assert np.all(np.diff(batch.wanted) > 0)
        assert np.all(batch.positions < self.context)

    def _read(self, batch: RaggedBatch, sequence: int, start: int, end: int) -> None:
        """Store a sequence's tokens after checking that all that they look at is what it was."""
        first, last = int(batch.positions[start]), int(batch.positions[end - 1])
        new = batch.ids[start:end].tolist()
        assert batch.positions[start:end].tolist() == list(range(first, last + 1))
        before = self._seen(self._ids, batch, len(self.groups) - 1, sequence, 0, first)
        assert batch.previous[start:end].tolist() == [*(before[-1:] or [-1]), *new[:-1]]
        numbers = chain([*before, *new])
        for group, window in enumerate(group.window for group in self.groups):
            earliest = max(0, first - window)
            seen = self._seen(self._chain, batch, group, sequence, earliest, first)
            assert seen == numbers[earliest:first], f"group {group} has lost positions of its window"
            for position in range(first, last + 1):
                block = int(batch.tables[group][sequence, position // BLOCK])
                assert block >= 0
                self._ids[group][block, position % BLOCK] = new[position - first]
                self._chain[group][block, position % BLOCK] = numbers[position]

    def _seen(
        self, stored: list[np.ndarray], batch: RaggedBatch, group: int, sequence: int, start: int, end: int
    ) -> list[int]:
        columns = batch.tables[group][sequence, start // BLOCK : -(-end // BLOCK)]
        assert np.all(columns >= 0), "a position inside the window has no block"
        skipped = start // BLOCK * BLOCK
        return stored[group][columns].reshape(-1)[start - skipped : end - skipped].tolist()

    def _logits(self, batch: RaggedBatch, sequence: int, end: int) -> np.ndarray:
        damage = self.damaged.get(int(batch.ids[end - 1]))
        if damage == "raise":
            raise RuntimeError("the model fails here")
        last = int(batch.positions[end - 1])
        logits_V = logits_of(self._seen(self._chain, batch, 0, sequence, last, last + 1)[0])
        return np.full_like(logits_V, np.nan) if damage == "nan" else logits_V


def slow_reply(prompt: Sequence[int], params: SamplingParams, context: int = 160) -> Iterator[Piece]:
    """The reply of `ExactModel`, token by token, without any engine."""
    ids, said = list(prompt), []
    reply = Reply(TOKENIZER, params.stop)
    limit, finish = min(len(prompt) + params.max_tokens, context), None
    while finish is None:
        logprobs = ()
        if reply.forced:
            token = reply.forced[0]
        else:
            given_V = logits_after(ids)
            counts = [{token: tokens.count(token) for token in tokens} for tokens in (ids, said)]
            token = sample(penalise(given_V, params, *counts), params, position=len(ids))
            logprobs = () if params.logprobs is None else (logprob_of(given_V, token, params.logprobs),)
        ids.append(token)
        said.append(token)
        piece = reply.push(token, logprobs)
        if piece.finish is None and len(ids) == limit:
            piece = reply.cut(piece)
        finish = piece.finish
        yield piece
