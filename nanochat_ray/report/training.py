"""The section of a training stage (base or sft): its curves and figures, from the stage's plan and events."""

from dataclasses import dataclass
from statistics import fmean, median
from typing import Any

from nanochat_ray.plan import Plan, duration, explain
from nanochat_ray.report.document import Block, Plot, Plots, Section, Table, Text
from nanochat_ray.report.goodput import Prices, goodput_blocks, goodput_figures
from nanochat_ray.report.plots import curve
from nanochat_ray.storage import Folder
from nanochat_ray.train.events import read_events
from nanochat_ray.train.ledger import Ledger

Event = dict[str, Any]


@dataclass(frozen=True)
class Training:
    """What a stage's artifacts say; `steps`, `evals` and `samples` are in order of steps."""

    plan: Plan | None
    starts: list[Event]
    steps: list[Event]
    evals: list[Event]
    samples: list[Event]
    checkpoints: list[Event]
    ledger: Ledger

    @property
    def steps_done(self) -> int:
        return self.steps[-1]["step"] + 1

    @property
    def finished(self) -> bool:
        return self.plan is not None and self.steps_done >= self.plan.steps

    @property
    def tok_per_s(self) -> float:
        """Median over steps: the first ones, which compile and warm up, do not count for much."""
        return median(event["tok_per_s"] for event in self.steps)

    @property
    def end_loss(self) -> float:
        """Mean of the last twentieth of the steps: one step's loss says little."""
        return fmean(event["loss"] for event in self.steps[-max(1, len(self.steps) // 20) :])


def read_training(stage: Folder) -> Training | None:
    """What the stage has done; None when it has no step yet.

    Raises:
        UserError: the stage's plan is not JSON or of another version; names the file.
    """
    events = read_events(stage)
    of_kind = {kind: [event for event in events if event.get("kind") == kind] for kind in KINDS}
    if not of_kind["step"]:
        return None
    plan = Plan.from_dict(stage.read_json("plan.json")) if stage.exists("plan.json") else None
    by_step = {kind: sorted(of_kind[kind], key=lambda event: event["step"]) for kind in ("step", "eval", "samples")}
    return Training(
        plan=plan,
        starts=of_kind["start"],
        steps=by_step["step"],
        evals=by_step["eval"],
        samples=by_step["samples"],
        checkpoints=of_kind["checkpoint"],
        ledger=Ledger(events),
    )


KINDS = ("start", "step", "eval", "samples", "checkpoint")


def training_section(title: str, training: Training, prices: Prices) -> Section:
    """Curves, then figures, then where the time went; a stage that has not reached its last step says so first."""
    blocks: list[Block] = [Plots(_plots(training)), Table(("", ""), tuple(_figures(training)))]
    blocks += goodput_blocks(training.ledger, prices)
    if not training.finished:
        planned = f" of {training.plan.steps:,}" if training.plan else ""
        blocks.insert(0, Text(f"Not finished: {training.steps_done:,}{planned} steps are done."))
    return Section(title, tuple(blocks))


def plan_section(title: str, plan: Plan, folded: bool) -> Section:
    """Every number of the plan with the rule it came from."""
    return Section(title, (Table(("", "value", "rule"), tuple(explain(plan)), right=(1,)),), folded)


def _plots(training: Training) -> tuple[Plot, ...]:
    steps, evals = training.steps, training.evals
    x = [event["step"] + 1 for event in steps]
    losses, speeds = [event["loss"] for event in steps], [event["tok_per_s"] for event in steps]
    words = f"{losses[0]:.3f} → {training.end_loss:.3f} (mean of the last 5 %)"
    plots = [Plot("Training loss", curve(x, losses, "nats per token", smooth=True), words)]
    if evals:
        bpbs = [event["val_bpb"] for event in evals]
        words = f"{bpbs[0]:.4f} → {bpbs[-1]:.4f} at step {evals[-1]['step']:,}"
        plots.append(Plot("Validation", curve([event["step"] for event in evals], bpbs, "bits per byte"), words))
    words = f"median {training.tok_per_s:,.0f} tokens per second"
    return (*plots, Plot("Throughput", curve(x, speeds, "tokens per second", smooth=True, from_zero=True), words))


def _figures(training: Training) -> list[tuple[str, str]]:
    steps, starts, checkpoints = training.steps, training.starts, training.checkpoints
    workers = sorted({event["workers"] for event in steps})
    rows = [
        ("steps", f"{training.steps_done:,}"),
        ("tokens", f"{steps[-1]['tokens']:,}"),
        ("workers", f"{workers[0]}" if len(workers) == 1 else f"{workers[0]} to {workers[-1]}"),
    ]
    if starts:
        last = starts[-1]
        settings = [str(last[name]).removeprefix("torch.") for name in ("dtype", "mode") if name in last]
        threads = [f"{last['threads']} threads per worker"] if "threads" in last else []
        rows.append(("numerics", ", ".join(settings + threads)))
        rows.append(("started", "once" if len(starts) == 1 else f"{len(starts)} times, each continuing where it stood"))
    if training.evals:
        best = min(training.evals, key=lambda event: event["val_bpb"])
        rows.append(("best validation", f"{best['val_bpb']:.4f} bits per byte at step {best['step']:,}"))
    rows.append(("throughput", f"{training.tok_per_s:,.0f} tokens per second (median)"))
    if shares := [event["mfu"] for event in steps if event.get("mfu")]:
        rows.append(("of the measured GEMM peak", f"{median(shares):.0%} (median)"))
    if seconds := sum(event.get("seconds", 0.0) for event in steps):
        waited = sum(event.get("data_wait_s", 0.0) for event in steps)
        rows.append(("time in steps", f"{duration(seconds)}, of which {waited / seconds:.1%} waiting for data"))
    rows += goodput_figures(training.ledger)
    if any("cropped_tokens" in event for event in steps):
        cropped = sum(event.get("cropped_tokens", 0) for event in steps)
        rows.append(("cropped by packing", f"{cropped / (cropped + steps[-1]['tokens']):.1%} of the tokens read"))
    if padding := sum(event.get("padding_tokens", 0) for event in steps):
        rows.append(("positions filled by packing", f"{1 - padding / steps[-1]['tokens']:.1%}"))
        targets = sum(event["targets"] for event in steps)
        rows.append(("positions that are trained on", f"{targets / steps[-1]['tokens']:.1%}"))
    if checkpoints:
        size = f", {checkpoints[-1]['bytes'] / 1e6:,.0f} MB each" if "bytes" in checkpoints[-1] else ""
        rows.append(("checkpoints", f"{len(checkpoints)} written{size}"))
    return rows
