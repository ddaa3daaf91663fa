"""Where artifacts live: any local path or pyarrow or fsspec URI, and the folders of a run inside it.

    <storage>/data/<corpus>/…                       fetched or generated corpora
    <storage>/runs/<run>/{tokenizer,base,sft,report}/…

Files appear whole or not at all. Local files are written beside their place and renamed; an object store's upload
is atomic by itself.
"""

import json
import os
import re
import uuid
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, TypeAlias

import pyarrow as pa
from pyarrow import fs as pafs

from nanochat_ray.errors import UsageError, UserError

READ_BYTES = 2**24  # at once, where a file is read in pieces
Buffer: TypeAlias = bytes | memoryview
STAGES = ("tokenizer", "base", "sft", "report")


@dataclass(frozen=True)
class Folder:
    """A folder on some filesystem. Plain data: it travels to other machines as its URI (`Folder.at(str(folder))`)."""

    uri: str

    @staticmethod
    def at(uri: str | os.PathLike[str]) -> "Folder":
        """The folder at a local path (made absolute) or URI. Nothing is touched yet."""
        text = str(uri)
        return Folder(text.rstrip("/") if "://" in text else os.path.abspath(os.path.expanduser(text)))

    def __str__(self) -> str:
        return self.uri

    def __truediv__(self, name: str) -> "Folder":
        if self.is_local:
            return Folder(f"{self.uri}/{name}")
        path, mark, query = self.uri.partition("?")  # as in s3://bucket/path?region=…
        return Folder(f"{path.rstrip('/')}/{name}{mark}{query}")

    @property
    def is_local(self) -> bool:
        return "://" not in self.uri

    def open(self) -> tuple[pafs.FileSystem, str]:
        """The pyarrow filesystem and the path inside it.

        Raises:
            UserError: the URI's scheme is unknown or the store cannot be reached.
        """
        if self.is_local:
            return pafs.LocalFileSystem(), self.uri
        try:
            return pafs.FileSystem.from_uri(self.uri)
        except (OSError, pa.ArrowInvalid) as error:
            if "Unrecognized filesystem type" in str(error):
                return self._open_with_fsspec()
            raise UserError(f"storage {self.uri} cannot be opened: {error}") from error

    def _open_with_fsspec(self) -> tuple[pafs.FileSystem, str]:
        import fsspec  # here, because few need it and it costs every job's start 0.2 s

        try:
            filesystem, path = fsspec.core.url_to_fs(self.uri)
        except (ImportError, OSError, ValueError) as error:  # ImportError: the store's package is not installed
            raise UserError(f"storage {self.uri} cannot be opened: {error}") from error
        return pafs.PyFileSystem(pafs.FSSpecHandler(filesystem)), path

    def require_writable(self) -> None:
        """Make the folder and write and delete a probe file in it.

        Raises:
            UserError: naming the folder, when any of that fails.
        """
        try:
            probe = f".write-probe-{uuid.uuid4().hex[:8]}"
            self.write(probe, b"")
            self.delete(probe)
        except OSError as error:
            raise UserError(
                f"storage {self.uri} cannot be written ({error}); give another folder or URI with --storage"
            ) from error

    def write(self, name: str, data: bytes | str | Iterable[Buffer]) -> None:
        """Write a file so that a reader sees the old content or the new, never a part. Makes the folder.

        Args:
            data: whole, or in pieces of which one at a time is in memory.

        Raises:
            OSError: the filesystem refused; the previous content is untouched.
        """
        pieces = [data.encode()] if isinstance(data, str) else [data] if isinstance(data, bytes) else data
        filesystem, path = (self / name).open()
        filesystem.create_dir(os.path.dirname(path), recursive=True)
        if not self.is_local:
            with filesystem.open_output_stream(path) as stream:
                for piece in pieces:
                    stream.write(piece)
            return
        partial = f"{path}.{uuid.uuid4().hex[:8]}.partial"
        try:
            with open(partial, "wb") as file:
                for piece in pieces:
                    file.write(piece)
                file.flush()
                os.fsync(file.fileno())
            os.replace(partial, path)
        finally:
            if os.path.exists(partial):
                os.unlink(partial)

    def write_json(self, name: str, value: Any) -> None:
        self.write(name, json.dumps(value, indent=2) + "\n")

    def read(self, name: str) -> bytes:
        """The content of a file.

        Raises:
            FileNotFoundError: there is none.
        """
        return b"".join(self.read_pieces(name))

    def read_pieces(self, name: str) -> Iterator[bytes]:
        """The content of a file, READ_BYTES at a time.

        Raises:
            FileNotFoundError: there is none.
        """
        filesystem, path = (self / name).open()
        with filesystem.open_input_stream(path) as stream:
            while piece := stream.read(READ_BYTES):
                yield piece

    def read_json(self, name: str) -> Any:
        """A JSON file's value.

        Raises:
            FileNotFoundError: there is none.
            UserError: it is not JSON; names the file.
        """
        try:
            return json.loads(self.read(name))
        except ValueError as error:
            raise UserError(
                f"{self.uri}/{name} is not valid JSON ({error}); delete it and run its stage again"
            ) from error

    def exists(self, name: str = "") -> bool:
        filesystem, path = (self / name if name else self).open()
        return filesystem.get_file_info(path).type != pafs.FileType.NotFound

    def list(self) -> list[str]:
        """Names of the files and folders in this folder, sorted; empty when it does not exist."""
        filesystem, path = self.open()
        selector = pafs.FileSelector(path, allow_not_found=True)
        return sorted(info.base_name for info in filesystem.get_file_info(selector))

    def delete(self, name: str = "") -> None:
        """Delete a file or a whole folder; nothing happens when it is not there."""
        filesystem, path = (self / name if name else self).open()
        kind = filesystem.get_file_info(path).type
        if kind == pafs.FileType.Directory:
            filesystem.delete_dir(path)
        elif kind == pafs.FileType.File:
            filesystem.delete_file(path)


def run_folder(storage: str, run: str) -> Folder:
    """`<storage>/runs/<run>`; its stages are subfolders (see STAGES).

    Raises:
        UsageError: the name could escape the storage or is not portable.
    """
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", run):
        raise UsageError(f"--run {run!r}: use letters, digits, '.', '_' and '-', starting with a letter or digit")
    return Folder.at(storage) / "runs" / run


def data_folder(storage: str) -> Folder:
    """`<storage>/data`, shared by all runs: corpora that were fetched or generated."""
    return Folder.at(storage) / "data"
