"""Where in its reply a stream is: what an event's id says and a client that comes back sends as Last-Event-ID. Pure.

    <model>-<request>-<choice>.<choice>…      3f9a0c17-b26c5e90-12.7t.30e

`model` and `request` are the beginnings of hashes; a choice is the number of its tokens whose effects were sent, and

    t   of the last of them only the text was sent, not yet its calculator call or the end of the reply
    e   the end of the reply was sent, too
"""

import hashlib
import re
from dataclasses import dataclass
from typing import Literal

_FORM = re.compile(r"([0-9a-f]{8})-([0-9a-f]{8})-(\d{1,7}[te]?(?:\.\d{1,7}[te]?){0,63})", re.ASCII)


@dataclass(frozen=True)
class Sent:
    """How much of one choice was sent."""

    tokens: int = 0
    step: Literal["", "t", "e"] = ""


@dataclass(frozen=True)
class Position:
    """`model` and `request` are as `digest` gives them."""

    model: str
    request: str
    choices: tuple[Sent, ...]

    def __str__(self) -> str:
        counts = ".".join(f"{sent.tokens}{sent.step}" for sent in self.choices)
        return f"{self.model}-{self.request}-{counts}"

    @staticmethod
    def parse(text: str) -> "Position | None":
        """None: these are not words of ours."""
        found = _FORM.fullmatch(text)
        if found is None:
            return None
        choices = tuple(
            Sent(int(count.rstrip("te")), count[-1] if count[-1] in "te" else "")  # type: ignore[arg-type]
            for count in found[3].split(".")
        )
        return Position(found[1], found[2], choices)


def digest(text: str) -> str:
    """8 hex digits that stand for a fingerprint; enough to notice a mix-up, not to resist an attack."""
    return hashlib.sha256(text.encode()).hexdigest()[:8]
