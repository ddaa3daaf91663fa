"""RAY SHELL: one worker of a group. Builds everything from the job and the newest checkpoint, then runs the loop.

Every group of workers, the first one and each after a restart or resize, begins this way.
"""

import os
import time
from collections.abc import Iterator
from dataclasses import astuple
from itertools import islice
from typing import Any

import ray.train
import torch
import torch.distributed as dist

from nanochat_ray.cli import warn
from nanochat_ray.device import gemm_peak, pick_device, pick_dtype
from nanochat_ray.errors import UserError
from nanochat_ray.eval.bpb import evaluate_bpb
from nanochat_ray.model.compilation import compile_for_training
from nanochat_ray.model.optim import build_optimizer
from nanochat_ray.plan import lr_multiplier
from nanochat_ray.stream.cursor import Cursor
from nanochat_ray.stream.ray_stream import read_micro_batches
from nanochat_ray.stream.rows import MicroBatch, one_epoch
from nanochat_ray.train.checkpoint import Checkpoints, TrainState, build_model
from nanochat_ray.train.elastic import WATCH_EVERY_S, LeaveGroup, Watch, is_lost_peer, machines_of_group
from nanochat_ray.train.events import EventLog, read_events
from nanochat_ray.train.job import TrainingJob
from nanochat_ray.train.loop import LEAVE, SAVE, Hooks, train
from nanochat_ray.train.step import StepResult, World

FAILURE = "failure.json"  # why this attempt must not be restarted, written by the worker that knows
LAST_ERROR = "last_error.json"  # what broke the last worker group
RESTARTS_WITHOUT_PROGRESS = 2  # lost machines may restart a run for ever, a bug must not
LEAVE_MARGIN = 1.5  # of the time that the last step and its checkpoint should take, before a machine goes
PEAK_AFTER_STEPS = 2  # by then the other processes of a group have started and left the cores alone


def train_on_worker(config: dict[str, Any]) -> None:
    job: TrainingJob = config["job"]
    if reported_failure(job) is not None:
        return  # a restart cannot help; the driver will say why
    try:
        _Worker(job, config["most"], config["per_worker"]).run()
    except LeaveGroup:
        raise  # Ray Train starts the next group; not an error of ours
    except UserError as error:
        cause = getattr(error, "cause", error)  # Ray wraps what a data task raised, with its remote traceback
        report_failure(job, str(cause))
        if dist.is_initialized():
            dist.destroy_process_group()  # so that workers waiting in a collective stop waiting
    except Exception as error:
        if not is_lost_peer(error):
            _report(job, LAST_ERROR, f"{type(error).__name__}: {error}")
        raise


