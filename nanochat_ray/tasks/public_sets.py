"""Rows of a published question set: from parquet files in a folder laid out as on the hub, or from the hub itself.

<tasks>/<name>/<config>/<split>-00000-of-00001.parquet
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from nanochat_ray.errors import UserError
from nanochat_ray.storage import Folder

Row = dict[str, Any]


@dataclass(frozen=True)
class PublicSet:
    """Where a set is published, and the columns we read of it."""

    hub_name: str  # owner/name on the Hugging Face hub
    config: str
    folder: str  # its folder under a tasks folder, config included
    columns: tuple[str, ...]


def read_split(public_set: PublicSet, split: str, tasks: Folder | None) -> Iterator[tuple[str, Row]]:
    """(where, row) of one split; from the tasks folder, or from the hub when `tasks` is None.

    `where` names file and row, for error messages.

    Raises:
        UserError: no such split, an unreadable file, or a missing column.
    """
    if tasks is None:
        return rows_on_hub(public_set.hub_name, public_set.config, split, public_set.columns)
    if not tasks.exists():
        raise UserError(f"there is no folder {tasks}; it should hold the files of {public_set.hub_name} and others")
    folder = tasks / public_set.folder
    files = split_files(folder, split, ".parquet")
    if not files:
        raise UserError(f"no {split}-*.parquet in {folder}; it should hold the files of {public_set.hub_name}")
    return (found for name in files for found in rows_of_parquet(folder, name, public_set.columns))


def split_files(folder: Folder, split: str, ending: str) -> list[str]:
    """Names of a split's files: `<split><ending>` or `<split>-…<ending>`, in order."""
    return [
        name
        for name in folder.list()
        if name.endswith(ending) and (name == split + ending or name.startswith(split + "-"))
    ]


def rows_of_parquet(
    folder: Folder, name: str, columns: Sequence[str], row_group: int | None = None
) -> Iterator[tuple[str, Row]]:
    """(where, row) for every row of a parquet file, or of one row group of it, with the named columns.

    Raises:
        UserError: the file is not parquet, is damaged, or lacks one of the columns.
    """
    filesystem, path = (folder / name).open()
    row_number = 0
    try:
        with filesystem.open_input_file(path) as stream, pq.ParquetFile(stream) as file:
            missing = [column for column in columns if column not in file.schema_arrow.names]
            if missing:
                raise UserError(
                    f"{folder / name} has no column {missing[0]!r} (it has {', '.join(file.schema_arrow.names)})"
                )
            groups = None if row_group is None else [row_group]
            for batch in file.iter_batches(columns=list(columns), row_groups=groups):
                for row in batch.to_pylist():
                    row_number += 1
                    yield f"{folder / name}, row {row_number}", row
    except (pa.ArrowException, OSError) as error:
        raise UserError(f"{folder / name} cannot be read ({error}); fetch the file again") from error


def rows_on_hub(hub_name: str, config: str | None, split: str, columns: Sequence[str]) -> Iterator[tuple[str, Row]]:
    """(where, row) for every row of one split of a set on the hub; downloaded once and cached by `datasets`.

    Raises:
        UserError: the hub cannot be reached, or has no such set, split or column.
    """
    import datasets
    import httpx

    try:
        rows = datasets.load_dataset(hub_name, config, split=split)
    except (OSError, ValueError, httpx.HTTPError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(
            f"the set {hub_name} ({split}) cannot be had from the hub: {reason}; "
            "check the name and the network, or give a local folder"
        ) from error
    missing = [column for column in columns if column not in rows.column_names]
    if missing:
        raise UserError(f"the set {hub_name} has no column {missing[0]!r} (it has {', '.join(rows.column_names)})")
    for number, row in enumerate(rows, start=1):
        yield f"{hub_name} {split}, row {number}", row
