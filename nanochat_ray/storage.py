"""Where artifacts live: any local path or pyarrow or fsspec URI, and the folders of a run inside it.

    <storage>/data/<corpus>/…                       fetched or generated corpora
    <storage>/runs/<run>/{tokenizer,base,sft,report}/…

Files appear whole or not at all. Local files are written beside their place and renamed; an object store's upload
is atomic by itself.
"""

import errno
import json
import os
import re
import time
import uuid
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, TypeAlias, TypeVar

import pyarrow as pa
from pyarrow import fs as pafs

from nanochat_ray.errors import UsageError, UserError

READ_BYTES = 2**24  # at once, where a file is read in pieces
RETRY_FOR_S = 300.0  # storage that fails for a minute is common, one that fails for longer needs a person
FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.5, 15.0
Buffer: TypeAlias = bytes | memoryview
Result = TypeVar("Result")
STAGES = ("tokenizer", "base", "sft", "report")


class StorageUnreachable(UserError, OSError):
    """A store that cannot be opened now: told to people, and caught by whoever goes on in spite of storage errors."""


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
            UserError: the URI's scheme is unknown.
            StorageUnreachable: the store does not answer.
        """
        if self.is_local:
            return pafs.LocalFileSystem(), self.uri
        try:
            return pafs.FileSystem.from_uri(self.uri)
        except OSError as error:
            raise StorageUnreachable(f"storage {self.uri} cannot be opened: {error}") from error
        except pa.ArrowInvalid as error:
            if "Unrecognized filesystem type" in str(error):
                return self._open_with_fsspec()
            raise UserError(f"storage {self.uri} cannot be opened: {error}") from error

    def _open_with_fsspec(self) -> tuple[pafs.FileSystem, str]:
        import fsspec  # here, because few need it and it costs every job's start 0.2 s

        try:
            filesystem, path = fsspec.core.url_to_fs(self.uri)
        except OSError as error:
            raise StorageUnreachable(f"storage {self.uri} cannot be opened: {error}") from error
        except (ImportError, ValueError) as error:  # ImportError: the store's package is not installed
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

    def size(self, name: str) -> int | None:
        """Bytes of a file; None when there is none."""
        filesystem, path = (self / name).open()
        info = filesystem.get_file_info(path)
        return info.size if info.type == pafs.FileType.File else None

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


def retrying(
    act: Callable[[], Result],
    place: Folder,
    warn: Callable[[str], None],
    retry_for_s: float = RETRY_FOR_S,
    clock: Callable[[], float] = time.monotonic,
    sleep: Callable[[float], object] = time.sleep,
    when_full: bool = True,
) -> Result:
    """What `act()` returns, done again after a storage error, with pauses that double; the first error is a warning.

    A file that is not there is an answer and no storage error.

    Args:
        place: what `act` reads or writes; for messages.
        when_full: whether a full disk is waited for, too: somebody may free room before hours of training are lost.

    Raises:
        UserError: it has failed for `retry_for_s` seconds, or failed for another reason than the storage.
        FileNotFoundError: as `act` raised it.
    """
    began, pause_s, warned = clock(), FIRST_PAUSE_S, False
    while True:
        try:
            return act()
        except (OSError, UserError) as error:
            cause = error.__cause__ if isinstance(error, UserError) else error  # `open` wraps what the store said
            if not isinstance(cause, OSError) or isinstance(cause, FileNotFoundError):
                raise
            if not when_full and is_full(cause):
                raise storage_failed(place, cause) from error
            if clock() - began >= retry_for_s:
                raise storage_failed(place, cause, retry_for_s) from error
            if not warned:
                warn(f"storage {place} fails ({cause}); trying again for {retry_for_s:g} s")
                warned = True
        sleep(pause_s)
        pause_s = min(2 * pause_s, LONGEST_PAUSE_S)


def is_full(error: BaseException) -> bool:
    """Whether a write failed because no room is left."""
    return isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)


def storage_failed(place: Folder, error: OSError, tried_for_s: float = 0.0) -> UserError:
    """The storage error, as a person should read it."""
    if is_full(error):
        return UserError(
            f"no room is left on the disk of {place}: free some (older runs, a lower --keep-checkpoints), "
            "then run the same command again to continue"
        )
    tried = f" for {tried_for_s:g} s" if tried_for_s else ""
    return UserError(
        f"storage {place} failed{tried} ({error}); when it works again, run the same command again to continue"
    )


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
