"""One unit → its rows, and the global row sequence; no Ray here.

A row is int32 [T+1]. A token that is input only, never a target (prompts, tool outputs, padding), is stored as its
complement `~id`, which is negative; so one array carries tokens and loss mask. `to_inputs_and_targets` undoes it.
"""

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice, takewhile
from typing import NamedTuple, Protocol

import numpy as np

from nanochat_ray.chat import render
from nanochat_ray.data.corpus import Unit, read_unit
from nanochat_ray.errors import UserError
from nanochat_ray.stream.chat_packing import pack_chats
from nanochat_ray.stream.cursor import RowId
from nanochat_ray.stream.order import epoch_order, row_order
from nanochat_ray.stream.packing import pack, passages
from nanochat_ray.tasks.mixture import read_conversations
from nanochat_ray.tokenizer import Tokenizer

IGNORED_TARGET = -1
MAX_COUNTED_UNITS = 64
NO_ROWS = "the corpus is too small: not one of its units fills a training row; give more text or a smaller preset"


class UnitRows(NamedTuple):
    """The rows of a unit, and what packing them cost.

    tokens_NT: int32 [N, T+1], complemented where not a target.
    cropped_N: int32 [N]; tokens cut off at each row.
    padding_N: int32 [N]; positions at each row's end that hold nothing.
    """

    tokens_NT: np.ndarray
    cropped_N: np.ndarray
    padding_N: np.ndarray


class RowSource(Protocol):
    """How a unit becomes rows: a pure function, picklable, the same on every machine."""

    def rows(self, unit: Unit) -> UnitRows: ...


@dataclass(frozen=True)
class PretrainingRows:
    """Documents in passages of at most a row, each behind a BOS, packed without padding; every token is a target."""

    tokenizer: Tokenizer
    sequence_len: int

    def rows(self, unit: Unit) -> UnitRows:
        encoded = self.tokenizer.encode_batch(read_unit(unit))
        pieces = [piece for ids in encoded for piece in passages(ids, self.tokenizer.bos, self.sequence_len)]
        packed = pack(pieces, self.sequence_len)
        return UnitRows(packed.tokens_NT, packed.cropped_N, np.zeros_like(packed.cropped_N))


@dataclass(frozen=True)
class ChatRows:
    """Conversations, packed whole, padded; only what the assistant says is a target."""

    tokenizer: Tokenizer
    sequence_len: int

    def rows(self, unit: Unit) -> UnitRows:
        rendered = [render(self.tokenizer, conversation) for conversation in read_conversations(unit)]
        packed = pack_chats(rendered, self.sequence_len, pad_id=self.tokenizer.bos)
        tokens_NT = np.where(packed.mask_NT == 1, packed.tokens_NT, ~packed.tokens_NT)
        return UnitRows(tokens_NT, packed.cropped_N, packed.padding_N)


@dataclass(frozen=True)
class MicroBatch:
    """m consecutive rows.

    row_ids_M3: int64 [m, 3], the RowId of each.
    tokens_MT: int32 [m, T+1], complemented where not a target.
    cropped_M, padding_M: int32 [m]; see UnitRows.
    """

    row_ids_M3: np.ndarray
    tokens_MT: np.ndarray
    cropped_M: np.ndarray
    padding_M: np.ndarray

    @staticmethod
    def from_columns(columns: dict[str, np.ndarray]) -> "MicroBatch":
        """Of rows as `visit_rows` gives them."""
        return MicroBatch(columns["row_id"], columns["tokens"], columns["cropped"], columns["padding"])

    @property
    def first_row(self) -> RowId:
        return RowId(*map(int, self.row_ids_M3[0]))

    @property
    def last_row(self) -> RowId:
        return RowId(*map(int, self.row_ids_M3[-1]))

    def is_in_order(self) -> bool:
        """Whether each row is the next one of its unit, or the first of a later unit."""
        before, after = self.row_ids_M3[:-1], self.row_ids_M3[1:]
        epochs, positions, rows = (after - before).T
        same_unit = (epochs == 0) & (positions == 0)
        later_unit = (epochs > 0) | ((epochs == 0) & (positions > 0))
        return bool(np.all((same_unit & (rows == 1)) | (later_unit & (after[:, 2] == 0))))

    def digest(self) -> int:
        """Signed 64-bit hash of ids and tokens."""
        hasher = hashlib.blake2b(digest_size=8)
        hasher.update(self.row_ids_M3.astype("<i8").tobytes())
        hasher.update(self.tokens_MT.astype("<i4").tobytes())
        return int.from_bytes(hasher.digest(), "little", signed=True)


