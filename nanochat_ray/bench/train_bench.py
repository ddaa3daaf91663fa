"""The training step beside the machine's matrix multiplication, and the same steps through Ray Train and Ray Data."""

import tempfile
from contextlib import ExitStack
from itertools import islice
from statistics import median
from typing import Any

from nanochat_ray.bench.bare_training import WARMUP_STEPS, BareRun, bare_loop
from nanochat_ray.bench.measurement import Line, Watch, in_fresh_process
from nanochat_ray.cluster import connect
from nanochat_ray.data.corpus import Corpus
from nanochat_ray.plan import Plan
from nanochat_ray.storage import Folder
from nanochat_ray.stream.cursor import RowId
from nanochat_ray.stream.rows import PretrainingRows, micro_batches
from nanochat_ray.tokenizer import Tokenizer
from nanochat_ray.train.events import read_events
from nanochat_ray.train.job import TrainingJob
from nanochat_ray.train.lease import Lease
from nanochat_ray.train.loop import Cadence
from nanochat_ray.train.ray_trainer import run_training

NEVER = 10**9
PEAK_GOAL, UPDATE_GOAL, RAY_GOAL = 0.5, 0.08, 0.05
LARGE_BATCH_TOKENS = 2**16  # of the steps that the update must not take much of
PROCESS_ALLOWANCE = 10**9  # bytes: the interpreter, torch, Ray and what they keep
WORKER_NAME = "TrainWorker"  # Ray writes the actor's class into the process's title


def measure_training(
    plan: Plan, tokenizer: Tokenizer, corpus: Corpus, dtype: str | None, kernels: str, compile: str
) -> dict[str, Any]:
    """Bare loop, the same through Ray, bare loop again, so that a machine that changes its speed is noticed.

    The bare loop has its micro-batches in memory, so the cost of Ray includes reading, encoding and packing the text.

    Args:
        plan: its first WARMUP_STEPS steps are not counted.
        dtype: by name; None takes what the hardware multiplies best.
        kernels, compile: "auto", "on" or "off".
    """
    source = PretrainingRows(tokenizer, plan.model.sequence_len)
    with ExitStack() as block:
        stage = Folder.at(block.enter_context(tempfile.TemporaryDirectory())) / "base"
        watch, lease = block.enter_context(Watch()), block.enter_context(Lease.acquire(stage))
        job = TrainingJob(
            stage=stage,
            plan=plan,
            tokenizer=tokenizer,
            source=source,
            train_units=corpus.train,
            validation_units=corpus.validation,
            corpus_fingerprint=corpus.fingerprint,
            eval_micro_batches=1,
            cadence=Cadence(eval_every_steps=NEVER, checkpoint_every_s=NEVER),
            keep_checkpoints=1,
            dtype=dtype,
            kernels=kernels,
            compile=compile,
            fence=lease.fence,
        )
        rows = micro_batches(source, corpus.train, plan.micro_batch_rows, RowId(0, 0, 0), plan.seed)
        batches = list(islice(rows, plan.steps * plan.micro_batches))
        arguments = (plan, batches, job.identity, dtype, kernels, compile)
        bare = [in_fresh_process(bare_loop, *arguments)]
        with connect(None, workers=1) as cluster:
            run_training(job, cluster, (1, 1))
        steps = [event for event in read_events(job.stage) if event["kind"] == "step"][WARMUP_STEPS:]
        bare.append(in_fresh_process(bare_loop, *arguments))
    bare_peak = max(watch.peaks[run.process][1] for run in bare)
    return _figures(plan, bare, steps) | {
        "memory": _memory(plan, bare[0].dtype) | {"worker_peak": watch.peak_of(WORKER_NAME), "bare_peak": bare_peak},
        "machine": watch.to_dict(),
    }


