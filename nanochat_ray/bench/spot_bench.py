"""A real availability trace acted out in minutes: machines come, get their notice and vanish while a model trains."""

import heapq
import tempfile
import time
from itertools import count, pairwise
from statistics import median, quantiles
from typing import Any

from nanochat_ray.bench.measurement import Line, Watch
from nanochat_ray.bench.recovery_bench import prepared_run
from nanochat_ray.bench.spot_cluster import SpotCluster, spot_cluster
from nanochat_ray.plan.spot import Change
from nanochat_ray.train.ledger import Label, Ledger

NOTICE_S = 12.0
FIRST_STEPS_WITHIN_S = 300.0


def measure_spot(corpus: str, changes: list[Change], minutes: float, most: int) -> dict[str, Any]:
    """Train a tiny model while `changes` happen to its machines; what the ledger of the run says of it.

    Args:
        changes: of `plan.spot.schedule`; the first one adds the machines with which the run begins.
        most: workers, as many as machines at once.
    """
    first = changes[0]
    later = [change._replace(seconds=change.seconds - first.seconds) for change in changes[1:]]
    minutes -= first.seconds / 60
    with tempfile.TemporaryDirectory() as folder, Watch() as watch, spot_cluster(first.machines) as cluster:
        run = prepared_run(cluster, folder, corpus, ["--workers", f"1:{most}"])
        run.wait_for_step(lambda step: step["step"] >= 1, FIRST_STEPS_WITHIN_S)
        act_out(cluster, later, minutes * 60)
        ended, machines = time.time(), len(cluster.machines)
        run.interrupt()
        events = run.events()
    ledger = Ledger(events)
    ledger.close(ended, Label.RESTART if machines else Label.WAITING_FOR_CAPACITY)
    return figures_of(ledger, events, later) | {"machine": watch.to_dict()}


def act_out(cluster: SpotCluster, changes: list[Change], seconds: float) -> None:
    """Let changes happen at their seconds; each machine that has had notice is taken NOTICE_S later."""
    began, order = time.monotonic(), count()
    due = [(change.seconds, next(order), change.action, change.machines) for change in changes]
    heapq.heapify(due)
    noticed: list[str] = []
    while due and due[0][0] < seconds:
        at, _, action, machines = heapq.heappop(due)
        time.sleep(max(0.0, began + at - time.monotonic()))
        for _ in range(machines):
            staying = [machine for machine in cluster.machines if machine not in noticed]
            if action == "add":
                cluster.add()
            elif action == "kill":
                cluster.kill(staying[-1])
            elif action == "drain":
                noticed.append(staying[0])
                cluster.drain(staying[0], NOTICE_S)
                heapq.heappush(due, (time.monotonic() - began + NOTICE_S, next(order), "take", 1))
            else:
                cluster.kill(noticed.pop(0))
    time.sleep(max(0.0, began + seconds - time.monotonic()))


def figures_of(ledger: Ledger, events: list[dict[str, Any]], changes: list[Change]) -> dict[str, Any]:
    """What a run and its ledger say after so many changes."""
    moments = sorted({change.seconds for change in changes})
    steps = [event for event in events if event["kind"] == "step"]
    totals = ledger.totals()
    with_capacity = sum(totals.values()) - totals[Label.WAITING_FOR_CAPACITY]
    by_kind: dict[str, list[float]] = {}
    for recovery in ledger.recoveries:
        by_kind.setdefault(recovery.kind, []).append(recovery.seconds)
    return {
        "changes": len(changes),
        "median_interval_s": median(b - a for a, b in pairwise([0.0, *moments])) if moments else None,
        "goodput": ledger.goodput,
        "goodput_with_capacity": totals[Label.USEFUL] / with_capacity,
        "worker_seconds": {str(label): round(seconds, 1) for label, seconds in totals.items() if seconds},
        "steps": len(steps),
        "steps_done_again": ledger.steps_lost,
        "rows_out_of_order": sum(a["last_row"] >= b["last_row"] for a, b in pairwise(steps)),
        "steps_missing": steps[-1]["step"] + 1 - len(steps),
        "recoveries_s": {kind: _percentiles(seconds) for kind, seconds in by_kind.items()},
    }


def _percentiles(seconds: list[float]) -> dict[str, float]:
    p90 = quantiles(seconds, n=10, method="inclusive")[-1] if len(seconds) > 1 else seconds[0]
    return {"events": len(seconds), "median": round(median(seconds), 1), "p90": round(p90, 1)}


def spot_lines(figures: dict[str, Any]) -> list[Line]:
    """The figures for people."""
    spent = figures["worker_seconds"]
    shares = ", ".join(f"{label} {seconds / sum(spent.values()):.0%}" for label, seconds in spent.items())
    recoveries = [
        Line(f"standstill, {kind}", f"{seen['median']} s (p90 {seen['p90']})", f"{seen['events']} times")
        for kind, seen in figures["recoveries_s"].items()
    ]
    seconds = figures["median_interval_s"]
    interval = "" if seconds is None else f"median interval {seconds:g} s"
    return [
        Line("changes of the machines", f"{figures['changes']}", interval),
        Line("useful worker time while there were machines", f"{figures['goodput_with_capacity']:.1%}", "goal 80 %"),
        Line("… of all worker time", f"{figures['goodput']:.1%}", shares),
        Line("steps done", f"{figures['steps']}", f"{figures['steps_done_again']} of them twice"),
        Line("rows that are in the history twice", f"{figures['rows_out_of_order']}", "goal 0"),
        Line("steps that are missing in it", f"{figures['steps_missing']}", "goal 0"),
        *recoveries,
    ]
