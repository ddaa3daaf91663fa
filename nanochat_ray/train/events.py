"""What happened, one JSON object per line in `<stage>/events.jsonl`, and the same curves for TensorBoard.

Objects have a `kind`: start, step, eval, samples, checkpoint, lost, leave, finish. There is exactly one `step` object
per optimizer step: when a run goes back to a checkpoint, the objects of the steps it will do again are dropped, and one
`lost` object tells how many they were and how long they took. What else the time went to is in ledger.py: each `step`
carries the `goodput` so far, `finish` the `worker_seconds` by label.
"""

import json
import os
import tempfile
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from tensorboardX import SummaryWriter

from nanochat_ray.cli import warn
from nanochat_ray.errors import UserError
from nanochat_ray.storage import RETRY_FOR_S, Folder, retrying
from nanochat_ray.train.lease import GroupReplaced
from nanochat_ray.train.ledger import Ledger

EVENTS = "events.jsonl"
UPLOAD_EVERY_S = 10.0
_CURVES = {"step": ("loss", "lr", "tok_per_s", "workers", "data_wait_s", "goodput"), "eval": ("val_bpb",)}


class EventLog:
    """Appends events of one stage; one writer at a time (worker 0).

    A local file is appended to line by line. Object stores cannot append: there the file is rewritten by `flush`, and
    by a thread every few seconds, for who watches the run, and so that a lost group's steps are known to the next one.

    Args:
        may_write: called before anything is written to an object store; raises when it may not be.
    """

    def __init__(self, stage: Folder, resume_step: int, may_write: Callable[[], object] = lambda: None):
        self._stage, self._may_write = stage, may_write
        self._uploading, self._uploaded, self._closed = threading.Lock(), 0, threading.Event()
        events = without_repeated(read_events(stage), resume_step)
        self._ledger = Ledger(events)
        self._lines = [json.dumps(event) for event in events]
        self._file = None
        if stage.is_local:
            stage.write(EVENTS, "".join(f"{line}\n" for line in self._lines))
            self._file = open(f"{stage}/{EVENTS}", "a", buffering=1)  # noqa: SIM115 (closed in close)
        self._board_folder = f"{stage}/tensorboard" if stage.is_local else tempfile.mkdtemp(prefix="tensorboard-")
        self._board = SummaryWriter(self._board_folder, purge_step=resume_step)
        if self._file is None:
            threading.Thread(target=self._keep_uploading, name="events", daemon=True).start()

    def append(self, kind: str, **fields: Any) -> None:
        event = {"kind": kind, "time": round(time.time(), 3), **fields}
        self._ledger.add(event)
        if kind == "step":
            goodput = self._ledger.goodput
            event["goodput"] = None if goodput is None else round(goodput, 4)
        elif kind == "finish":
            event["worker_seconds"] = {label: round(seconds, 3) for label, seconds in self._ledger.totals().items()}
        line = json.dumps(event)
        if self._file is not None:
            self._file.write(line + "\n")
        else:
            self._lines.append(line)
        for curve in _CURVES.get(kind, ()):
            if event.get(curve) is not None:
                self._board.add_scalar(f"{kind}/{curve}", event[curve], event["step"])

    def flush(self, retry_for_s: float = RETRY_FOR_S) -> None:
        """Make everything appended so far durable; from any thread.

        Raises:
            UserError: the storage kept failing.
        """
        self._board.flush()
        if self._file is not None:
            self._file.flush()
            return
        retrying(self._upload, self._stage, warn, retry_for_s)

    def _upload(self) -> None:
        with self._uploading:
            self._may_write()
            lines = self._lines[:]
            self._stage.write(EVENTS, "".join(f"{line}\n" for line in lines))
            for name in os.listdir(self._board_folder):
                with open(os.path.join(self._board_folder, name), "rb") as file:
                    (self._stage / "tensorboard").write(name, file.read())
            self._uploaded = len(lines)

    def _keep_uploading(self) -> None:
        while not self._closed.wait(UPLOAD_EVERY_S):
            if len(self._lines) > self._uploaded:
                with suppress(OSError, UserError, GroupReplaced):  # `flush` tries for minutes, and says what fails
                    self._upload()

    def close(self) -> None:
        self._closed.set()
        self.flush()
        self._board.close()
        if self._file is not None:
            self._file.close()


def read_events(stage: Folder) -> list[dict[str, Any]]:
    """All events of a stage; a last line that a killed writer left unfinished is not one."""
    try:
        lines = stage.read(EVENTS).decode(errors="replace").splitlines()
    except FileNotFoundError:
        return []
    return [event for event in map(_parse, lines) if event is not None]


def _parse(line: str) -> dict[str, Any] | None:
    try:
        event = json.loads(line)
    except ValueError:
        return None
    return event if isinstance(event, dict) else None


def without_repeated(events: list[dict[str, Any]], resume_step: int) -> list[dict[str, Any]]:
    """The events of a run that goes on at `resume_step`: those of the steps that it will do again are summed up.

    In each group of workers they become one event, where the last of them was: {kind: lost, time: their end, began:
    when the work of the first one began, step: the first one, steps: how many, workers, worker_seconds}.
    """
    kept: list[dict[str, Any]] = []
    dropped: list[dict[str, Any]] = []
    place = 0  # in `kept`, of the group's `lost` event

    def sum_up() -> None:
        if dropped:
            kept.insert(place, _lost(dropped))
            dropped.clear()

    for event in events:
        if event["kind"] == "start":
            sum_up()
        if _survives(event, resume_step):
            kept.append(event)
        elif event["kind"] in ("step", "eval", "samples"):
            dropped.append(event)
            place = len(kept)
    sum_up()
    return kept


def _lost(dropped: list[dict[str, Any]]) -> dict[str, Any]:
    first, last = dropped[0], dropped[-1]
    steps = [event for event in dropped if event["kind"] == "step"]
    began = first["time"] - first.get("seconds", 0.0) + first.get("data_wait_s", 0.0)
    workers = steps[0].get("workers", 1) if steps else 1
    return {
        "kind": "lost",
        "time": last["time"],
        "began": round(began, 3),
        "step": first["step"],
        "steps": len(steps),
        "workers": workers,
        "worker_seconds": round((last["time"] - began) * workers, 3),
    }


def _survives(event: dict[str, Any], resume_step: int) -> bool:
    """Step k is the update from k to k+1; an evaluation, samples or a checkpoint at k come after k updates."""
    if event["kind"] == "step":
        return event["step"] < resume_step
    if event["kind"] in ("eval", "samples", "checkpoint", "finish"):
        return event["step"] <= resume_step
    return True
