"""API keys: a file of hashes, and how often each key may ask.

    # who : sha256 of the key : requests a minute (optional)
    alice:9f86d081884c7d659a2feaa0c55ad015a3bf4f1b2b0b822cd15d6c15b0f00a08:60

A key has 256 random bits, so that a plain hash of it cannot be guessed back.
"""

import hashlib
import hmac
import math
import os
import re
import secrets
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from nanochat_ray.errors import UserError
from nanochat_ray.serve.refusals import Refusal

_NAME = re.compile(r"[A-Za-z0-9_.-]{1,64}", re.ASCII)
_HASH = re.compile(r"[0-9a-f]{64}", re.ASCII)


@dataclass(frozen=True)
class StoredKey:
    """`per_minute`: None for no limit."""

    name: str
    sha256: str
    per_minute: int | None = None


class ApiKeys:
    """The keys of a server.

    Args:
        clock: seconds, never going back.
    """

    def __init__(self, keys: Sequence[StoredKey], clock: Callable[[], float]) -> None:
        self._keys = keys
        self._buckets = {key.name: _Bucket(key.per_minute, clock) for key in keys if key.per_minute is not None}

    def check(self, authorization: str, counts: bool = True) -> str:
        """The name of the key in an Authorization header.

        Args:
            counts: towards its rate.

        Raises:
            Refusal: 401 without a known key, 429 above its rate.
        """
        scheme, _, token = authorization.partition(" ")
        key = self._find(token.strip()) if scheme.lower() == "bearer" else None
        if key is None:
            message = "send an API key of this server in the header Authorization: Bearer …"
            challenge = {"WWW-Authenticate": "Bearer"}
            raise Refusal(401, message, "authentication_error", code="invalid_api_key", headers=challenge)
        bucket = self._buckets.get(key.name)
        wait_s = bucket.take() if counts and bucket else 0.0
        if wait_s:
            raise Refusal(
                429,
                f"this key may ask {key.per_minute} times a minute",
                "rate_limit_error",
                code="rate_limit_exceeded",
                retry_after_s=math.ceil(wait_s),
            )
        return key.name

    def _find(self, token: str) -> StoredKey | None:
        digest = _digest(token)
        # All are compared, each in constant time: how long it takes says nothing about which one was nearly right.
        matches = [key for key in self._keys if hmac.compare_digest(key.sha256, digest)]
        return matches[0] if matches else None


class _Bucket:
    """Holds up to a minute's requests and fills evenly."""

    def __init__(self, per_minute: int, clock: Callable[[], float]) -> None:
        self._per_minute = per_minute
        self._clock = clock
        self._left = float(per_minute)
        self._at = clock()

    def take(self) -> float:
        """Take one; 0, or the seconds until there will be one."""
        now = self._clock()
        self._left = min(self._per_minute, self._left + (now - self._at) * self._per_minute / 60)
        self._at = now
        if self._left < 1:
            return (1 - self._left) * 60 / self._per_minute
        self._left -= 1
        return 0.0


def read_keys(path: Path) -> list[StoredKey]:
    """The keys of a file.

    Raises:
        UserError: it cannot be read, has no key, or a line is wrong; names the line, never what it says.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"the key file {path} cannot be read ({error})") from error
    keys: list[StoredKey] = []
    for number, line in enumerate(lines, start=1):
        text = line.partition("#")[0].strip()
        if text:
            keys.append(_parse(f"{path}, line {number}", text, {key.name for key in keys}))
    if not keys:
        raise UserError(f"the key file {path} has no key; a line is name:sha256 or name:sha256:requests per minute")
    return keys


def _parse(where: str, text: str, taken: set[str]) -> StoredKey:
    fields = [field.strip() for field in text.split(":")]
    if len(fields) not in (2, 3):
        raise UserError(f"{where}: expected name:sha256 or name:sha256:requests per minute")
    name, sha256 = fields[:2]
    if not _NAME.fullmatch(name):
        raise UserError(f"{where}: a name has 1 to 64 letters, digits, dots, dashes or underscores")
    if name in taken:
        raise UserError(f"{where}: the name is used by a line above")
    if not _HASH.fullmatch(sha256):
        raise UserError(
            f"{where}: the second field is not a sha256 (64 lower-case hex digits); never store a key itself"
        )
    if len(fields) == 2:
        return StoredKey(name, sha256)
    if not fields[2].isascii() or not fields[2].isdigit() or int(fields[2][:9]) < 1:
        raise UserError(f"{where}: the third field is the number of requests per minute, 1 or more")
    return StoredKey(name, sha256, int(fields[2][:9]))


def add_key(path: Path, name: str, per_minute: int | None = None) -> str:
    """A new key, which is told once; its line is added to the file, which only its owner may read if it is new.

    Raises:
        UserError: name or rate cannot stand in such a line, the name is there already, or the file is not one of keys.
    """
    there = path.exists() and path.stat().st_size > 0
    taken = {key.name for key in read_keys(path)} if there else set()
    key = f"nr-{secrets.token_urlsafe(32)}"
    line = f"{name}:{_digest(key)}" + (f":{per_minute}" if per_minute is not None else "")
    if name in taken:
        raise UserError(f"{path} has a key of {name} already; delete its line first, or take another name")
    _parse("the new key", line, set())
    file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, mode=0o600)
    with os.fdopen(file, "a", encoding="utf-8") as keys:
        if there and not path.read_bytes().endswith(b"\n"):
            keys.write("\n")
        keys.write(f"{line}\n")
    return key


def _digest(token: str) -> str:
    return hashlib.sha256(token.encode("utf-8", "surrogateescape")).hexdigest()