class _Worker:
    """One training worker: builds everything from the job and the newest checkpoint, then runs the loop."""

    def __init__(self, job: TrainingJob, most: int, per_worker: dict[str, float]):
        context = ray.train.get_context()
        device, _ = pick_device()
        self.job = job
        self.dtype, _ = pick_dtype(device, job.dtype)
        self.world = World(context.get_world_rank(), context.get_world_size(), device)
        if device.type == "cpu":
            torch.set_num_threads(max(1, (os.cpu_count() or 1) // context.get_local_world_size()))
        self.state = job.saved_state() or TrainState(job.plan, Cursor(job.identity), initial_model=job.initial_digest)
        self.model = build_model(job.plan).to(self.world.device).set_dtype(self.dtype)
        self.optimizer = build_optimizer(self.model, job.plan.rates, self.dtype)
        self._load()
        self.peak_flops: float | None = None
        wanted = {"auto": None, "on": True, "off": False}[job.compile]
        self.losses, self.mode = compile_for_training(self.model, wanted, job.plan.flops)  # of all steps: also resumed
        self.validation: list[MicroBatch] | None = None
        self.events: EventLog | None = None
        self.save_seconds = 0.0  # of the last checkpoint
        self.step_seconds = 0.0  # of the last step
        machines = machines_of_group()
        self.watch = Watch(machines, self.world.size, most, per_worker) if self.world.rank == 0 else None

    def run(self) -> None:
        job, world, first_step = self.job, self.world, self.state.cursor.step
        if world.rank == 0:
            self._require_progress()
            Checkpoints.of(job.stage).delete_after(first_step)
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
        hooks = Hooks(self._evaluate, self._save, self._log_step, self._request, self._leave)
        if self.watch is not None:
            self.watch.start()
        try:
            state = train(self.state, self._summed_loss, self.optimizer, stream, world, job.cadence, hooks)
        finally:
            if self.watch is not None:
                self.watch.stop()
        if self.events is not None:
            self.events.append("finish", step=state.cursor.step, tokens=state.cursor.tokens)
            self.events.close()

    def _require_progress(self) -> None:
        """Machines may be lost for ever without an end to the run; a mistake that repeats itself ends it."""
        error = _reported(self.job, LAST_ERROR)
        if error is None:
            return
        starts = [event for event in read_events(self.job.stage) if event.get("attempt") == self.job.attempt]
        in_vain = [event for event in starts if event["step"] == self.state.cursor.step]
        if len(in_vain) > RESTARTS_WITHOUT_PROGRESS:
            raise UserError(
                f"the workers failed {len(in_vain)} times at step {self.state.cursor.step}; the last error: {error}"
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

    def _summed_loss(self, inputs_BT: torch.Tensor, targets_BT: torch.Tensor) -> torch.Tensor:
        return self.losses(inputs_BT, targets_BT, reduction="sum")

    def _token_losses(self, inputs_BT: torch.Tensor, targets_BT: torch.Tensor) -> torch.Tensor:
        return self.model(inputs_BT, targets_BT, reduction="none").view_as(targets_BT)

    def _evaluate(self, step: int) -> float:
        job, world = self.job, self.world
        if self.validation is None:
            plan = job.plan
            once = one_epoch(job.source, job.validation_units, plan.micro_batch_rows, plan.seed)
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
        began = time.monotonic()
        size = checkpoints.save(state, self.model.state_dict(), optimizer_state)
        checkpoints.prune(self.job.keep_checkpoints)
        self.save_seconds = time.monotonic() - began
        self.events.append("checkpoint", step=state.cursor.step, bytes=size, seconds=round(self.save_seconds, 4))
        self.events.flush()

    def _request(self) -> int:
        """Save at a notice, and again at the last moment; leave then, or when more workers could take part."""
        watch = self.watch
        assert watch is not None, "only worker 0 is asked"
        request = SAVE if watch.take_notice() else 0
        last_moment = None
        if watch.deadline is not None:
            last_moment = watch.deadline - LEAVE_MARGIN * (self.save_seconds + 2 * self.step_seconds) - WATCH_EVERY_S
        if watch.may_grow or (last_moment is not None and time.time() >= last_moment):
            request |= SAVE | LEAVE
        return request

    def _leave(self) -> None:
        self.world.sum(torch.zeros(1))  # nobody leaves before worker 0 has saved: Ray ends a group at its first error
        if self.events is not None:
            self.events.append("leave", step=self.optimizer.steps, workers=self.world.size)
            self.events.close()
        raise LeaveGroup

    def _log_step(self, result: StepResult, state: TrainState, seconds: float) -> None:
        if self.events is None:
            return
        plan = self.job.plan
        self.step_seconds = seconds
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


def report_failure(job: TrainingJob, message: str) -> None:
    """Leave word that restarting this attempt cannot help, and why."""
    _report(job, FAILURE, message)


def reported_failure(job: TrainingJob) -> str | None:
    """Why this attempt must not be restarted; None while it may."""
    return _reported(job, FAILURE)


def _report(job: TrainingJob, name: str, message: str) -> None:
    job.stage.write_json(name, {"attempt": job.attempt, "message": message})


def _reported(job: TrainingJob, name: str) -> str | None:
    """What this attempt left in a file; an earlier one that was killed may have left it there, too."""
    if not job.stage.exists(name):
        return None
    report = job.stage.read_json(name)
    return report["message"] if report["attempt"] == job.attempt else None
