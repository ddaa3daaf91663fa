"""Where the time of a stage went: every worker-second gets one label, from the stage's events alone. No Ray, no torch.

ledger = Ledger(read_events(stage))          # or ledger.add(event), as they come
ledger.goodput, ledger.totals(), ledger.segments(), ledger.recoveries

What the labels are taken from:
- A group of workers begins with a `start` event. The time since the last event of the same attempt (since the user's
  command began training, for its first group), up to the work of the group's first step, is *waiting for capacity* for
  as long as `waited_for_capacity_s` says, and *restart* beyond that. It counts at the size of the group that follows.
  The time between two attempts, when nobody ran, does not count.
- A `step` event is written at its step's end. Of its `seconds`, `data_wait_s` are *data wait*, `compile_s` *compile*,
  the rest *useful*. Where there is no `compile_s`, the time by which the first steps of a compiled group exceed the
  median of its later ones is *compile*. `stall_s` of the time since the former step's end was a *checkpoint stall*.
- An `eval` or `samples` event ends `seconds` of *evaluation*.
- What a group does between its last step and its `leave` or `finish` event is a *checkpoint stall*: it saves.
- A `checkpoint` event without `stall_s` is from a version that stopped to write: its `seconds` are a stall.
- A `lost` event stands for steps that were done in vain; their time is *repeated work*.
- What is left between the steps of a group is *other*.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field
from enum import StrEnum
from statistics import median
from typing import Any, NamedTuple

Event = dict[str, Any]

FIRST_STEPS = 2  # of a compiled group: the forward and backward pass compile in the first, the optimizer in the second
LATER_STEPS = 32  # whose median the first steps are compared with


class Label(StrEnum):
    """What a worker-second was spent on, in the order in which people are shown them."""

    USEFUL = "useful"
    COMPILE = "compile"
    DATA_WAIT = "data_wait"
    EVALUATION = "evaluation"
    CHECKPOINT_STALL = "checkpoint_stall"
    RESTART = "restart"
    REPEATED_WORK = "repeated_work"
    WAITING_FOR_CAPACITY = "waiting_for_capacity"
    OTHER = "other"


class Segment(NamedTuple):
    """A stretch of time, in seconds since the epoch, that all workers spent alike."""

    begin: float
    end: float
    workers: int
    label: Label

    @property
    def worker_seconds(self) -> float:
        return (self.end - self.begin) * self.workers


class Recovery(NamedTuple):
    """From the end of a group's last step to that of the next group's first one, while there were machines enough."""

    kind: str  # killed: without a word; notice: left with a checkpoint; grown: left, to go on with more workers
    seconds: float


@dataclass
class _Group:
    workers: int
    compiled: bool = False
    steps: int = 0
    last_step_at: float | None = None  # None: still starting
    left: bool = False
    waited_s: float = 0.0  # for machines, since a group did a step
    first: list[tuple[float, float]] = field(default_factory=list)  # work of steps that may have compiled
    later: list[float] = field(default_factory=list)  # seconds of work of steps that did not


class Ledger:
    """The account of a stage, kept up event by event in constant time.

    Events without `time`, of kinds that take no time or of older versions are no error: what they do not say is 0.
    """

    def __init__(self, events: Iterable[Event] = ()):
        self.steps_lost = 0
        self.restarts = 0  # groups after the first one of an attempt
        self.recoveries: list[Recovery] = []
        self._segments: list[Segment] = []
        self._totals = dict.fromkeys(Label, 0.0)
        self._at = float("-inf")  # all before is labelled
        self._attempt: str | None = None
        self._group: _Group | None = None
        self._former: _Group | None = None  # the last one of this attempt that did a step
        for event in events:
            self.add(event)

    def add(self, event: Event) -> None:
        """Account for the time up to an event; events come in the order of the file."""
        kind = event.get("kind")
        if "time" not in event:
            return
        if kind == "start":
            self._start(event)
        elif kind == "step":
            self._step(event)
        elif kind == "lost":
            self._lost(event)
        elif self._group is None:
            return  # nothing is known of the time before
        elif kind in ("leave", "finish"):
            self._spend(event["time"], Label.CHECKPOINT_STALL)
            self._group.left = True
        elif kind in ("eval", "samples"):
            self._pause(event, Label.EVALUATION)
        elif kind == "checkpoint" and "stall_s" not in event:
            self._pause(event, Label.CHECKPOINT_STALL)

    def close(self, at: float, label: Label) -> None:
        """Account for the time since the last event: no other comes, and that is what it was spent on."""
        self._settle_first_steps()
        if self._group is not None:
            self._spend(at, label)

    @property
    def goodput(self) -> float | None:
        """The useful share of all worker-seconds; None before the first one."""
        totals = self.totals()
        everything = sum(totals.values())
        return totals[Label.USEFUL] / everything if everything else None

    def totals(self) -> dict[Label, float]:
        """Worker-seconds by label, all labels."""
        totals = dict(self._totals)
        for segment in self._first_steps():
            totals[segment.label] += segment.worker_seconds
        return totals

    def segments(self) -> list[Segment]:
        """The timeline: in order, without overlap, and without holes but those between attempts."""
        return sorted([*self._segments, *self._first_steps()])

    def _start(self, event: Event) -> None:
        self._settle_first_steps()
        old, attempt = self._group, event.get("attempt")
        if attempt is not None and attempt == self._attempt:
            self.restarts += 1
            if old is not None and old.last_step_at is not None:
                self._former = old
            elif self._former is not None:
                self._former.left = False  # the group after it was lost before it had begun
        else:
            began = event.get("attempt_began") or event.get("entered") or event["time"]
            self._at, self._former = max(self._at, began), None
        self._attempt = attempt
        waited = event.get("waited_for_capacity_s") or 0.0
        in_vain_s = old.waited_s if old is not None and old.last_step_at is None else 0.0
        compiled = event.get("mode", "").startswith("compiled")
        self._group = _Group(event.get("workers", 1), compiled=compiled, waited_s=in_vain_s + waited)
        self._spend(min(self._at + waited, event["time"]), Label.WAITING_FOR_CAPACITY)
        self._spend(event["time"], Label.RESTART)

    def _step(self, event: Event) -> None:
        end, seconds = event["time"], event.get("seconds", 0.0)
        group = self._group_of(event, end - seconds)
        work = max(0.0, seconds - event.get("data_wait_s", 0.0))
        if group.last_step_at is None:
            self._spend(end - work, Label.RESTART)  # the first data come when the new readers have begun
        else:
            self._spend(min(self._at + (event.get("stall_s") or 0.0), end), Label.CHECKPOINT_STALL)
            self._spend(end - seconds, Label.OTHER)
            self._spend(end - work, Label.DATA_WAIT)
        group.steps += 1
        if "compile_s" in event:
            self._spend(min(self._at + event["compile_s"], end), Label.COMPILE)
        elif group.compiled and group.steps <= FIRST_STEPS:
            group.first.append((self._at, max(self._at, end)))
            self._at = max(self._at, end)
        elif group.first:
            group.later.append(max(0.0, end - self._at))
            if len(group.later) == LATER_STEPS:
                self._settle_first_steps()
        self._spend(end, Label.USEFUL)
        self._note_step(group, first_end=end, last_end=end)

    def _lost(self, event: Event) -> None:
        group = self._group_of(event, event["began"])
        if group.last_step_at is None:
            self._spend(event["began"], Label.RESTART)
        self._spend(event["time"], Label.REPEATED_WORK)
        self.steps_lost += event["steps"]
        one_step = (event["time"] - event["began"]) / max(1, event["steps"])
        self._note_step(group, first_end=event["began"] + one_step, last_end=event["time"])

    def _pause(self, event: Event, label: Label) -> None:
        assert self._group is not None, "the caller looked"
        starting = self._group.last_step_at is None
        self._spend(event["time"] - event.get("seconds", 0.0), Label.RESTART if starting else Label.OTHER)
        self._spend(event["time"], label)

    def _group_of(self, event: Event, began: float) -> _Group:
        """The group that did a step; the files of old versions may not say when it began."""
        if self._group is None:
            self._group, self._at = _Group(event.get("workers", 1)), began
        return self._group

    def _note_step(self, group: _Group, first_end: float, last_end: float) -> None:
        former = self._former
        if group.last_step_at is None and former is not None and former.last_step_at is not None:
            kind = "killed" if not former.left else "grown" if group.workers > former.workers else "notice"
            self.recoveries.append(Recovery(kind, max(0.0, first_end - former.last_step_at - group.waited_s)))
        group.last_step_at = last_end

    def _spend(self, until: float, label: Label) -> None:
        """Label the time up to `until`; clocks of two machines differ a little, and what is labelled stays so."""
        assert self._group is not None, "only groups spend time"
        if until <= self._at:
            return
        segment = Segment(self._at, until, self._group.workers, label)
        last = self._segments[-1] if self._segments else None
        if last is not None and (last.end, last.workers, last.label) == segment[:1] + segment[2:]:
            self._segments[-1] = last._replace(end=until)
        else:
            self._segments.append(segment)
        self._totals[label] += segment.worker_seconds
        self._at = until

    def _first_steps(self) -> list[Segment]:
        """The first steps of a compiled group as far as can be told now."""
        group = self._group
        if group is None or not group.first:
            return []
        usual = median(group.later) if group.later else min(end - begin for begin, end in group.first)
        segments = []
        for begin, end in group.first:
            compiled = max(begin, end - usual)
            segments.append(Segment(begin, compiled, group.workers, Label.COMPILE))
            segments.append(Segment(compiled, end, group.workers, Label.USEFUL))
        return [segment for segment in segments if segment.end > segment.begin]

    def _settle_first_steps(self) -> None:
        segments = self._first_steps()
        for segment in segments:
            self._segments.append(segment)
            self._totals[segment.label] += segment.worker_seconds
        if self._group is not None:
            self._group.first.clear()
