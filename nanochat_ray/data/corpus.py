"""A corpus: training units in order, pinned validation units, and the fingerprint that a resume compares.

    open_corpus("demo", data)                 docstrings of the installed Python, made here, no network
    open_corpus("fineweb-edu", data, 8)       public shards, fetched once into `data`
    open_corpus("/texts" | "s3://bucket/…")   shards that exist, read where they are

The validation shard never trains. Of the public sets it is the last one published, whatever was downloaded; of a
folder it is the last `*.parquet` file by name.
"""

import hashlib
import json
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import groupby
from typing import Any

from nanochat_ray.data import demo, download
from nanochat_ray.data.shards import Shard, Unit, inspect_shard, read_unit
from nanochat_ray.errors import UsageError, UserError
from nanochat_ray.storage import Folder

__all__ = ["Corpus", "Unit", "open_corpus", "read_unit"]

_FOOTER_READERS = 16  # footers are small and far away: latency, not CPU


@dataclass(frozen=True)
class Corpus:
    """Units in training order; `fingerprint` (32 hex digits) does not depend on where the shards lie."""

    name: str
    train: tuple[Unit, ...]
    validation: tuple[Unit, ...]
    fingerprint: str

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready; a shard's path is written once, not once per row group (a public set has 300,000)."""
        return {
            "name": self.name,
            "fingerprint": self.fingerprint,
            "train": _grouped_by_shard(self.train),
            "validation": _grouped_by_shard(self.validation),
        }

    @staticmethod
    def from_dict(value: dict[str, Any]) -> "Corpus":
        def units(shards: list[dict[str, Any]]) -> tuple[Unit, ...]:
            return tuple(Unit(shard["shard"], *unit) for shard in shards for unit in shard["units"])

        return Corpus(value["name"], units(value["train"]), units(value["validation"]), value["fingerprint"])


def open_corpus(spec: str, data: Folder, shards: int | None = None) -> Corpus:
    """Find, fetch or generate the shards of `spec`, check each by its footer, and list their units.

    Args:
        spec: `demo`, `fineweb-edu`, `climbmix`, a local folder, or a pyarrow or fsspec URI of a folder.
        data: where fetched and generated shards are kept (`<storage>/data`).
        shards: take the first N training shards; None takes all.

    Raises:
        UsageError: `shards` is below 1 or more than there are.
        UserError: no such corpus, a bad shard (names the file), or a failed download (names the URL).
    """
    if shards is not None and shards < 1:
        raise UsageError(f"--shards {shards}: at least one training shard is needed")
    if spec in download.PUBLIC_SETS:
        shard_set = download.PUBLIC_SETS[spec]
        names = _take(spec, shard_set.shard_names(), shards)
        folder = download.fetch_shards(shard_set, names, data / spec)
        return corpus_of(spec, folder, names)
    if spec == "demo":
        folder, names = demo.build_demo_corpus(data)
        return corpus_of(spec, folder, _take(spec, names, shards))
    folder = Folder.at(spec)
    return corpus_of(folder.uri.rpartition("/")[2], folder, _take(spec, _shard_names(spec, folder), shards))


def corpus_of(name: str, folder: Folder, shard_names: Sequence[str]) -> Corpus:
    """The corpus of these files of a folder, in this order, the last one for validation.

    Raises:
        UserError: one of them is missing or bad; the first bad one in order is named.
    """
    with ThreadPoolExecutor(_FOOTER_READERS) as pool:
        shards = list(pool.map(inspect_shard, [str(folder / shard_name) for shard_name in shard_names]))
    *training, validation = shards
    return Corpus(
        name=name,
        train=tuple(unit for shard in training for unit in shard.units),
        validation=validation.units,
        fingerprint=_fingerprint(training, validation),
    )


def _take(spec: str, names: Sequence[str], shards: int | None) -> list[str]:
    *training, validation = names
    if shards is not None and shards > len(training):
        raise UsageError(f"--shards {shards}: corpus {spec} has {len(training)} training shards")
    return [*training[:shards], validation]


def _shard_names(spec: str, folder: Folder) -> list[str]:
    try:
        found = folder.list()
    except OSError as error:
        raise UserError(f"corpus {spec} cannot be listed ({error}); give a folder of parquet shards") from error
    names = [name for name in found if name.endswith(".parquet") and not name.startswith((".", "_"))]
    if not found and not folder.exists():
        known = ", ".join(["demo", *download.PUBLIC_SETS])
        raise UserError(f"no such corpus: {spec} is neither a folder or URI that exists nor one of {known}")
    if len(names) < 2:
        raise UserError(
            f"corpus {spec} has {len(names)} *.parquet shards directly in it; at least 2 are needed: "
            "the last by name is the validation shard, the others train"
        )
    return names


def _grouped_by_shard(units: Sequence[Unit]) -> list[dict[str, Any]]:
    return [
        {"shard": shard, "units": [[unit.row_group, unit.documents, unit.bytes] for unit in group]}
        for shard, group in groupby(units, key=lambda unit: unit.shard)
    ]


def _fingerprint(training: Sequence[Shard], validation: Shard) -> str:
    """Hash of names, order and row-group layout: the same for a copy elsewhere, another one when a shard was rewritten.

    Compressed sizes are part of the layout, so that other text of the same length is noticed too without reading it.
    """
    facts = [[[shard.name, shard.layout] for shard in training], [validation.name, validation.layout]]
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:32]
