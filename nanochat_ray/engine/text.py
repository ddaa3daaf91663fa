"""Token ids to text while they arrive: no broken characters, and stop strings found across pieces."""

import codecs
from collections.abc import Callable, Sequence


class Detokenizer:
    """Turns token ids into text as they come, holding back the bytes of a character that is not complete yet."""

    def __init__(self, decode_bytes: Callable[[Sequence[int]], bytes]) -> None:
        self._decode_bytes = decode_bytes
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, token: int) -> str:
        """The text that has become certain with this token; may be empty."""
        return self._utf8.decode(self._decode_bytes([token]))

    def flush(self) -> str:
        """What is left: bytes that never became a character come out as U+FFFD."""
        return self._utf8.decode(b"", final=True)


class StopFinder:
    """Passes text through up to the first stop string, holding back an ending that might begin one."""

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(stops)
        self._held = ""

    def push(self, text: str) -> tuple[str, bool]:
        """(text that may be shown, whether a stop string was found). After a find nothing more may be pushed."""
        self._held += text
        found = min((at for stop in self._stops if (at := self._held.find(stop)) >= 0), default=-1)
        if found >= 0:
            shown, self._held = self._held[:found], ""
            return shown, True
        keep = max((_overlap(self._held, stop) for stop in self._stops), default=0)
        cut = len(self._held) - keep
        shown, self._held = self._held[:cut], self._held[cut:]
        return shown, False

    def flush(self) -> str:
        """The held ending: no stop string came of it."""
        shown, self._held = self._held, ""
        return shown


def _overlap(text: str, stop: str) -> int:
    """Length of the longest ending of `text` that begins `stop` but is not all of it."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)
