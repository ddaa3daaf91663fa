"""The public shard sets: which files they have, and fetching some of them into a folder, several at a time.

A file under its final name is complete and checked; `transfer.py` sees to that. So a run that was killed is continued
by running it again, and files that are there are not looked at again.
"""

import fcntl
import hashlib
import os
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx

from nanochat_ray import __version__
from nanochat_ray.data.shards import inspect_shard
from nanochat_ray.data.transfer import Patience, Stopped, fetch_file
from nanochat_ray.storage import Folder

DEFAULT_HUB_URL = "https://huggingface.co"
CONNECTIONS = 4


@dataclass(frozen=True)
class PublicSet:
    """A published data set of numbered shards; the last one is for validation."""

    repository: str
    last_shard: int

    def shard_names(self) -> list[str]:
        """All shards in order, the validation shard last."""
        return [f"shard_{number:05d}.parquet" for number in range(self.last_shard + 1)]

    def url(self, hub_url: str, shard_name: str) -> str:
        return f"{hub_url.rstrip('/')}/datasets/{self.repository}/resolve/main/{shard_name}"


PUBLIC_SETS = {
    "fineweb-edu": PublicSet("karpathy/fineweb-edu-100b-shuffle", 1822),
    "climbmix": PublicSet("karpathy/climbmix-400b-shuffle", 6542),
}


def fetch_shards(
    public_set: PublicSet,
    names: Sequence[str],
    folder: Folder,
    *,
    hub_url: str | None = None,
    connections: int = CONNECTIONS,
    patience: Patience | None = None,
) -> Folder:
    """Have the named shards in `folder`, fetching those that are missing; returns `folder`.

    Shards for an object store pass through a local temporary folder, one per connection at a time. The base URL is
    `hub_url`, else $NANOCHAT_RAY_HUB_URL, else the Hugging Face hub. Progress goes to stderr.

    Raises:
        UserError: a shard could not be fetched or written; all other transfers stop too and can be resumed.
    """
    missing = sorted(set(names) - set(folder.list()))
    if not missing:
        return folder
    hub_url = hub_url or os.environ.get("NANOCHAT_RAY_HUB_URL") or DEFAULT_HUB_URL
    patience = patience or Patience()
    folder.require_writable()
    staging = Path(folder.uri) if folder.is_local else _staging_folder(folder)
    stop = threading.Event()
    with (
        _locked(staging),
        httpx.Client(
            follow_redirects=True,
            timeout=patience.stall_s,
            headers={"User-Agent": f"nanochat_ray/{__version__}"},
        ) as client,
        _Progress(public_set.repository, len(missing)) as progress,
        ThreadPoolExecutor(connections) as pool,
    ):

        def fetch(name: str) -> None:
            target = staging / name
            if stop.is_set():
                raise Stopped
            if not target.exists():  # else: another process fetched it while this one waited for the lock
                url = public_set.url(hub_url, name)
                fetch_file(client, url, target, check=_check, progress=progress, stop=stop, patience=patience)
            if not folder.is_local:
                folder.write(name, target.read_bytes())
                target.unlink()
            progress.file()

        futures = [pool.submit(fetch, name) for name in missing]
        try:
            for future in as_completed(futures):
                future.result()
        except BaseException:
            stop.set()
            raise
    return folder


def _check(partial: Path) -> None:
    inspect_shard(str(partial))


def _staging_folder(folder: Folder) -> Path:
    """The same local folder every time for the same destination, so that an interrupted transfer can be resumed."""
    key = hashlib.sha256(folder.uri.encode()).hexdigest()[:12]
    staging = Path(tempfile.gettempdir()) / f"nanochat_ray-{os.getuid()}" / key
    staging.mkdir(parents=True, exist_ok=True, mode=0o700)
    return staging


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """One downloading process per folder; the lock goes with the process, however it ends."""
    with open(folder / ".download.lock", "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print(f"waiting for another download into {folder}", file=sys.stderr, flush=True)
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


class _Progress:
    """`set: 3/11 shards, 312 MB, 45.1 MB/s` on stderr: one changing line on a terminal, else a line now and then."""

    def __init__(self, title: str, files: int):
        self.title, self.files = title, files
        self.files_done = self.bytes_done = 0
        self.lock = threading.Lock()
        self.start = time.monotonic()
        self.in_place = sys.stderr.isatty()
        self.shown = self.start if not self.in_place else 0.0

    def __enter__(self) -> "_Progress":
        return self

    def __exit__(self, *_: object) -> None:
        self._show(end="\n")

    def bytes(self, count: int) -> None:
        with self.lock:
            self.bytes_done += count
            now = time.monotonic()
            if now - self.shown < (0.5 if self.in_place else 10):
                return
            self.shown = now
        self._show(end="" if self.in_place else "\n")

    def wait(self, message: str) -> None:
        print(f"\n{message}" if self.in_place else message, file=sys.stderr, flush=True)

    def file(self) -> None:
        with self.lock:
            self.files_done += 1

    def _show(self, end: str) -> None:
        rate = self.bytes_done / max(time.monotonic() - self.start, 1e-9)
        done = f"{self.files_done}/{self.files} shards, {self.bytes_done / 1e6:.0f} MB, {rate / 1e6:.1f} MB/s"
        line = f"{self.title}: {done}"
        print(f"\r{line:<100}" if self.in_place else line, end=end, file=sys.stderr, flush=True)
