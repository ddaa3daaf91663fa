"""Training on machines that come and go, foretold from a trace of how many there were. Standard library only.

trace = read_trace("trace.json")                           # nodes available, one number every so many seconds
simulate(trace, (2, 16), steps, step_seconds, costs)       # hours of training at the costs that were measured
schedule(trace, speedup=60, minutes=10)                    # the same trace as events, to be acted out in minutes

One node of the trace holds one worker (`Trace.with_workers` for more). The labels are those of the goodput ledger
(nanochat_ray/train/ledger.py).
"""

import json
import math
import random
from collections.abc import Callable
from dataclasses import dataclass
from itertools import groupby, pairwise
from pathlib import Path
from typing import NamedTuple

from nanochat_ray.errors import UsageError, UserError

MAX_PASSES = 100  # over a trace; a run that is not done by then never will be


@dataclass(frozen=True)
class Costs:
    """What interruptions and checkpoints cost, in seconds of standstill of all workers.

    Attributes:
        notice_s: at a loss with notice, from the last step before to the first after; nothing is repeated.
        kill_s: the same at a loss without; the steps since the last checkpoint are repeated as well.
        grow_s: the same at growth; the group trains on while the new machines load the libraries.
        start_s: from enough machines to the first step, when there was no group.
        noticed_share: of losses come with notice.
        checkpoint_every_s: seconds of work between checkpoints.
        checkpoint_stall_s: how long work stands still for one.
    """

    notice_s: float
    kill_s: float
    grow_s: float
    start_s: float
    noticed_share: float
    checkpoint_every_s: float
    checkpoint_stall_s: float


# Medians of `python -m jobs.bench recovery` for a tiny model, 2.7, 4.3 and 3.0 s, rounded up; the last one is assumed.
# A real model's state has to travel besides: see `costs_of`.
NOTICE_S, KILL_S, GROW_S, START_S = 3.0, 5.0, 4.0, 20.0
STATE_BYTES_PER_S = 1e9  # assumed, between a worker and the storage
NOTICED_SHARE = 0.9  # assumed: clouds announce most preemptions, but not failures
CHECKPOINT_STALL_S = 1.0  # assumed: weights and optimizer state are copied to the host, written in the background


def costs_of(state_bytes: int, checkpoint_every_s: float) -> Costs:
    """What interruptions cost a model whose checkpoints have so many bytes.

    A new group reads one before its first step; one that leaves on purpose has written it first.
    """
    travel_s = state_bytes / STATE_BYTES_PER_S
    return Costs(
        notice_s=NOTICE_S + 2 * travel_s,
        kill_s=KILL_S + travel_s,
        grow_s=GROW_S + 2 * travel_s,
        start_s=START_S + travel_s,
        noticed_share=NOTICED_SHARE,
        checkpoint_every_s=checkpoint_every_s,
        checkpoint_stall_s=CHECKPOINT_STALL_S,
    )


@dataclass(frozen=True)
class Trace:
    """How many nodes there were, one number every `gap_s` seconds."""

    nodes: tuple[int, ...]
    gap_s: float

    @property
    def seconds(self) -> float:
        return len(self.nodes) * self.gap_s

    def beginning_at(self, sample: int) -> "Trace":
        """The same trace, going round from another of its numbers."""
        return Trace(self.nodes[sample:] + self.nodes[:sample], self.gap_s)

    def with_workers(self, each: int) -> "Trace":
        """How many workers there were, with so many on each node."""
        return Trace(tuple(nodes * each for nodes in self.nodes), self.gap_s)

    def at_most(self, most: int) -> "Trace":
        """The trace of a user who never wants more than so many."""
        return Trace(tuple(min(nodes, most) for nodes in self.nodes), self.gap_s)

    def stretches(self) -> list[tuple[int, float]]:
        """(nodes, seconds that there were so many), in order."""
        return [(nodes, len(list(same)) * self.gap_s) for nodes, same in groupby(self.nodes)]

    def mean_time_between_losses_s(self, least: int) -> float:
        """Seconds with at least so many nodes, per drop from there; infinite without a drop."""
        running = sum(nodes >= least for nodes in self.nodes) * self.gap_s
        losses = sum(before >= least and after < before for before, after in pairwise(self.nodes))
        return running / losses if losses else math.inf


