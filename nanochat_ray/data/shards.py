"""One parquet shard: what it holds according to its footer, and the documents of one of its row groups.

A *unit* is one row group of one shard, the smallest piece of a corpus that is read at once. Whatever can be wrong with
a shard is found here and said in one line that names the file and the remedy.
"""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import pyarrow as pa
from pyarrow import parquet as pq

from nanochat_ray.errors import UserError
from nanochat_ray.storage import Folder

log = logging.getLogger(__name__)

TEXT_COLUMN = "text"

# Longer documents are cut, so that one 50 MB document does not become one tokenizer call and one row buffer of its
# size. At most 4 bytes a character: a piece is at most 1 MB of UTF-8.
MAX_DOCUMENT_CHARACTERS = 250_000

_REPLACE = "write or copy it again, or remove it from the corpus (a downloaded shard is fetched again once deleted)"


@dataclass(frozen=True)
class Unit:
    """One parquet row group: `documents` rows (nulls included), `bytes` of text column, uncompressed, in the file."""

    shard: str  # absolute path or URI of the parquet file
    row_group: int
    documents: int
    bytes: int


@dataclass(frozen=True)
class Shard:
    """A checked parquet file: its units in order, and the layout a fingerprint is made of."""

    name: str
    units: tuple[Unit, ...]
    layout: tuple[tuple[int, int, int], ...]  # per row group: documents, uncompressed and compressed bytes of text


def inspect_shard(uri: str) -> Shard:
    """Check a shard by its footer alone; no text is read.

    Raises:
        UserError: missing, truncated or not parquet, no string column `text`, or no documents in it.
    """
    with _opened(uri) as file:
        _require_text_column(uri, file.schema_arrow)
        metadata = file.metadata
        column = [metadata.schema.column(i).path for i in range(metadata.num_columns)].index(TEXT_COLUMN)
        layout = []
        for group in range(metadata.num_row_groups):
            chunk = metadata.row_group(group).column(column)
            rows = metadata.row_group(group).num_rows
            layout.append((rows, chunk.total_uncompressed_size, chunk.total_compressed_size))
    if not any(rows for rows, _, _ in layout):
        raise UserError(f"{uri} is an empty shard (0 documents); {_REPLACE}")
    # A row group without rows has nothing to lose, and some writers leave one behind: it makes no unit.
    units = tuple(Unit(uri, group, rows, size) for group, (rows, size, _) in enumerate(layout) if rows)
    return Shard(uri.rpartition("/")[2], units, tuple(layout))


def read_unit(unit: Unit) -> list[str]:
    """The documents of a unit in their order in the file; runs on any machine that can open the shard.

    Null documents are left out, with one logged warning that counts them. A document of more than
    MAX_DOCUMENT_CHARACTERS comes as several, cut after whitespace where there is any; no character is lost. So the
    length of the result may differ from `unit.documents`, but is the same on every read.

    Raises:
        UserError: the shard is missing or corrupt, or a document is not UTF-8; names file and row group.
    """
    with _opened(unit.shard) as file:
        where = f"{unit.shard}, row group {unit.row_group}"
        if unit.row_group >= file.metadata.num_row_groups:
            raise UserError(
                f"{where} does not exist any more: the shard was replaced; run the job again from its start"
            )
        _require_text_column(unit.shard, file.schema_arrow)
        try:
            column = file.read_row_group(unit.row_group, columns=[TEXT_COLUMN]).column(TEXT_COLUMN)
        except (OSError, pa.ArrowException) as error:
            raise UserError(f"{where} is corrupt ({_first_line(error)}); {_REPLACE}") from error
    try:
        texts = column.to_pylist()
    except UnicodeDecodeError as error:
        raise UserError(f"{where} holds text that is not UTF-8 ({error.reason}); write the shard as UTF-8") from error
    documents = [text for text in texts if text is not None]
    if len(documents) < len(texts):
        log.warning("%s: skipped %d null documents of %d", where, len(texts) - len(documents), len(texts))
    return [piece for document in documents for piece in cut_document(document)]


def cut_document(text: str, limit: int = MAX_DOCUMENT_CHARACTERS) -> Iterator[str]:
    """Pieces of at most `limit` characters that join to `text`, cut after the last whitespace of each if it has any."""
    start = 0
    while len(text) - start > limit:
        end = start + limit
        # split() knows every kind of whitespace; the last word of the window moves to the next piece.
        last_word = text[start:end].rsplit(None, 1)[-1:] if not text[end - 1].isspace() else []
        end -= len(last_word[0]) if last_word and len(last_word[0]) < limit else 0
        yield text[start:end]
        start = end
    yield text[start:]


@contextmanager
def _opened(uri: str) -> Iterator[pq.ParquetFile]:
    try:
        filesystem, path = Folder.at(uri).open()
        stream = filesystem.open_input_file(path)
    except FileNotFoundError as error:
        raise UserError(f"{uri} does not exist; {_REPLACE}") from error
    except OSError as error:
        raise UserError(f"{uri} cannot be read ({_first_line(error)})") from error
    with stream:
        try:
            file = pq.ParquetFile(stream)
        except (OSError, pa.ArrowException) as error:
            raise UserError(f"{uri} is not a whole parquet file ({_first_line(error)}); {_REPLACE}") from error
        yield file


def _require_text_column(uri: str, schema: pa.Schema) -> None:
    if TEXT_COLUMN not in schema.names:
        names = ", ".join(schema.names) or "none"
        raise UserError(f"{uri} has no column `{TEXT_COLUMN}` (columns: {names}); rename the one that holds the text")
    kind = schema.field(TEXT_COLUMN).type
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    if not (pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)):
        raise UserError(
            f"{uri}: column `{TEXT_COLUMN}` is of type {kind}, not string; cast it and write the shard again"
        )


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
