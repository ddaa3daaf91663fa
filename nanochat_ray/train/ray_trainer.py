"""RAY SHELL: the training loop on Ray Train workers, fed in order by Ray Data.

Every worker group, the first one and each after a restart or resize, begins the same way: the newest valid checkpoint
says where the stream goes on, the dataset is planned from there, the workers load the same checkpoint.
"""

import argparse
import os
import statistics
import sys
import uuid
from collections.abc import Iterator
from dataclasses import astuple, dataclass, replace
from itertools import islice, takewhile
from typing import Any

import ray.train
import torch
import torch.distributed as dist
from ray.train import FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchConfig, TorchTrainer

from nanochat_ray.cluster import Cluster, require_room
from nanochat_ray.data.corpus import Unit
from nanochat_ray.device import gemm_peak, pick_device, pick_dtype
from nanochat_ray.errors import UserError
from nanochat_ray.eval.bpb import evaluate_bpb
from nanochat_ray.model.compilation import compile_for_training
from nanochat_ray.model.optim import build_optimizer
from nanochat_ray.plan import Plan, differences, lr_multiplier
from nanochat_ray.storage import Folder
from nanochat_ray.stream.cursor import Cursor, RowId, StreamIdentity
from nanochat_ray.stream.ray_stream import micro_batch_dataset, ordered_data_config, read_micro_batches
from nanochat_ray.stream.rows import MicroBatch, RowSource, micro_batches
from nanochat_ray.tokenizer import Tokenizer
from nanochat_ray.train.checkpoint import Checkpoints, TrainState, build_model
from nanochat_ray.train.events import EventLog, read_events
from nanochat_ray.train.loop import Cadence, Hooks, train
from nanochat_ray.train.progress import live_progress
from nanochat_ray.train.step import StepResult, World

FAILURE = "failure.json"  # why this attempt must not be restarted, written by the worker that knows
LAST_ERROR = "last_error.json"  # what broke the last worker group
RESTARTS_WITHOUT_PROGRESS = 2  # lost machines may restart a run for ever, a bug must not
CPUS_PER_DATA_TASK = 0.5
EVALS_PER_RUN = 4
EVAL_FRACTION = 50
PEAK_AFTER_STEPS = 2  # by then the other processes of a group have started and left the cores alone
COMPILE_ABOVE_FLOPS = 1e14  # a quarter of an hour of two cores
MIN_EVAL_TOKENS, MAX_EVAL_TOKENS = 2**14, 40 * 2**19


