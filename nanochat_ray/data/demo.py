"""The embedded demo corpus: the documentation of the installed Python, torch, ray and numpy, as parquet shards.

It exists on any machine and needs no network. It is made once per set of versions:

    <storage>/data/demo-<versions>/shard_00000.parquet … shard_00007.parquet  (the last one for validation)
    <storage>/data/demo-<versions>/_complete.json                             (written last: the shards are all there)
"""

import hashlib
import importlib.metadata
import io
import json
import multiprocessing
import os
import platform
import random
import sys
import time
from concurrent.futures import ProcessPoolExecutor

import pyarrow as pa
from pyarrow import parquet as pq

from nanochat_ray.data import docstrings
from nanochat_ray.data.functions import DocumentedFunction, documented_functions
from nanochat_ray.data.shards import TEXT_COLUMN
from nanochat_ray.storage import Folder

__all__ = ["DocumentedFunction", "build_demo_corpus", "documented_functions"]

SHARDS = 8
ROW_GROUP_DOCUMENTS = 64  # about 0.3 MB of text: a resumed stream re-reads one
_SHUFFLE_SEED = 1337
_RECIPE = 1  # raise it when the text of the same versions changes
_MOST_PROCESSES = 8  # beyond, starting them costs more than they save
_MANIFEST = "_complete.json"


def build_demo_corpus(data: Folder) -> tuple[Folder, list[str]]:
    """The folder of the demo corpus and its shard names, the last one for validation; made first if need be.

    Two processes that make it at once write the same files. About 15 M characters; progress goes to stderr.
    """
    versions = _versions()
    key = hashlib.sha256(json.dumps(versions, sort_keys=True).encode()).hexdigest()[:10]
    folder = data / f"demo-{key}"
    if folder.exists(_MANIFEST):
        return folder, folder.read_json(_MANIFEST)["shards"]
    folder.require_writable()
    documents = _shuffled_documents()
    names = [f"shard_{number:05d}.parquet" for number in range(SHARDS)]
    for number, name in enumerate(names):
        folder.write(name, _parquet(documents[number::SHARDS]))
    facts = {"documents": len(documents), "characters": sum(map(len, documents))}
    folder.write_json(_MANIFEST, {"shards": names, **facts, "versions": versions})
    return folder, names


def _versions() -> dict[str, str]:
    packages = {package: importlib.metadata.version(package) for package in docstrings.PACKAGES}
    return {"recipe": str(_RECIPE), "python": platform.python_version(), "system": sys.platform, **packages}


def _shuffled_documents() -> list[str]:
    """All distinct documents, in an order that depends on their text only."""
    sources = docstrings.sources()
    started, shown = time.monotonic(), 0.0
    documents = set(docstrings.pydoc_topics())
    # Not forked: a fork of a process with threads (torch, ray) may hang.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(min(os.cpu_count() or 1, _MOST_PROCESSES), mp_context=context) as pool:
        found = pool.map(docstrings.module_document, sources, chunksize=32)
        for count, document in enumerate(found, start=1):
            if document:
                documents.add(document)
            if (now := time.monotonic()) - shown > 5 or count == len(sources):
                shown = now
                print(
                    f"demo corpus: {count}/{len(sources)} modules read, {now - started:.0f} s",
                    file=sys.stderr,
                    flush=True,
                )
    ordered = sorted(documents)
    random.Random(_SHUFFLE_SEED).shuffle(ordered)
    return ordered


def _parquet(documents: list[str]) -> bytes:
    buffer = io.BytesIO()
    table = pa.table({TEXT_COLUMN: pa.array(documents, pa.string())})
    pq.write_table(table, buffer, compression="zstd", row_group_size=ROW_GROUP_DOCUMENTS)
    return buffer.getvalue()