def to_inputs_and_targets(tokens_MT: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Rows → int64 inputs [m, T] and targets [m, T], where IGNORED_TARGET is not to be predicted."""
    tokens_MT = tokens_MT.astype(np.int64)
    is_target = tokens_MT >= 0
    inputs_MT = np.where(is_target, tokens_MT, ~tokens_MT)[:, :-1]
    targets_MT = np.where(is_target, tokens_MT, IGNORED_TARGET)[:, 1:]
    return inputs_MT, targets_MT


def stream_hash(digests: Iterable[int]) -> str:
    """The hash of a step, from the digests of its micro-batches in order; independent of who computed them."""
    hasher = hashlib.blake2b(digest_size=8)
    for digest in digests:
        hasher.update(digest.to_bytes(8, "little", signed=True))
    return hasher.hexdigest()


class Visit(NamedTuple):
    """One reading of a unit: the `position`-th of `epoch`, from row `skip` on. `unit` is its index in the corpus."""

    epoch: int
    position: int
    unit: int
    skip: int


def visits_from(units: int, start: RowId, seed: int) -> Iterator[Visit]:
    """The unit visits from `start` on, without end."""
    epoch, position, skip = start.epoch, start.position, start.row
    while True:
        order = epoch_order(units, epoch, seed)
        for place in range(position, units):
            yield Visit(epoch, place, int(order[place]), skip)
            skip = 0
        epoch, position = epoch + 1, 0


def visit_rows(source: RowSource, unit: Unit, visit: Visit, seed: int) -> dict[str, np.ndarray]:
    """The rows of a visit as columns `row_id` int64 [N, 3], `tokens` int32 [N, T+1], `cropped`, `padding` int32 [N]."""
    rows = source.rows(unit)
    order = row_order(len(rows.tokens_NT), visit.epoch, visit.unit, seed)[visit.skip :]
    row_ids = np.empty((len(order), 3), dtype=np.int64)
    row_ids[:, 0], row_ids[:, 1] = visit.epoch, visit.position
    row_ids[:, 2] = np.arange(visit.skip, visit.skip + len(order))
    tokens_NT, cropped_N, padding_N = (column[order] for column in rows)
    return {"row_id": row_ids, "tokens": tokens_NT, "cropped": cropped_N, "padding": padding_N}


def micro_batches(
    source: RowSource, units: Sequence[Unit], micro_batch_rows: int, start: RowId, seed: int
) -> Iterator[MicroBatch]:
    """The micro-batches from `start` on, one after the other in this process: what every other reading must equal.

    Raises:
        UserError: a whole epoch holds not one row.
    """
    return _cut(_endless_columns(source, units, start, seed), micro_batch_rows)


def one_epoch(source: RowSource, units: Sequence[Unit], micro_batch_rows: int, seed: int) -> Iterator[MicroBatch]:
    """Each row of the first epoch once, to look at held-out text; the last micro-batch may have fewer rows.

    Raises:
        UserError: the units hold not one row.
    """
    visits = takewhile(lambda visit: visit.epoch == 0, visits_from(len(units), RowId(0, 0, 0), seed))
    columns = (visit_rows(source, units[visit.unit], visit, seed) for visit in visits)
    empty = True
    for micro_batch in _cut(columns, micro_batch_rows):
        empty = False
        yield micro_batch
    if empty:
        raise UserError(f"{units[0].shard} is too small: its held-out text fills not one row; give it more documents")


def _endless_columns(
    source: RowSource, units: Sequence[Unit], start: RowId, seed: int
) -> Iterator[dict[str, np.ndarray]]:
    visits_without_rows = 0
    for visit in visits_from(len(units), start, seed):
        columns = visit_rows(source, units[visit.unit], visit, seed)
        visits_without_rows = 0 if len(columns["tokens"]) else visits_without_rows + 1
        if visits_without_rows > 2 * len(units):  # two epochs' orders may put all the empty units side by side
            raise UserError(NO_ROWS)
        yield columns


def _cut(visited: Iterable[dict[str, np.ndarray]], micro_batch_rows: int) -> Iterator[MicroBatch]:
    """The rows of visits in groups of `micro_batch_rows`, and last what is left."""
    pending: dict[str, np.ndarray] | None = None
    for columns in visited:
        if pending is not None:
            columns = {name: np.concatenate([pending[name], columns[name]]) for name in columns}
        whole = len(columns["tokens"]) // micro_batch_rows * micro_batch_rows
        for begin in range(0, whole, micro_batch_rows):
            rows = slice(begin, begin + micro_batch_rows)
            yield MicroBatch.from_columns({name: column[rows] for name, column in columns.items()})
        pending = {name: column[whole:] for name, column in columns.items()}
    if pending is not None and len(pending["tokens"]):
        yield MicroBatch.from_columns(pending)


class EpochFacts(NamedTuple):
    """What one epoch holds."""

    rows: int
    fill: float  # fraction of the positions that are not padding
    cropped: float  # fraction of the tokens that rows had no room for


def look_at_epoch(source: RowSource, units: Sequence[Unit]) -> EpochFacts:
    """Pack the units: all of them if they are few, an even sample of them if they are many."""
    sampled = units[:: -(-len(units) // MAX_COUNTED_UNITS)]
    rows = positions = cropped = padding = 0
    for unit in sampled:
        packed = source.rows(unit)
        rows, positions = rows + len(packed.tokens_NT), positions + packed.tokens_NT.size
        cropped, padding = cropped + int(packed.cropped_N.sum()), padding + int(packed.padding_N.sum())
    return EpochFacts(
        rows=rows * sum(unit.bytes for unit in units) // sum(unit.bytes for unit in sampled),
        fill=1 - padding / max(positions, 1),
        cropped=cropped / max(positions - padding + cropped, 1),
    )


def step_rows(
    source: RowSource, units: Sequence[Unit], micro_batch_rows: int, micro_batches_per_step: int, seed: int, step: int
) -> list[MicroBatch]:
    """The micro-batches of one step of a run that began at step 0; reads the corpus from its start."""
    sequence = micro_batches(source, units, micro_batch_rows, RowId(0, 0, 0), seed)
    begin = step * micro_batches_per_step
    return list(islice(sequence, begin, begin + micro_batches_per_step))
