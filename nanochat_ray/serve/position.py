"""Where in its reply a stream is: what an event's id says and a client that comes back sends as Last-Event-ID. Pure.

    <model>-<request>-<choice>.<choice>…      3f9a0c17-b26c5e90-12:8f0c1a77.7t:03b1d2e9

`model` and `request` are the beginnings of hashes; a choice is the number of its tokens whose effects were sent, their
checksum, so that a reply that is written again is not taken for the same when it is another one, and between the two

    t   of the last of them only the text was sent, not yet its calculator call or the end of the reply
    e   the end of the reply was sent, too
"""

import hashlib
import re
import zlib
from array import array
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

_CHOICE = r"(\d{1,7})([te]?):([0-9a-f]{8})"
_FORM = re.compile(rf"([0-9a-f]{{8}})-([0-9a-f]{{8}})-({_CHOICE}(?:\.{_CHOICE}){{0,63}})", re.ASCII)


@dataclass(frozen=True)
class Sent:
    """How much of one choice was sent."""

    tokens: int = 0
    step: Literal["", "t", "e"] = ""
    checksum: int = 0

    def after(self, tokens: Iterable[int], step: Literal["", "t", "e"]) -> "Sent":
        """What was sent when the effects of these tokens were, too."""
        tokens = array("i", tokens)
        return Sent(self.tokens + len(tokens), step, zlib.crc32(tokens.tobytes(), self.checksum))


@dataclass(frozen=True)
class Position:
    """`model` and `request` are as `digest` gives them."""

    model: str
    request: str
    choices: tuple[Sent, ...]

    def __str__(self) -> str:
        choices = ".".join(f"{sent.tokens}{sent.step}:{sent.checksum:08x}" for sent in self.choices)
        return f"{self.model}-{self.request}-{choices}"

    @staticmethod
    def parse(text: str) -> "Position | None":
        """None: these are not words of ours."""
        found = _FORM.fullmatch(text)
        if found is None:
            return None
        choices = tuple(
            Sent(int(tokens), step, int(checksum, 16))  # type: ignore[arg-type]
            for tokens, step, checksum in re.findall(_CHOICE, found[3])
        )
        return Position(found[1], found[2], choices)


def digest(text: str) -> str:
    """8 hex digits that stand for a fingerprint; enough to notice a mix-up, not to resist an attack."""
    return hashlib.sha256(text.encode()).hexdigest()[:8]