@dataclass(frozen=True)
class TrainingJob:
    """All that a stage of training is, as plain data: what to train, on which rows, how often to look and save."""

    stage: Folder
    plan: Plan
    tokenizer: Tokenizer
    source: RowSource
    train_units: tuple[Unit, ...]
    validation_units: tuple[Unit, ...]
    corpus_fingerprint: str
    eval_micro_batches: int
    cadence: Cadence
    keep_checkpoints: int
    dtype: str | None  # None: what the hardware multiplies best
    compile: str  # auto | on | off
    initial_model: Folder | None = None  # a finished stage whose weights to begin with
    attempt: str = ""

    @staticmethod
    def from_flags(args: argparse.Namespace, **given: Any) -> "TrainingJob":
        """A job whose cadence and numerics come from `cli.TRAINING_FLAGS`, the rest from `given`."""
        plan: Plan = given["plan"]
        eval_tokens = args.eval_tokens or max(plan.tokens // EVAL_FRACTION, MIN_EVAL_TOKENS)
        return TrainingJob(
            eval_micro_batches=max(1, min(eval_tokens, MAX_EVAL_TOKENS) // (plan.batch_tokens // plan.micro_batches)),
            cadence=Cadence(args.eval_every or -(-plan.steps // EVALS_PER_RUN), args.checkpoint_every),
            keep_checkpoints=args.keep_checkpoints,
            dtype=args.dtype,
            compile=args.compile,
            **given,
        )

    @property
    def identity(self) -> StreamIdentity:
        return StreamIdentity(
            corpus=self.corpus_fingerprint,
            tokenizer=self.tokenizer.fingerprint,
            sequence_len=self.plan.model.sequence_len,
            micro_batch_rows=self.plan.micro_batch_rows,
            micro_batches=self.plan.micro_batches,
            seed=self.plan.seed,
        )

    def saved_state(self) -> TrainState | None:
        """The newest valid state, or None before the first checkpoint.

        Raises:
            UserError: it belongs to another plan or another stream; names each difference.
        """
        checkpoints = Checkpoints.of(self.stage)
        step = checkpoints.newest_valid(warn)
        if step is None:
            return None
        state = checkpoints.state(step)
        state.cursor.require_identity(self.identity)
        changed = differences(state.plan, self.plan)
        if changed:
            raise UserError(
                f"{self.stage} was trained to step {step} with another plan: {'; '.join(changed)}. "
                "Give the old values, use another --run, or start anew with --fresh"
            )
        return state


def run_training(job: TrainingJob, cluster: Cluster, workers: tuple[int, int]) -> bool:
    """Train, with a live line, until the plan's last step is saved; False when it already was.

    Raises:
        UserError: the cluster is too small, what a worker reported as the user's to mend, or workers kept failing.
    """
    job = replace(job, attempt=uuid.uuid4().hex)
    state = job.saved_state()
    if state is not None and state.cursor.step == job.plan.steps:
        print(f"{job.stage} is trained: {job.plan.steps} steps are done (--fresh starts anew)")
        return False
    resources = {"GPU": 1.0, "CPU": 1.0} if cluster.gpus else {"CPU": 1.0}
    require_room(cluster, workers[0], resources)
    job.stage.write_json("plan.json", job.plan.to_dict())
    trainer = TorchTrainer(
        _train_on_worker,
        train_loop_config={"job": job},
        datasets={"train": lambda: _dataset_from_checkpoint(job)},
        dataset_config=ordered_data_config(),
        torch_config=TorchConfig(backend="nccl" if "GPU" in resources else "gloo"),
        scaling_config=ScalingConfig(
            num_workers=workers[0] if workers[0] == workers[1] else workers,  # type: ignore[arg-type]
            resources_per_worker=resources,
            use_gpu="GPU" in resources,
        ),
        run_config=RunConfig(
            name=job.attempt,  # never an old name: our own checkpoints say where to go on
            storage_path=str(job.stage / "ray"),
            failure_config=FailureConfig(max_failures=-1),
        ),
    )
    try:
        with live_progress(job.stage, job.plan.steps):
            trainer.fit()
        _raise_reported_failure(job)
    except ray.train.TrainingFailedError as error:
        _raise_reported_failure(job)
        raise UserError(f"training failed: {_last_line(str(error))}") from error
    finally:
        for leftover in ("ray", FAILURE, LAST_ERROR):
            job.stage.delete(leftover)
    return True


def training_figures(stage: Folder) -> dict[str, Any]:
    """The last loss and evaluation of a stage, its tokens, and the median speed of its steps."""
    events = read_events(stage)
    steps = [event for event in events if event["kind"] == "step"]
    evals = [event for event in events if event["kind"] == "eval"]
    return {
        "steps": len(steps),
        "tokens": steps[-1]["tokens"],
        "loss": steps[-1]["loss"],
        "val_bpb": evals[-1]["val_bpb"],
        "tok_per_s": statistics.median(event["tok_per_s"] for event in steps),
    }


def _dataset_from_checkpoint(job: TrainingJob) -> ray.data.Dataset:
    state = job.saved_state()
    start, done = (state.cursor.next_row, state.cursor.step) if state else (RowId(0, 0, 0), 0)
    plan = job.plan
    remaining = (plan.steps - done) * plan.batch_tokens
    return micro_batch_dataset(
        job.source, job.train_units, plan.micro_batch_rows, plan.seed, start, remaining, CPUS_PER_DATA_TASK
    )


def _train_on_worker(config: dict[str, Any]) -> None:
    job: TrainingJob = config["job"]
    if _reported_failure(job) is not None:
        return  # a restart cannot help; the driver will say why
    try:
        _Worker(job).run()
    except UserError as error:
        cause = getattr(error, "cause", error)  # Ray wraps what a data task raised, with its remote traceback
        job.stage.write_json(FAILURE, {"attempt": job.attempt, "message": str(cause)})
        if dist.is_initialized():
            dist.destroy_process_group()  # so that workers waiting in a collective stop waiting
    except Exception as error:
        job.stage.write_json(LAST_ERROR, {"message": f"{type(error).__name__}: {error}"})
        raise


class _Worker:
    """One training worker: builds everything from the job and the newest checkpoint, then runs the loop."""

    def __init__(self, job: TrainingJob):
        context = ray.train.get_context()
        device, _ = pick_device()
        self.job = job
        self.dtype, _ = pick_dtype(device, job.dtype)
        self.world = World(context.get_world_rank(), context.get_world_size(), device)
        if device.type == "cpu":
            torch.set_num_threads(max(1, (os.cpu_count() or 1) // context.get_local_world_size()))
        self.state = job.saved_state() or TrainState(job.plan, Cursor(job.identity))
        self.model = build_model(job.plan).to(self.world.device).set_dtype(self.dtype)
        self.optimizer = build_optimizer(self.model, job.plan.rates, self.dtype)
        self._load()
        self.peak_flops: float | None = None
        self.losses, self.mode = compile_for_training(self.model, self._wants_compilation())
        self.validation: list[MicroBatch] | None = None
        self.events: EventLog | None = None

    def run(self) -> None:
        job, world, first_step = self.job, self.world, self.state.cursor.step
        if world.rank == 0:
            self._require_progress()
            self.events = EventLog(job.stage, first_step)
            self.events.append(
                "start",
                step=first_step,
                workers=world.size,
                steps=job.plan.steps,
                dtype=str(self.dtype),
                mode=self.mode,
                threads=torch.get_num_threads(),
                attempt=job.attempt,
            )
        shard = ray.train.get_dataset_shard("train")
        assert shard is not None, "the trainer was given a dataset"
        stream = _endless(read_micro_batches(shard, job.plan.micro_batch_rows))
        hooks = Hooks(self._evaluate, self._save, self._log_step)
        state = train(self.state, self._summed_loss, self.optimizer, stream, world, job.cadence, hooks)
        if self.events is not None:
            self.events.append("finish", step=state.cursor.step, tokens=state.cursor.tokens)
            self.events.close()

    def _require_progress(self) -> None:
        starts = [event for event in read_events(self.job.stage) if event.get("attempt") == self.job.attempt]
        in_vain = [event for event in starts if event["step"] == self.state.cursor.step]
        if len(in_vain) > RESTARTS_WITHOUT_PROGRESS:
            last = self.job.stage.read_json(LAST_ERROR)["message"] if self.job.stage.exists(LAST_ERROR) else "unknown"
            raise UserError(
                f"the workers failed {len(in_vain)} times at step {self.state.cursor.step}; the last error: {last}"
            )

    def _load(self) -> None:
        checkpoints, step = Checkpoints.of(self.job.stage), self.state.cursor.step
        if step > 0:
            self.model.load_state_dict(checkpoints.model(step))
            self.optimizer.load_state_dict(checkpoints.optimizer(step))
        elif self.job.initial_model is not None:
            base = Checkpoints.of(self.job.initial_model)
            base_step = base.newest_valid(warn)
            assert base_step is not None, "the job checked that the initial model is there"
            self.model.load_state_dict(base.model(base_step))

    def _wants_compilation(self) -> bool:
        """Compiling costs a CPU about a minute and then saves a sixth of the time: worth it in runs of some length."""
        if self.job.compile != "auto":
            return self.job.compile == "on"
        flops = self.job.plan.flops  # of the whole stage, so that a resumed run computes as before
        return self.world.device.type == "cuda" or flops > COMPILE_ABOVE_FLOPS

    def _summed_loss(self, inputs_BT: torch.Tensor, targets_BT: torch.Tensor) -> torch.Tensor:
        return self.losses(inputs_BT, targets_BT, reduction="sum")

    def _token_losses(self, inputs_BT: torch.Tensor, targets_BT: torch.Tensor) -> torch.Tensor:
        return self.model(inputs_BT, targets_BT, reduction="none").view_as(targets_BT)

    def _evaluate(self, step: int) -> float:
        job, world = self.job, self.world
        if self.validation is None:
            plan = job.plan
            every = micro_batches(job.source, job.validation_units, plan.micro_batch_rows, RowId(0, 0, 0), plan.seed)
            once = takewhile(lambda micro_batch: micro_batch.last_row.epoch == 0, every)
            self.validation = list(islice(once, world.rank, job.eval_micro_batches, world.size))
        self.model.eval()
        bpb = evaluate_bpb(self._token_losses, self.validation, job.tokenizer.token_bytes(), world.device, world.sum)
        self.model.train()
        if self.events is not None:
            self.events.append("eval", step=step, val_bpb=bpb)
        return bpb

    def _save(self, state: TrainState) -> None:
        optimizer_state = self.optimizer.state_dict()  # collective: every worker sends its part to worker 0
        if self.events is None:
            return
        checkpoints = Checkpoints.of(self.job.stage)
        size = checkpoints.save(state, self.model.state_dict(), optimizer_state)
        checkpoints.prune(self.job.keep_checkpoints)
        self.events.append("checkpoint", step=state.cursor.step, bytes=size)
        self.events.flush()

    def _log_step(self, result: StepResult, state: TrainState, seconds: float) -> None:
        if self.events is None:
            return
        plan = self.job.plan
        flops_per_s = plan.flops_per_token * plan.batch_tokens / seconds
        if result.step == self.state.cursor.step + PEAK_AFTER_STEPS:
            self.peak_flops = gemm_peak(self.world.device, self.dtype) * self.world.size
        self.events.append(
            "step",
            step=result.step,
            tokens=state.cursor.tokens,
            loss=result.loss,
            lr=lr_multiplier(plan, result.step),
            stream_hash=result.stream_hash,
            last_row=astuple(result.last_row),
            targets=result.targets,
            cropped_tokens=result.cropped_tokens,
            workers=self.world.size,
            seconds=round(seconds, 4),
            data_wait_s=round(result.data_wait_s, 4),
            tok_per_s=round(plan.batch_tokens / seconds, 1),
            mfu=round(flops_per_s / self.peak_flops, 4) if self.peak_flops else None,
        )


def _endless(batches: Iterator[MicroBatch]) -> Iterator[MicroBatch]:
    yield from batches
    raise RuntimeError("the planned unit visits are used up; the worker group restarts and plans the next ones")


def _reported_failure(job: TrainingJob) -> str | None:
    if not job.stage.exists(FAILURE):
        return None
    failure = job.stage.read_json(FAILURE)
    return failure["message"] if failure["attempt"] == job.attempt else None


def _raise_reported_failure(job: TrainingJob) -> None:
    message = _reported_failure(job)
    if message is not None:
        raise UserError(message)


def _last_line(text: str) -> str:
    return next((line.strip() for line in reversed(text.splitlines()) if line.strip()), "no reason was given")


def warn(message: str) -> None:
    print(f"warning: {message}", file=sys.stderr, flush=True)