def read_trace(path: str) -> Trace:
    """A JSON file {"metadata": {"gap_seconds": 300}, "data": [4, 4, 3, ...]}, the form of skypilot-org/spot-traces.

    Raises:
        UserError: there is no such file, or it is not of this form.
    """
    try:
        content = json.loads(Path(path).read_text())
        nodes, gap_s = content["data"], float(content["metadata"]["gap_seconds"])
        usable = bool(nodes) and gap_s > 0 and all(isinstance(count, int) and count >= 0 for count in nodes)
    except OSError as error:
        raise UserError(f"the trace {path} cannot be read ({error.strerror}); give --trace another file") from error
    except (ValueError, KeyError, TypeError):
        usable = False
    if not usable:
        raise UserError(
            f"{path} is no trace of machines: expected JSON like "
            '{"metadata": {"gap_seconds": 300}, "data": [4, 4, 3]} with numbers of nodes'
        )
    return Trace(tuple(nodes), gap_s)


@dataclass
class Forecast:
    """How a run would go.

    Attributes:
        spent: worker-seconds by label. As in the ledger, standstill and waiting count at the size of the next group.
        held_s: worker-seconds of the machines that were there, up to MAX: what has to be paid.
        below_min_s: seconds with fewer machines than MIN, before the run was done.
    """

    spent: dict[str, float]
    wall_s: float = 0.0
    held_s: float = 0.0
    below_min_s: float = 0.0
    steps_repeated: int = 0
    notices: int = 0
    kills: int = 0
    growths: int = 0


LABELS = ("useful", "checkpoint_stall", "restart", "repeated_work", "waiting_for_capacity")


def simulate(
    trace: Trace,
    workers: tuple[int, int],
    steps: int,
    step_seconds: Callable[[int], float],
    costs: Costs,
    seed: int = 0,
) -> Forecast:
    """Train `steps` steps on the machines of a trace, from its beginning and round and round.

    A group has as many workers as there are machines, up to MAX; below MIN nobody works. Which losses come with notice
    is drawn by `seed`. A step that is under way when machines go is done again.

    Args:
        step_seconds: seconds of a step by the number of workers.

    Raises:
        UserError: the trace never has enough machines, or the run is not done after 100 passes over it.
    """
    least, most = workers
    if max(trace.nodes) < least:
        raise UserError(f"the trace never has more than {max(trace.nodes)} machines; the run needs {least} (--workers)")
    run, stretches = _Run(costs, random.Random(seed)), trace.at_most(most).stretches()
    for _ in range(MAX_PASSES):
        for nodes, seconds in stretches:
            run.resize(nodes if nodes >= least else 0)
            if not run.is_over(steps):
                run.pass_time(seconds, nodes, steps, step_seconds)
            if run.is_over(steps):
                return run.forecast
    raise UserError(
        f"after {MAX_PASSES} passes over the trace ({MAX_PASSES * trace.seconds / 86400:,.0f} days) only {run.done:,} "
        f"of {steps:,} steps are done; the machines are too few or too slow for this run"
    )


