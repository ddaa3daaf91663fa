"""A plan on machines that come and go: how long, how much of it in vain, and what it costs, with the rule of each."""

from dataclasses import asdict
from functools import partial
from statistics import fmean, median
from typing import Any

from nanochat_ray.plan.hardware import Hardware
from nanochat_ray.plan.printout import aligned, duration
from nanochat_ray.plan.record import Plan
from nanochat_ray.plan.roofline import training_step
from nanochat_ray.plan.spot import LABELS, Costs, Trace, simulate

STARTS = 24
SOURCE = "by jobs.bench recovery, plus the state to the storage and back at 1 GB/s"


def step_seconds(plan: Plan, hardware: Hardware, workers: int) -> float:
    """Of one step on so many workers of that hardware."""
    return training_step(plan, hardware, workers).seconds


def spot_figures(
    plan: Plan,
    hardware: Hardware,
    trace: Trace,
    workers: tuple[int, int],
    costs: Costs,
    spot_price: float | None = None,
    on_demand_price: float | None = None,
) -> dict[str, Any]:
    """How the plan would go if it began at any of STARTS moments of the trace: the median wall time, means of the rest.

    Args:
        spot_price, on_demand_price: dollars per worker and hour; None: what is assumed of the hardware.

    Raises:
        UserError: the plan cannot be done on these machines.
    """
    begins = [len(trace.nodes) * start // STARTS for start in range(STARTS)]
    runs = [
        simulate(
            trace.beginning_at(begin), workers, plan.steps, partial(step_seconds, plan, hardware), costs, seed=begin
        )
        for begin in begins
    ]
    spent = {label: fmean(run.spent[label] for run in runs) for label in LABELS}
    walls = [run.wall_s for run in runs]
    calm_s = plan.steps * step_seconds(plan, hardware, workers[1])
    prices = {
        "spot": spot_price or hardware.spot_per_hour / hardware.workers,
        "on_demand": on_demand_price or hardware.on_demand_per_hour / hardware.workers,
    }
    worker_hours = fmean(run.held_s for run in runs) / 3600
    return {
        "workers": list(workers),
        "wall_s": {"median": median(walls), "least": min(walls), "most": max(walls), "calm": calm_s},
        "below_min_s": fmean(run.below_min_s for run in runs),
        "worker_seconds": spent,
        "goodput": spent["useful"] / sum(spent.values()),
        "goodput_with_capacity": spent["useful"] / (sum(spent.values()) - spent["waiting_for_capacity"]),
        "notices": fmean(run.notices for run in runs),
        "kills": fmean(run.kills for run in runs),
        "growths": fmean(run.growths for run in runs),
        "steps_repeated": fmean(run.steps_repeated for run in runs),
        "worker_hours": worker_hours,
        "costs": asdict(costs),
        "prices": prices,
        "dollars": {
            "spot": worker_hours * prices["spot"],
            "on_demand": calm_s / 3600 * workers[1] * prices["on_demand"],
        },
    }


def spot_table(title: str, figures: dict[str, Any]) -> str:
    """`spot_figures` as aligned text under a title line, each with its rule."""
    (least, most), wall, costs = figures["workers"], figures["wall_s"], figures["costs"]
    prices, dollars = figures["prices"], figures["dollars"]
    spread = f"{duration(wall['least'])} to {duration(wall['most'])}"
    with_capacity = f"{figures['goodput_with_capacity']:.1%} while there are machines enough"
    rows = [
        ("workers", f"{least}:{most}", "one on each GPU of the trace's machines; fewer than MIN wait"),
        ("wall time", duration(wall["median"]), f"median of {STARTS} starts spread over the trace: {spread}"),
        (
            "  without losses",
            duration(wall["calm"]),
            f"steps · the predicted step of {most} workers",
        ),
        ("time below MIN", duration(figures["below_min_s"]), f"with room for fewer than {least}; means from here on"),
        ("goodput", f"{figures['goodput']:.1%}", f"useful / all worker-seconds; {with_capacity}"),
        ("losses with notice", f"{figures['notices']:.1f}", f"{costs['notice_s']:.0f} s of standstill each, {SOURCE}"),
        (
            "losses without",
            f"{figures['kills']:.1f}",
            f"{costs['kill_s']:.0f} s; {1 - costs['noticed_share']:.0%} of losses",
        ),
        (
            "growths",
            f"{figures['growths']:.1f}",
            f"{costs['grow_s']:.0f} s; {costs['start_s']:.0f} s at every start from nothing",
        ),
        (
            "checkpoint every",
            duration(costs["checkpoint_every_s"]),
            f"sqrt(2 · {costs['checkpoint_stall_s']:g} s of stall · mean time between losses without notice)",
        ),
        (
            "steps repeated",
            f"{figures['steps_repeated']:.1f}",
            "those since the last checkpoint, at losses without notice",
        ),
        (
            "worker-hours",
            f"{figures['worker_hours']:,.1f}",
            "of the machines that are there, up to MAX, at work or waiting",
        ),
        ("money, spot", f"${dollars['spot']:,.2f}", f"${prices['spot']:,.2f} per worker-hour"),
        (
            "money, on demand",
            f"${dollars['on_demand']:,.2f}",
            f"${prices['on_demand']:,.2f} per worker-hour, {most} workers without losses",
        ),
        ("saved by spot", f"{1 - dollars['spot'] / dollars['on_demand']:.0%}", "1 − spot / on demand"),
    ]
    return aligned(title, rows)
