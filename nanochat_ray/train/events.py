"""What happened, one JSON object per line in `<stage>/events.jsonl`, and the same curves for TensorBoard.

Objects have a `kind`: start, step, eval, checkpoint, warning, finish. There is exactly one `step` object per optimizer
step: when a run goes back to a checkpoint, the objects of the steps it will do again are dropped.
"""

import json
import os
import tempfile
import time
from typing import Any

from tensorboardX import SummaryWriter

from nanochat_ray.storage import Folder

EVENTS = "events.jsonl"
_CURVES = {"step": ("loss", "lr", "tok_per_s", "workers", "data_wait_s"), "eval": ("val_bpb",)}


class EventLog:
    """Appends events of one stage; one writer at a time (worker 0).

    A local file is appended to line by line. Object stores cannot append: there the file is rewritten by `flush`.
    """

    def __init__(self, stage: Folder, resume_step: int):
        self._stage = stage
        self._lines = [json.dumps(event) for event in read_events(stage) if _survives(event, resume_step)]
        self._file = None
        if stage.is_local:
            stage.write(EVENTS, "".join(f"{line}\n" for line in self._lines))
            self._file = open(f"{stage}/{EVENTS}", "a", buffering=1)  # noqa: SIM115 (closed in close)
        self._board_folder = f"{stage}/tensorboard" if stage.is_local else tempfile.mkdtemp(prefix="tensorboard-")
        self._board = SummaryWriter(self._board_folder, purge_step=resume_step)

    def append(self, kind: str, **fields: Any) -> None:
        line = json.dumps({"kind": kind, "time": round(time.time(), 3), **fields})
        if self._file is not None:
            self._file.write(line + "\n")
        else:
            self._lines.append(line)
        for curve in _CURVES.get(kind, ()):
            if fields.get(curve) is not None:
                self._board.add_scalar(f"{kind}/{curve}", fields[curve], fields["step"])

    def flush(self) -> None:
        """Make everything appended so far durable."""
        self._board.flush()
        if self._file is not None:
            self._file.flush()
            return
        self._stage.write(EVENTS, "".join(f"{line}\n" for line in self._lines))
        for name in os.listdir(self._board_folder):
            with open(os.path.join(self._board_folder, name), "rb") as file:
                (self._stage / "tensorboard").write(name, file.read())

    def close(self) -> None:
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


def _survives(event: dict[str, Any], resume_step: int) -> bool:
    """Step k is the update from k to k+1; an evaluation or checkpoint at k comes after k updates."""
    if event["kind"] == "step":
        return event["step"] < resume_step
    if event["kind"] in ("eval", "checkpoint", "finish"):
        return event["step"] <= resume_step
    return True
