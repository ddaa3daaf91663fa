"""How long training stands still when machines go and come: the user's command on a simulated spot cluster."""

import subprocess
import sys
import tempfile
import time
from statistics import median
from typing import Any

from nanochat_ray.bench.measurement import Line, Watch
from nanochat_ray.bench.spot_cluster import ROOT, SpotCluster, spot_cluster
from nanochat_ray.bench.spot_run import Event, SpotRun
from nanochat_ray.errors import UserError
from nanochat_ray.storage import run_folder

GOALS_S = {"killed": 15.0, "noticed": 10.0, "added": 15.0}
RAY_DEFAULTS_S = {"killed": 77.0, "noticed": 51.0, "added": 20.8}  # Ray Train's own elastic policy, in trials
WORDS = {
    "killed": "machine killed → next step",
    "noticed": "machine with notice: last step before it goes → next step",
    "added": "machine added → first step with it",
}
GOES_ON = "training goes on"
PHASES = ("until workers begin", "build and load", "first step")
NOTICE_S = 12.0
CHECKPOINT_EVERY_S = 5.0
STEPS_BETWEEN = 10  # so that the new group is at work, not only begun
REST_S = 15.0  # between events, which come at least minutes apart; the spare processes are there again by then
RUN = "spot"
TINY = (
    "--depth 2 --sequence-len 128 --micro-batch-rows 4 --batch-tokens 6144 "
    "--steps 30000 --eval-every 30000 --eval-tokens 3072"
)


def measure_recovery(corpus: str, repeats: int) -> dict[str, Any]:
    """Kill one of two machines, add one, drain one and add one again, `repeats` times, while a tiny model trains.

    Returns:
        For each kind of event the seconds of standstill, their median and worst and the median of each phase, with
        the steps that were lost.

    Raises:
        UserError: the corpus cannot be used.
    """
    with tempfile.TemporaryDirectory() as folder, Watch() as watch, spot_cluster(machines=2) as cluster:
        run = prepared_run(cluster, folder, corpus, ["--workers", "1:2", "--checkpoint-every", str(CHECKPOINT_EVERY_S)])
        observed = _Observed(run)
        observed.settle(workers=2)
        for turn in range(repeats):
            machine = cluster.machines[turn % 2]  # so that worker 0 is sometimes the one that goes
            began = time.time()
            cluster.kill(machine)
            observed.note("killed", began, workers=1)
            cluster.add()
            observed.note("added", time.time(), workers=2)
            machine = cluster.machines[turn % 2]
            deadline = cluster.drain(machine, NOTICE_S)
            observed.note("noticed", None, workers=1)
            time.sleep(max(0.0, deadline - time.time()))
            cluster.kill(machine)
            cluster.add()
            observed.note("added", time.time(), workers=2)
        run.interrupt()
        repeated = sum(event["steps"] for event in run.events("lost"))
    return {"events": observed.figures(), "steps_repeated": repeated, "machine": watch.to_dict()}


def prepared_run(cluster: SpotCluster, folder: str, corpus: str, flags: list[str]) -> SpotRun:
    """A tokenizer, and the pretraining of a tiny model that goes on until it is interrupted."""
    where = ["--storage", folder, "--run", RUN, "--corpus", corpus]
    command = [sys.executable, "-m", "jobs.tokenizer", *where, "--vocab-size", "1024", "--json"]
    tokenizer = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if tokenizer.returncode != 0:
        raise UserError(f"no tokenizer could be trained: {tokenizer.stderr.strip()}")
    flags = [*where, *TINY.split(), "--compile", "off", *flags]
    return SpotRun(cluster, "pretrain", run_folder(folder, RUN) / "base", flags)


class _Observed:
    """Follows a run from event to event."""

    def __init__(self, run: SpotRun):
        self._run = run
        self._groups = 0  # seen so far
        self._standstills: dict[str, list[dict[str, float]]] = {kind: [] for kind in GOALS_S}

    def settle(self, workers: int) -> Event:
        """Until a new group of that size has done some steps; its start."""
        self._run.wait_for_step(lambda step: self._is_at_work(step, workers))
        self._groups = len(self._run.events("start"))
        return self._run.events("start")[-1]

    def note(self, kind: str, began: float | None, workers: int) -> None:
        """Wait for the group after an event at `began`; None: the standstill began with the old group's last step."""
        start = self.settle(workers)
        steps = [step["time"] for step in self._run.events("step")]
        last, first = max(t for t in steps if t < start["time"]), min(t for t in steps if t > start["time"])
        began = last if began is None else began
        stopped = last if kind == "added" else began
        ends = (stopped, start["entered"], start["time"], first)
        phases = {phase: ends[i + 1] - ends[i] for i, phase in enumerate(PHASES)}
        if kind == "added":
            phases = {GOES_ON: stopped - began, **phases}
        self._standstills[kind].append({"seconds": first - began, **phases})
        time.sleep(REST_S)

    def figures(self) -> dict[str, Any]:
        return {
            kind: {
                "events": len(seen),
                "median_s": median(standstill["seconds"] for standstill in seen),
                "worst_s": max(standstill["seconds"] for standstill in seen),
                "phases_s": {phase: median(each[phase] for each in seen) for phase in seen[0] if phase != "seconds"},
            }
            for kind, seen in self._standstills.items()
        }

    def _is_at_work(self, step: Event, workers: int) -> bool:
        groups = self._run.events("start")
        new = len(groups) > self._groups and groups[-1]["workers"] == workers == step["workers"]
        return new and step["step"] >= groups[-1]["step"] + STEPS_BETWEEN


def recovery_lines(figures: dict[str, Any]) -> list[Line]:
    """The figures for people."""
    lines = []
    for kind, seen in figures["events"].items():
        beside = f"goal {GOALS_S[kind]:g} s; Ray Train's own elastic policy took {RAY_DEFAULTS_S[kind]:g} s in a trial"
        spread = f"{seen['median_s']:.1f} s (worst of {seen['events']}: {seen['worst_s']:.1f})"
        lines.append(Line(WORDS[kind], spread, beside))
        lines += [Line(f"  … {phase}", f"{seconds:.1f} s") for phase, seconds in seen["phases_s"].items()]
    return [*lines, Line("steps done again", f"{figures['steps_repeated']}", f"saved every {CHECKPOINT_EVERY_S:g} s")]
