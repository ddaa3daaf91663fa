"""One file over HTTP: resumed where it stopped, verified, and whole under its name or not there at all.

Bytes go to `<name>.<version>.partial`, where <version> is a hash of the server's identity of the content (its ETag).
A resume asks for the rest and appends only when the answer carries the same version, so that a file that changed on
the server is never spliced. The finished file is checked, flushed to disk and renamed. A kill at any moment leaves at
most that partial file.
"""

import email.utils
import hashlib
import os
import random
import re
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import httpx

from nanochat_ray.errors import UserError


@dataclass(frozen=True)
class Patience:
    """What the network is forgiven. Failures count only while they follow each other without a new byte gained."""

    failures: int = 6
    first_wait_s: float = 1.0  # doubles with every failure; the wait is 50–100 % of it, at random
    longest_wait_s: float = 60.0
    longest_retry_after_s: float = 600.0  # a server that asks for more is taken at its word: the job stops
    stall_s: float = 30.0  # no byte for so long: the connection is given up

    def wait_s(self, failure: int) -> float:
        """Seconds to wait after the n-th failure in a row, n = 1, 2, …"""
        return min(self.first_wait_s * 2 ** (failure - 1), self.longest_wait_s) * random.uniform(0.5, 1.0)


class Progress(Protocol):
    """Whoever watches a transfer; called from its thread."""

    def bytes(self, count: int) -> None: ...

    def wait(self, message: str) -> None: ...


class Stopped(Exception):
    """Another transfer of the same job failed, or the user interrupted; the partial file stays for the next run."""


class _Temporary(Exception):
    def __init__(self, reason: str, retry_after_s: float = 0.0):
        super().__init__(reason)
        self.retry_after_s = retry_after_s


def fetch_file(
    client: httpx.Client,
    url: str,
    target: Path,
    *,
    check: Callable[[Path], None],
    progress: Progress,
    stop: threading.Event,
    patience: Patience,
    address_variable: str = "NANOCHAT_RAY_HUB_URL",
) -> None:
    """Make `target` the content of `url`; `target` appears only when it is complete and checked.

    Verified are: the announced length, the length and SHA-256 of the `X-Linked-Size` and `X-Linked-Etag` headers where
    the server (the Hugging Face hub) sends them, and whatever `check(partial_file)` raises a UserError about.

    Args:
        address_variable: the environment variable by which people change where this comes from.

    Raises:
        UserError: the server refuses (4xx other than 429), or nothing was gained in `patience.failures` attempts in a
            row; names URL, reason and remedy.
        Stopped: `stop` was set.
    """
    failures, most = 0, 0
    while True:
        try:
            finished = _attempt(client, url, target, check, progress, stop, address_variable)
            break
        except (httpx.InvalidURL, httpx.UnsupportedProtocol, httpx.TooManyRedirects) as error:
            raise UserError(f"{url} cannot be fetched: {error}; check {address_variable}") from error
        except httpx.TransportError as error:
            problem = _Temporary(f"{type(error).__name__}: {error}" if str(error) else type(error).__name__)
        except _Temporary as error:
            problem = error
        except OSError as error:
            raise UserError(
                f"{target} cannot be written ({error}); free space or give another --storage (what was fetched is kept)"
            ) from error
        size = max((partial.stat().st_size for partial in _partials(target)), default=0)
        failures = 1 if size > most else failures + 1
        most = max(most, size)
        if failures > patience.failures or problem.retry_after_s > patience.longest_retry_after_s:
            wish = f", and the server asks to wait {problem.retry_after_s:.0f} s" if problem.retry_after_s else ""
            raise UserError(
                f"{url} could not be fetched: {problem}{wish}; check the network and run the same command again, "
                "it continues where it stopped"
            ) from problem
        wait_s = max(patience.wait_s(failures), problem.retry_after_s)
        progress.wait(f"{url}: {problem}; trying again in {wait_s:.0f} s")
        if stop.wait(wait_s):
            raise Stopped
    os.replace(finished, target)
    _sync(target.parent)