class _Run:
    """The state of a simulated run; times in seconds."""

    def __init__(self, costs: Costs, draw: random.Random):
        self.done = 0
        self.forecast = Forecast(dict.fromkeys(LABELS, 0.0))
        self._costs, self._draw = costs, draw
        self._workers = 0
        self._saved = 0  # steps that a checkpoint holds
        self._step_s = 0.0
        self._partial_s = 0.0  # of the step under way
        self._standstill_s = 0.0  # that the group has before it
        self._stall_s = 0.0  # for a checkpoint, the same
        self._waited_s = 0.0  # since there were enough machines

    def is_over(self, steps: int) -> bool:
        """Whether all steps are done and saved."""
        return self.done == steps and not self._stall_s

    def resize(self, workers: int) -> None:
        """The group of before ends, and one of so many workers begins; 0: none."""
        forecast, before = self.forecast, self._workers
        if workers == before:
            return
        self._stall_s = 0.0
        if workers > before:
            forecast.growths += before > 0
            self._save()
            self._standstill_s = self._costs.grow_s if before else self._costs.start_s
        elif self._draw.random() < self._costs.noticed_share:
            forecast.notices += 1
            self._save()
            self._standstill_s = self._costs.notice_s
        else:
            forecast.kills += 1
            in_vain = self.done - self._saved
            self._spend("useful", -in_vain * self._step_s)
            self._spend("repeated_work", in_vain * self._step_s + self._partial_s)
            forecast.steps_repeated += in_vain
            self.done, self._partial_s = self._saved, 0.0
            self._standstill_s = self._costs.kill_s
        self._workers = workers
        if workers:
            self._spend("waiting_for_capacity", self._waited_s)
            self._waited_s = 0.0

    def pass_time(self, seconds: float, machines: int, steps: int, step_seconds: Callable[[int], float]) -> None:
        """So many seconds with so many machines, or until all steps are done."""
        if self._workers == 0:
            self._waited_s += seconds
            self.forecast.below_min_s += seconds
            left = 0.0
        else:
            self._step_s = step_seconds(self._workers)
            still = min(self._standstill_s, seconds)
            self._standstill_s -= still
            self._spend("restart", still)
            left = self._work(seconds - still, steps)
        self.forecast.wall_s += seconds - left
        self.forecast.held_s += (seconds - left) * machines

    def _work(self, seconds: float, steps: int) -> float:
        """Steps and checkpoints; what is left of the time when all steps are done and saved."""
        between = max(1, math.ceil(min(self._costs.checkpoint_every_s / self._step_s, steps)))  # steps to a checkpoint
        left = seconds
        while True:
            stall = min(self._stall_s, left)
            self._spend("checkpoint_stall", stall)
            self._stall_s -= stall
            left -= stall
            if self._stall_s or self.is_over(steps):
                return left
            due = min(between - (self.done - self._saved), steps - self.done)
            fit = min(due, int((left + self._partial_s) / self._step_s + 1e-9))
            if fit:
                left = max(0.0, left + self._partial_s - fit * self._step_s)
                self._partial_s = 0.0
                self._spend("useful", fit * self._step_s)
                self.done += fit
            if fit < due:
                self._partial_s += left
                return 0.0
            self._saved, self._stall_s = self.done, self._costs.checkpoint_stall_s

    def _save(self) -> None:
        """With the last step that is whole; the one under way is begun anew by the next group."""
        self._spend("restart", self._partial_s)
        self._saved, self._partial_s = self.done, 0.0

    def _spend(self, label: str, seconds: float) -> None:
        self.forecast.spent[label] += seconds * self._workers


class Change(NamedTuple):
    """What happens to the machines of a replay.

    Attributes:
        seconds: since the replay began.
        action: add; drain: they have notice and will go; kill: they are gone at once.
        machines: how many.
    """

    seconds: float
    action: str
    machines: int


def schedule(
    trace: Trace, speedup: float, minutes: float, most: int | None = None, killed_share: float = 0.5, seed: int = 0
) -> list[Change]:
    """The part of a trace with the most changes, to be acted out so many times faster.

    It begins without any machine: the first change adds those of the part's first moment with some.

    Args:
        speedup: seconds of the trace per second of the replay.
        minutes: length of the replay.
        most: machines that there may be at once.
        killed_share: of the machines that go, drawn by `seed`, are killed; the others are drained.

    Raises:
        UsageError: the trace is shorter than the replay.
    """
    samples = max(1, round(minutes * 60 * speedup / trace.gap_s))
    if samples > len(trace.nodes):
        raise UsageError(
            f"{minutes:g} minutes at {speedup:g} times the speed are {samples * trace.gap_s / 3600:.1f} h, "
            f"the trace has {trace.seconds / 3600:.1f} h; replay fewer minutes or more slowly"
        )
    nodes = (trace.at_most(most) if most is not None else trace).nodes
    begin = _liveliest(nodes, samples)
    draw, changes, there = random.Random(seed), list[Change](), 0
    for number, wanted in enumerate(nodes[begin : begin + samples]):
        seconds = number * trace.gap_s / speedup
        killed = sum(draw.random() < killed_share for _ in range(there - wanted))
        for action, machines in (("add", wanted - there), ("kill", killed), ("drain", there - wanted - killed)):
            if machines > 0:
                changes.append(Change(seconds, action, machines))
        there = wanted
    return changes


def _liveliest(nodes: tuple[int, ...], samples: int) -> int:
    """Where the window with the most changes begins; the first of equals."""
    changed = [before != after for before, after in pairwise(nodes)]
    inside = sum(changed[: samples - 1])
    best, begin = inside, 0
    for start in range(1, len(nodes) - samples + 1):
        inside += changed[start + samples - 2] - changed[start - 1] if samples > 1 else 0
        if inside > best:
            best, begin = inside, start
    return begin
