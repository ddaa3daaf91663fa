"""The live line of a training run, drawn by the driver from the events that worker 0 writes."""

import json
import sys
import threading
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from statistics import median
from typing import Any

from nanochat_ray.storage import Folder
from nanochat_ray.train.events import EVENTS

_POLL_S = {"local": 0.5, "remote": 5.0}
LOST, LEFT = "workers were lost", {"notice": "the notice of a machine", "growth": "more machines came"}
_SAMPLE_LETTERS = 100
_PLAIN_LINE_EVERY_S = 10.0  # where the output is a log and not a terminal


@contextmanager
def live_progress(stage: Folder, total_steps: int) -> Iterator[None]:
    """Show one line that follows the stage's events while the block runs."""
    stop = threading.Event()
    line = ProgressLine(total_steps)
    thread = threading.Thread(target=_follow, args=(stage, line, stop), daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()
        line.finish()


class ProgressLine:
    """Turns events into a line; on a terminal it is redrawn in place, elsewhere printed every few seconds."""

    def __init__(self, total_steps: int, terminal: bool | None = None):
        self._total = total_steps
        self._terminal = sys.stdout.isatty() if terminal is None else terminal
        self._val_bpb: float | None = None
        self._recent_seconds: deque[float] = deque(maxlen=20)  # of steps; their median ignores a slow first one
        self._group_ended = LOST
        self._printed_at = 0.0
        self._open = False

    def show(self, event: dict[str, Any]) -> None:
        kind = event["kind"]
        if kind == "start":
            again = f"; continuing at step {event['step']}" if event["step"] else ""
            why = f" after {self._group_ended}" if self._recent_seconds else ""
            self._print(f"{event['workers']} worker(s), {event['dtype']}, {event['mode']}{again}{why}")
            self._group_ended = LOST
        elif kind == "leave":
            self._group_ended = LEFT[event["why"]]
        elif kind == "eval":
            self._val_bpb = event["val_bpb"]
        elif kind == "samples" and event["samples"]:
            first = event["samples"][0]  # the same prompt each time: it is the change that tells something
            said = _one_line(f"{first['prompt']} → {first['text']}")
            self._print(f"{self._step(event['step'])} | {self._bpb()} | {said}")
        elif kind == "step":
            self._recent_seconds.append(event["seconds"])
            self._draw(self.text(event), last=event["step"] + 1 == self._total)

    def text(self, event: dict[str, Any]) -> str:
        left = (self._total - event["step"] - 1) * median(self._recent_seconds or [0.0])
        parts = [
            self._step(event["step"] + 1),
            f"loss {event['loss']:.4f}",
            self._bpb(),
            f"{event['tok_per_s']:,.0f} tok/s",
            f"mfu {event['mfu']:.0%}" if event["mfu"] else "mfu -",
            f"workers {event['workers']}",
            f"waiting for data {event['data_wait_s'] / event['seconds']:.0%}",
            f"goodput {event['goodput']:.0%}" if event.get("goodput") is not None else "goodput -",
            f"eta {int(left) // 60}m{int(left) % 60:02d}s",
        ]
        return " | ".join(parts)

    def _step(self, done: int) -> str:
        return f"step {done:>{len(str(self._total))}}/{self._total}"

    def _bpb(self) -> str:
        return f"bpb {self._val_bpb:.4f}" if self._val_bpb is not None else "bpb -"

    def finish(self) -> None:
        if self._open:
            print(flush=True)
            self._open = False

    def _draw(self, text: str, last: bool) -> None:
        if self._terminal:
            print(f"\r\x1b[K{text}", end="", flush=True)
            self._open = True
        elif last or time.monotonic() - self._printed_at >= _PLAIN_LINE_EVERY_S:
            self._printed_at = time.monotonic()
            print(text, flush=True)

    def _print(self, text: str) -> None:
        self.finish()
        print(text, flush=True)


def _one_line(text: str) -> str:
    """Fit for a terminal: what a model says may hold anything."""
    text = "".join(letter if letter.isprintable() else "�" for letter in " ".join(text.split()))
    return text if len(text) <= _SAMPLE_LETTERS else text[: _SAMPLE_LETTERS - 2] + " …"


def _follow(stage: Folder, line: ProgressLine, stop: threading.Event) -> None:
    tail = _Tail(stage)
    shown_until = time.time()
    poll_s = _POLL_S["local" if stage.is_local else "remote"]
    stopping = False
    while not stopping:
        stopping = stop.wait(poll_s)  # one more look after the end, for the last events
        for event in map(json.loads, tail.new_lines()):
            if event["time"] >= shown_until:
                line.show(event)
                shown_until = event["time"]


class _Tail:
    """Follows a stage's events; from the start when they were rewritten, as they are for steps that were lost."""

    def __init__(self, stage: Folder):
        self._stage = stage
        self._end, self._last = 0, b""  # of what was read, and its last line

    def new_lines(self) -> list[bytes]:
        """The complete lines since the last call."""
        try:
            filesystem, path = (self._stage / EVENTS).open()
            with filesystem.open_input_file(path) as file:
                begin = self._end - len(self._last)
                file.seek(min(begin, file.size()))
                data = file.read()
                if data.startswith(self._last):
                    data = data[len(self._last) :]
                else:
                    self._end = 0
                    file.seek(0)
                    data = file.read()
        except OSError:  # not there yet, or the storage fails for a while, which the worker that writes there says
            return []
        lines = data[: data.rfind(b"\n") + 1].splitlines(keepends=True)
        if lines:
            self._end, self._last = self._end + sum(map(len, lines)), lines[-1]
        return lines
