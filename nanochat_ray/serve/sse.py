"""Server-sent events, both ways. Pure: bytes in, bytes out."""

import json
import re
from typing import Any

DONE = b"data: [DONE]\n\n"
_LINE_END = re.compile(rb"\r\n|\n|\r")


def frame(value: dict[str, Any]) -> bytes:
    """One event that carries a JSON object on one line."""
    return b"data: " + json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode() + b"\n\n"


class Parser:
    """Finds events in bytes that arrive in arbitrary portions.

    Follows the event stream format of the HTML standard for `data`: any of the three line ends, several data lines
    joined by a newline, comments and other fields skipped, an unfinished event at the end dropped.
    """

    def __init__(self) -> None:
        self._buffer = b""
        self._data: list[bytes] = []
        self._begun = False

    def push(self, portion: bytes) -> list[str]:
        """The data of every event that is complete with this portion."""
        self._buffer += portion
        if not self._begun and len(self._buffer) >= 3:
            self._buffer = self._buffer.removeprefix(b"\xef\xbb\xbf")
            self._begun = True
        events = []
        # A CR at the very end may be half of a CRLF, so it waits.
        while (end := _LINE_END.search(self._buffer)) and not (end[0] == b"\r" and end.end() == len(self._buffer)):
            line, self._buffer = self._buffer[: end.start()], self._buffer[end.end() :]
            if line:
                self._field(line)
            elif self._data:
                events.append(b"\n".join(self._data).decode("utf-8", errors="replace"))
                self._data = []
        return events

    def _field(self, line: bytes) -> None:
        name, _, value = line.partition(b":")
        if name == b"data":
            self._data.append(value.removeprefix(b" "))
