"""The finetuning mixture: named, weighted sources, shuffled together and stored as units for the stream.

<folder>/{train,test}/shard_00000.parquet    columns `messages` (JSON) and `source`; one unit = one row group
<folder>/mixture.json                        units, counts and fingerprint; written last
"""

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, islice
from typing import NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from nanochat_ray.data.corpus import Corpus, Unit
from nanochat_ray.errors import UsageError, UserError
from nanochat_ray.storage import Folder
from nanochat_ray.tasks.conversations import Conversation, generator
from nanochat_ray.tasks.public_sets import rows_of_parquet

UNITS_PER_SHARD = 32
UNIT_BYTES = 2**19  # some 60 rows of 2048 tokens; a tenth of a second to read, tokenize and pack
_COLUMNS = ("messages", "source")
_SCHEMA = pa.schema([(column, pa.string()) for column in _COLUMNS])


@dataclass(frozen=True)
class Source:
    """One ingredient.

    weight: how often its training part is seen: 4 is four epochs, 0.5 a random half.
    """

    name: str
    train: Sequence[Conversation]
    test: Sequence[Conversation] = ()
    weight: float = 1.0


class Example(NamedTuple):
    """A conversation and the source it came from."""

    source: str
    messages: Conversation


class Mixture(NamedTuple):
    """Shuffled examples, and per source how many there are: {name: {"train": …, "test": …, "weight": …}}."""

    train: list[Example]
    test: list[Example]
    counts: dict[str, dict[str, float]]


def build_mixture(sources: Sequence[Source], seed: int) -> Mixture:
    """Repeat or thin each source by its weight, and shuffle. A function of its arguments alone.

    Raises:
        UsageError: a negative weight, or nothing to train on.
    """
    train: list[Example] = []
    test: list[Example] = []
    counts: dict[str, dict[str, float]] = {}
    for source in sources:
        taken = _weighted(source, seed)
        train += [Example(source.name, messages) for messages in taken]
        test += [Example(source.name, messages) for messages in source.test]
        counts[source.name] = {"train": len(taken), "test": len(source.test), "weight": source.weight}
    if not train:
        raise UsageError("the finetuning mixture is empty: every source has weight 0 or no conversations")
    generator(seed, "mixture", "train").shuffle(train)
    generator(seed, "mixture", "test").shuffle(test)
    return Mixture(train, test, counts)


def _weighted(source: Source, seed: int) -> list[Conversation]:
    if source.weight < 0:
        raise UsageError(f"the weight of {source.name} is {source.weight}; it must be 0 or more")
    whole = int(source.weight)
    rest = round((source.weight - whole) * len(source.train))
    return list(source.train) * whole + generator(seed, "weight", source.name).sample(list(source.train), rest)


def write_mixture(mixture: Mixture, folder: Folder, unit_bytes: int = UNIT_BYTES, replace: bool = True) -> Corpus:
    """Store a mixture; its test part becomes the corpus' validation units. Nothing is rewritten if it is there already.

    Args:
        unit_bytes: a unit ends with the conversation that makes it as large as this, in bytes of JSON. It is packed
            into rows by itself: small units waste more padding, large ones delay the first row.
        replace: whether another mixture that is stored there may be deleted.

    Raises:
        OSError: the folder cannot be written.
        UserError: another mixture is stored there and may not be replaced.
    """
    fingerprint = _fingerprint(mixture, unit_bytes)
    if folder.exists("mixture.json"):
        stored = open_mixture(folder)
        if stored.fingerprint == fingerprint:
            return stored
        if not replace:
            raise UserError(
                f"{folder} holds the mixture that this run was finetuned on, and another was asked for; "
                "ask for the same one, use another --run, or start anew with --fresh"
            )
        folder.delete()
    corpus = Corpus(
        name="mixture",
        train=tuple(_write_split(mixture.train, folder / "train", unit_bytes)),
        validation=tuple(_write_split(mixture.test, folder / "test", unit_bytes)),
        fingerprint=fingerprint,
    )
    folder.write_json("mixture.json", {"counts": mixture.counts, "corpus": corpus.to_dict()})
    return corpus


def open_mixture(folder: Folder) -> Corpus:
    """The corpus that write_mixture stored.

    Raises:
        UserError: there is none.
    """
    try:
        return Corpus.from_dict(folder.read_json("mixture.json")["corpus"])
    except FileNotFoundError as error:
        raise UserError(f"no finetuning mixture in {folder}; run `python -m jobs.sft` first") from error


def read_conversations(unit: Unit) -> list[Conversation]:
    """The conversations of a unit, in order.

    Raises:
        UserError: the file is missing or damaged.
    """
    return [example.messages for example in read_examples(unit)]


def read_examples(unit: Unit) -> list[Example]:
    """As read_conversations, with their sources."""
    parent, _, name = unit.shard.rpartition("/")
    rows = rows_of_parquet(Folder.at(parent), name, _COLUMNS, row_group=unit.row_group)
    return [Example(row["source"], json.loads(row["messages"])) for _, row in rows]


def _write_split(examples: Sequence[Example], folder: Folder, unit_bytes: int) -> Iterator[Unit]:
    groups = _in_units(examples, unit_bytes)
    for shard, first in enumerate(groups):
        name = f"shard_{shard:05d}.parquet"
        sink = pa.BufferOutputStream()
        units = []
        with pq.ParquetWriter(sink, _SCHEMA) as writer:
            for row_group, (texts, sources) in enumerate(chain([first], islice(groups, UNITS_PER_SHARD - 1))):
                writer.write_table(pa.table([texts, sources], schema=_SCHEMA))
                size = sum(len(text.encode()) for text in texts)
                units.append(Unit(str(folder / name), row_group, len(texts), size))
        folder.write(name, sink.getvalue().to_pybytes())
        yield from units


def _in_units(examples: Sequence[Example], unit_bytes: int) -> Iterator[tuple[list[str], list[str]]]:
    """The JSON of the conversations of each unit, and their sources."""
    texts: list[str] = []
    sources: list[str] = []
    size = 0
    for example in examples:
        texts.append(_as_json(example.messages))
        sources.append(example.source)
        size += len(texts[-1].encode())
        if size >= unit_bytes:
            yield texts, sources
            texts, sources, size = [], [], 0
    if texts:
        yield texts, sources


def _fingerprint(mixture: Mixture, unit_bytes: int) -> str:
    hasher = hashlib.sha256(f"bytes {unit_bytes}".encode())
    for split in (mixture.train, mixture.test):
        hasher.update(b"\0split")
        for example in split:
            hasher.update(f"\0{example.source}\0{_as_json(example.messages)}".encode())
    return hasher.hexdigest()[:32]


def _as_json(messages: Conversation) -> str:
    return json.dumps(messages, ensure_ascii=False, separators=(",", ":"))