def _figures(plan: Plan, bare: list[BareRun], ray_steps: list[dict[str, Any]]) -> dict[str, Any]:
    peak = median(flops for run in bare for flops in run.gemm_flops)
    micro_batch_tokens = plan.batch_tokens // plan.micro_batches
    forward_backward = micro_batch_tokens / median(seconds for run in bare for seconds in run.forward_backward_s)
    step = plan.batch_tokens / median(seconds for run in bare for seconds in run.step_s)
    update_s = median(seconds for run in bare for seconds in run.update_s)
    ray = plan.batch_tokens / median(event["seconds"] for event in ray_steps)

    def of_peak(tokens_per_s: float) -> float:
        return round(plan.flops_per_token * tokens_per_s / peak, 4)

    return {
        "depth": plan.depth,
        "width": plan.model.n_embd,
        "vocab_size": plan.model.vocab_size,
        "sequence_len": plan.model.sequence_len,
        "micro_batch_rows": plan.micro_batch_rows,
        "micro_batches": plan.micro_batches,
        "flops_per_token": plan.flops_per_token,
        "device": bare[0].device,
        "dtype": bare[0].dtype,
        "mode": bare[0].mode,
        "threads": bare[0].threads,
        "steps": len(ray_steps),
        "gemm_peak_flops": round(peak),
        "forward_backward_tok_per_s": round(forward_backward, 1),
        "forward_backward_of_peak": of_peak(forward_backward),
        "step_tok_per_s": round(step, 1),
        "step_of_peak": of_peak(step),
        "update_s": round(update_s, 4),
        "update_of_large_step": round(update_s / (update_s + LARGE_BATCH_TOKENS / forward_backward), 4),
        "bare_runs_tok_per_s": [round(plan.batch_tokens / median(run.step_s), 1) for run in bare],
        "ray_tok_per_s": round(ray, 1),
        "ray_of_peak": of_peak(ray),
        "cost_of_ray": round(1 - ray / step, 4),
        "data_wait": round(sum(event["data_wait_s"] for event in ray_steps) / sum(e["seconds"] for e in ray_steps), 5),
        "loss": ray_steps[-1]["loss"],
    }


def _memory(plan: Plan, dtype: str) -> dict[str, int]:
    """The parts of the bound on a worker's peak, in bytes; gradients are not a part, they must fit in the allowance."""
    shape = plan.model
    activations = shape.activation_bytes(plan.micro_batch_rows, 4 if "32" in dtype else 2)
    parts = {"weights": shape.weight_bytes(), "optimizer": shape.optimizer_bytes(), "activations": activations}
    return {**parts, "allowance": PROCESS_ALLOWANCE, "bound": sum(parts.values()) + PROCESS_ALLOWANCE}


def training_lines(figures: dict[str, Any]) -> list[Line]:
    """The figures as a table for people."""
    memory = figures["memory"]
    first, second = figures["bare_runs_tok_per_s"]
    parts = " + ".join(f"{name} {memory[name] / 1e9:.2f}" for name in ("weights", "optimizer", "activations"))
    goal = f"of the GEMM peak (goal ≥ {PEAK_GOAL:.0%})"
    lines = [
        Line(
            f"matrix multiplication, {figures['dtype']}",
            f"{figures['gemm_peak_flops'] / 1e9:,.0f} GFLOP/s",
            f"{figures['device']}, {figures['threads']} threads, measured between the steps",
        ),
        Line(
            "forward and backward",
            f"{figures['forward_backward_tok_per_s']:,.0f} tok/s",
            f"{figures['forward_backward_of_peak']:.1%} {goal}; {figures['mode']}",
        ),
        Line(
            f"step of {figures['micro_batches']} micro-batches with update",
            f"{figures['step_tok_per_s']:,.0f} tok/s",
            f"{figures['step_of_peak']:.1%} {goal}; the two runs had {first:,.0f} and {second:,.0f}",
        ),
        Line(
            "the update alone",
            f"{figures['update_s'] * 1e3:,.0f} ms",
            f"{figures['update_of_large_step']:.1%} of a step of {LARGE_BATCH_TOKENS:,} (goal ≤ {UPDATE_GOAL:.0%})",
        ),
        Line(
            "the same through Ray Train and Ray Data",
            f"{figures['ray_tok_per_s']:,.0f} tok/s",
            f"cost of Ray {figures['cost_of_ray']:.1%} (goal ≤ {RAY_GOAL:.0%})",
        ),
        Line("waiting for data", f"{figures['data_wait']:.2%}", "of the step's time"),
        Line("peak memory of the bare process", f"{memory['bare_peak'] / 1e9:.2f} GB"),
    ]
    if memory["worker_peak"] is not None:
        beside = f"bound {memory['bound'] / 1e9:.2f} GB = {parts} + 1"
        lines.append(Line("peak memory of the Ray worker", f"{memory['worker_peak'] / 1e9:.2f} GB", beside))
    return lines
