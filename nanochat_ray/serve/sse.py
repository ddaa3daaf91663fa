"""Server-sent events, both ways. Pure: bytes in, bytes out."""

import json
import re
from dataclasses import dataclass
from typing import Any

DONE = b"data: [DONE]\n\n"
KEEP_ALIVE = b":\n\n"
_LINE_END = re.compile(rb"\r\n|\n|\r")
_STATE = "state "


def frame(value: dict[str, Any], event_id: str | None = None) -> bytes:
    """One event that carries a JSON object on one line.

    Args:
        event_id: without line ends; what a client that reconnects sends back as Last-Event-ID.
    """
    head = b"" if event_id is None else b"id: " + event_id.encode() + b"\n"
    return head + b"data: " + _json(value) + b"\n\n"


def state_comment(state: dict[str, Any]) -> bytes:
    """What is going on, as a comment: clients that do not know it skip it."""
    return b": " + _STATE.encode() + _json(state) + b"\n\n"


def _json(value: dict[str, Any]) -> bytes:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode()


@dataclass(frozen=True)
class Event:
    """`last_id`: the last id that the stream gave, in this event or before it; "" before the first."""

    data: str
    last_id: str = ""


@dataclass(frozen=True)
class Comment:
    """A line that begins with a colon; a bare one keeps the connection alive."""

    text: str

    @property
    def state(self) -> dict[str, Any] | None:
        """What `state_comment` wrote, if this is such a comment."""
        if not self.text.startswith(_STATE):
            return None
        try:
            value = json.loads(self.text.removeprefix(_STATE))
        except ValueError:
            return None
        return value if isinstance(value, dict) else None


class Parser:
    """Finds events and comments in bytes that arrive in arbitrary portions.

    Follows the event stream format of the HTML standard for `data` and `id`: any of the three line ends, several data
    lines joined by a newline, other fields skipped, an unfinished event at the end dropped.
    """

    def __init__(self) -> None:
        self._buffer = b""
        self._data: list[bytes] = []
        self._id = self._last_id = ""
        self._begun = False

    def push(self, portion: bytes) -> list[Event | Comment]:
        """What is complete with this portion, in order."""
        self._buffer += portion
        if not self._begun and len(self._buffer) >= 3:
            self._buffer = self._buffer.removeprefix(b"\xef\xbb\xbf")
            self._begun = True
        found: list[Event | Comment] = []
        at = 0
        # A CR at the very end may be half of a CRLF, so it waits.
        while (end := _LINE_END.search(self._buffer, at)) and not (end[0] == b"\r" and end.end() == len(self._buffer)):
            line, at = self._buffer[at : end.start()], end.end()
            if line.startswith(b":"):
                found.append(Comment(_text(line[1:].removeprefix(b" "))))
            elif line:
                self._field(line)
            else:
                self._last_id = self._id
                if self._data:
                    found.append(Event(_text(b"\n".join(self._data)), self._last_id))
                    self._data = []
        self._buffer = self._buffer[at:]
        return found

    def _field(self, line: bytes) -> None:
        name, _, value = line.partition(b":")
        value = value.removeprefix(b" ")
        if name == b"data":
            self._data.append(value)
        elif name == b"id" and b"\0" not in value:
            self._id = _text(value)


def _text(data: bytes) -> str:
    return data.decode("utf-8", errors="replace")