def _attempt(
    client: httpx.Client,
    url: str,
    target: Path,
    check: Callable[[Path], None],
    progress: Progress,
    stop: threading.Event,
    address_variable: str,
) -> Path:
    """One request; returns the complete, checked and flushed partial file."""
    partials = _partials(target)
    offset = partials[0].stat().st_size if partials else 0
    headers = {"Accept-Encoding": "identity"} | ({"Range": f"bytes={offset}-"} if offset else {})
    with client.stream("GET", url, headers=headers) as response:
        if response.status_code == httpx.codes.REQUESTED_RANGE_NOT_SATISFIABLE:
            _discard(partials)
            raise _Temporary("the file on the server is shorter than what was fetched before")
        _check_status(url, response, address_variable)
        described = _describe(response)
        partial = target.with_name(f"{target.name}.{described.version}.partial")
        if response.status_code == httpx.codes.PARTIAL_CONTENT and (described.start, [partial]) != (offset, partials):
            _discard(partials)
            raise _Temporary("the file changed on the server")
        if response.status_code == httpx.codes.OK:  # all of it: a first request, or one whose Range was ignored
            _discard(partials)
        if described.linked_size not in (None, described.size):
            raise _Temporary(f"the server announces {described.size} bytes of a file of {described.linked_size}")
        with open(partial, "ab") as file:
            for chunk in response.iter_raw():
                if stop.is_set():
                    raise Stopped
                file.write(chunk)
                progress.bytes(len(chunk))
            file.flush()
            os.fsync(file.fileno())
    _verify(partial, described, check)
    return partial


def _verify(partial: Path, described: "_Description", check: Callable[[Path], None]) -> None:
    size = partial.stat().st_size
    try:
        if described.size not in (None, size):
            raise _Temporary(f"{size} bytes arrived of {described.size}")
        if described.sha256:
            with open(partial, "rb") as file:
                found = hashlib.file_digest(file, "sha256").hexdigest()
            if found != described.sha256:
                raise _Temporary(f"its SHA-256 is {found[:12]}… where the server promises {described.sha256[:12]}…")
        check(partial)
    except (_Temporary, UserError) as error:
        partial.unlink()
        raise _Temporary(str(error).replace(str(partial), "what arrived")) from error


@dataclass(frozen=True)
class _Description:
    """What a 200 or 206 response says about the file it comes from."""

    version: str
    start: int
    size: int | None
    linked_size: int | None
    sha256: str | None


def _describe(response: httpx.Response) -> _Description:
    # The hub answers with a redirect to its store; only the redirect carries the X-Linked headers.
    headers = {name: value for answer in [*response.history, response] for name, value in answer.headers.items()}
    linked_etag = headers.get("x-linked-etag", "").strip('"').lower()
    etag = response.headers.get("etag", "")
    range_found = re.fullmatch(r"bytes (\d+)-\d+/(\d+)", response.headers.get("content-range", ""))
    start, size = 0, _number(response.headers.get("content-length"))
    if response.status_code == httpx.codes.PARTIAL_CONTENT and range_found:
        start, size = int(range_found[1]), int(range_found[2])
    linked_size = _number(headers.get("x-linked-size"))
    # A weak ETag may stand for different bytes, so it does not identify a version; size and date are the next best.
    identity = linked_etag or (etag if not etag.startswith("W/") else "")
    identity = identity or f"{response.headers.get('last-modified', time.time_ns())} {size}"
    return _Description(
        version=hashlib.sha256(identity.encode()).hexdigest()[:12],
        start=start,
        size=size if size is not None else linked_size,
        linked_size=linked_size,
        sha256=linked_etag if re.fullmatch(r"[0-9a-f]{64}", linked_etag) else None,
    )


def _check_status(url: str, response: httpx.Response, address_variable: str) -> None:
    status = response.status_code
    if status in (httpx.codes.OK, httpx.codes.PARTIAL_CONTENT):
        return
    reason = f"the server answers {status} {response.reason_phrase}".rstrip()
    if status == httpx.codes.TOO_MANY_REQUESTS or status >= 500:
        raise _Temporary(reason, _retry_after_s(response.headers.get("retry-after", "")))
    raise UserError(f"{url} cannot be fetched: {reason}; check the address, which {address_variable} changes")


def _retry_after_s(value: str) -> float:
    """Seconds of a Retry-After header, which is a number or an HTTP date; 0 when absent or unreadable."""
    if value.strip().isdecimal():
        return float(value)
    parsed = email.utils.parsedate_tz(value)
    return max(0.0, email.utils.mktime_tz(parsed) - time.time()) if parsed else 0.0


def _number(value: str | None) -> int | None:
    return int(value) if value and value.isdecimal() else None


def _partials(target: Path) -> list[Path]:
    return sorted(target.parent.glob(f"{target.name}.*.partial"))


def _discard(partials: list[Path]) -> None:
    for partial in partials:
        partial.unlink()


def _sync(folder: Path) -> None:
    """Make the renames in a folder survive a power failure."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
