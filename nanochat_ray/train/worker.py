"""RAY SHELL: one worker of a group. Builds everything from the job and the newest checkpoint, then runs the loop.

Every group of workers, the first one and each after a restart or resize, begins this way.
"""

import math
import os
import time
from collections import deque
from collections.abc import Iterator
from collections.abc import Set as AbstractSet
from contextlib import suppress
from dataclasses import astuple
from functools import partial
from itertools import islice
from statistics import median
from typing import Any

import ray.train
import torch
import torch.distributed as dist

from nanochat_ray.cli import warn
from nanochat_ray.device import FP8, gemm_peak, pick_device, pick_dtype
from nanochat_ray.errors import UserError
from nanochat_ray.eval.bpb import evaluate_bpb
from nanochat_ray.model.execution import COMPILED, prepare_for_training
from nanochat_ray.model.optim import build_optimizer
from nanochat_ray.plan import lr_multiplier
from nanochat_ray.storage import is_full, retrying, storage_failed
from nanochat_ray.stream.cursor import Cursor
from nanochat_ray.stream.head_start import with_head_start
from nanochat_ray.stream.ray_stream import read_micro_batches
from nanochat_ray.stream.rows import MicroBatch, micro_batches, one_epoch
from nanochat_ray.train.cadence import checkpoint_interval_s, mean_time_between_failures_s
from nanochat_ray.train.checkpoint import MODEL, STATE, Checkpoints, Loaded, TrainState, build_model
from nanochat_ray.train.compile_cache import CompileCache
from nanochat_ray.train.elastic import (
    WATCH_EVERY_S,
    LeaveGroup,
    Watch,
    grew_in_vain,
    is_lost_peer,
    look_at_machines,
    machines_of_group,
)
from nanochat_ray.train.events import EventLog, read_events
from nanochat_ray.train.job import TrainingJob
from nanochat_ray.train.lease import Fence, GroupReplaced
from nanochat_ray.train.loop import LEAVE, SAVE, Hooks, train
from nanochat_ray.train.origin import START
from nanochat_ray.train.out_of_memory import killed_advice, out_of_memory_advice
from nanochat_ray.train.reports import (
    LAST_ERROR,
    LOST_PEER,
    REPORT_WITHIN_S,
    WAITED,
    report,
    report_failure,
    reported,
    reported_failure,
)
from nanochat_ray.train.restarts import why_to_give_up
from nanochat_ray.train.samples import write_samples
from nanochat_ray.train.saver import Saver
from nanochat_ray.train.step import StepResult, World
from nanochat_ray.train.watchdog import Watchdog

LEAVE_MARGIN = 1.5  # of the time that the last step and its checkpoint should take, before a machine goes
PEAK_AFTER_STEPS = 2  # by then the other processes of a group have started and left the cores alone


def load() -> None:
    """For `cluster.preloading`: a process that has this module has all that a worker imports."""


def train_on_worker(config: dict[str, Any]) -> None:
    entered = time.time()
    job: TrainingJob = config["job"]
    worker = None
    try:
        if reported_failure(job) is not None:
            return  # a restart cannot help; the driver will say why
        worker = _Worker(job, config["most"], config["per_worker"])
        worker.run(entered)
    except (LeaveGroup, GroupReplaced):
        raise  # Ray Train starts the next group, or has; not an error of ours
    except UserError as error:
        cause = getattr(error, "cause", error)  # Ray wraps what a data task raised, with its remote traceback
        _end_run(job, str(cause), worker)
    except Exception as error:
        advice = out_of_memory_advice(error, job.plan)
        if isinstance(error, OSError) and is_full(error):
            advice = str(storage_failed(job.stage, error))
        if advice is not None and not isinstance(error, ray.exceptions.RayError):  # of a task, another try may help
            _end_run(job, advice, worker)
            return
        name = LOST_PEER if advice is None and is_lost_peer(error) else LAST_ERROR
        first_step = worker.state.cursor.step if worker is not None else None
        report(job, name, advice or f"{type(error).__name__}: {error}", first_step)
        raise


def _end_run(job: TrainingJob, message: str, worker: "_Worker | None") -> None:
    report_failure(job, message)
    if dist.is_initialized():
        dist.destroy_process_group()  # so that workers waiting in a collective stop waiting
    if worker is not None and worker.events is not None:
        with suppress(UserError, GroupReplaced):  # the run ends for another reason, which has been told
            worker.events.flush(REPORT_WITHIN_S)


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
        hear = warn if self.world.rank == 0 else _ignore  # all see the same damage
        loaded = retrying(lambda: job.load(hear), job.stage, hear)
        begin = TrainState(job.plan, Cursor(job.identity), initial_model=job.initial_digest)
        self.state = begin if loaded is None else loaded.state
        self.model = build_model(job.plan).to(self.world.device).set_dtype(self.dtype)
        flops = job.plan.flops  # of all steps, also of a resumed run: it must not change how it computes
        self.losses, self.mode = prepare_for_training(self.model, job.kernels, job.compile, flops, job.dtype == FP8)
        self.optimizer = build_optimizer(self.model, job.plan.rates, self.dtype)
        self._take_over(loaded)
        del loaded  # its memory, before training needs it
        self.peak_flops: float | None = None
        self.validation: list[MicroBatch] | None = None
        self.fence: Fence | None = None  # of this group
        self.events: EventLog | None = None
        self.saver: Saver | None = None
        self.save_seconds = 0.0  # of the last checkpoint, until it was committed
        self.stalls_s: deque[float] = deque(maxlen=5)  # of the last ones: for how long training stood still
        self.mtbf_s = 0.0
        self.stall_s = 0.0  # since the last step ended
        self.step_seconds = 0.0  # of the last step
        self.kernels: CompileCache | None = None
        if self.mode.startswith(COMPILED):
            self.kernels = CompileCache.open(job.stage, job.plan, self.model.device, self.dtype)
        first_step = self.state.cursor.step
        say = partial(report, job, LAST_ERROR, step=first_step)
        self.watchdog = Watchdog(job.stage, self.world.rank, first_step, say, job.patience)
        self.machines = machines_of_group()
        self.watch = Watch(self.machines, self.world.size, most, per_worker) if self.world.rank == 0 else None

    def run(self, entered: float) -> None:
        job, world, first_step = self.job, self.world, self.state.cursor.step
        if world.rank == 0:
            self._require_progress()
            self.events = retrying(self._open_stage, job.stage, warn)
            assert self.watch is not None
            self.watch.patient = grew_in_vain(read_events(job.stage), job.attempt, world.size)
            checkpoints = Checkpoints.of(job.stage)
            self.saver = Saver(checkpoints, job.keep_checkpoints, first_step, self.events.flush, self.fence)
            self.events.append(
                "start",
                step=first_step,
                workers=world.size,
                steps=job.plan.steps,
                dtype=str(self.dtype),
                mode=self.mode,
                threads=torch.get_num_threads(),
                attempt=job.attempt,
                attempt_began=job.attempt_began,
                entered=round(entered, 3),
                waited_for_capacity_s=float(reported(job, WAITED) or 0),
                machines=self.machines,  # by rank
            )
            self.events.flush()  # `_require_progress` of the next group counts it
        shard = ray.train.get_dataset_shard("train")
        assert shard is not None, "the trainer was given a dataset"
        stream = with_head_start(_endless(read_micro_batches(shard, job.plan.micro_batch_rows)), self._own_rows())
        hooks = Hooks(self._evaluate, self._save, self._log_step, self._leave, self._request, self._checkpoint_every_s)
        if self.watch is not None:
            self.watch.start()
        self.watchdog.start()
        try:
            state = train(self.state, self._summed_loss, self.optimizer, stream, world, job.cadence, hooks)
        finally:
            self.watchdog.stop()
            if self.watch is not None:
                self.watch.stop()
        self._log_saved(wait=True)
        if self.events is not None:
            self.events.append("finish", step=state.cursor.step, tokens=state.cursor.tokens)
            self.events.close()

    def _own_rows(self) -> Iterator[MicroBatch]:
        """This worker's micro-batches from where the group begins, made here."""
        job, start = self.job, self.state.cursor.next_row
        rows = micro_batches(job.source, job.train_units, job.plan.micro_batch_rows, start, job.plan.seed)
        return islice(rows, self.world.rank, None, self.world.size)

    def _require_progress(self) -> None:
        """Machines may be lost for ever without an end to the run; a mistake that repeats itself ends it."""
        job, step = self.job, self.state.cursor.step
        error, seen_by_peers = reported(job, LAST_ERROR, step), reported(job, LOST_PEER, step)
        why = why_to_give_up(
            read_events(job.stage), job.attempt, step, error or killed_advice(job.plan, seen_by_peers), _usable_machines
        )
        if why is not None:
            raise UserError(why)

    def _open_stage(self) -> EventLog:
        """Rid of all that lies beyond the step from which this group goes on.

        Raises:
            LeaveGroup: a checkpoint was damaged in a way that only reading all of it shows; the driver does not do
                that, and has planned the stream from there. It is gone now, so that the next group begins as planned.
        """
        job, step = self.job, self.state.cursor.step
        job.fence.require_current()
        self.fence = job.fence.for_new_group()
        checkpoints = Checkpoints.of(job.stage)
        planned_step = checkpoints.newest_whole(_ignore) or 0
        checkpoints.delete_after(step)
        if planned_step != step:
            raise LeaveGroup
        events = read_events(job.stage)
        if job.cadence.checkpoint_every_s is None:
            self.mtbf_s = mean_time_between_failures_s(events)
        for event in events:
            if event["kind"] == "checkpoint" and "stall_s" in event:  # what they cost the groups before
                self._note_saved(event["seconds"], event["stall_s"])
        return EventLog(job.stage, step, self.fence.require_current)

    def _note_saved(self, seconds: float, stall_s: float) -> None:
        self.save_seconds = seconds
        self.stalls_s.append(stall_s)

    def _take_over(self, loaded: Loaded | None) -> None:
        if loaded is not None:
            self.model.load_state_dict(loaded.model)
            self.optimizer.load_state_dict(loaded.optimizer)
        elif self.job.initial_model is not None:
            base = Checkpoints.of(self.job.initial_model)
            at_step = START if self.job.initial_model == self.job.stage else None  # what was imported into it
            initial = retrying(lambda: base.load(warn, (MODEL, STATE), at_step), base.folder, warn)
            assert initial is not None, "the job checked that the initial model is there"
            self.model.load_state_dict(initial.model)

    def _summed_loss(self, inputs_BT: torch.Tensor, targets_BT: torch.Tensor) -> torch.Tensor:
        return self.losses(inputs_BT, targets_BT, reduction="sum")

    def _token_losses(self, inputs_BT: torch.Tensor, targets_BT: torch.Tensor) -> torch.Tensor:
        self.watchdog.beat()  # an evaluation may take longer than any step
        return self.model(inputs_BT, targets_BT, reduction="none").view_as(targets_BT)

    def _evaluate(self, step: int) -> float:
        job, world = self.job, self.world
        began = time.monotonic()
        if self.validation is None:
            plan = job.plan
            once = one_epoch(job.source, job.validation_units, plan.micro_batch_rows, plan.seed)
            self.validation = list(islice(once, world.rank, job.eval_micro_batches, world.size))
        self.model.eval()
        bpb = evaluate_bpb(self._token_losses, self.validation, job.tokenizer.token_bytes(), world.device, world.sum)
        self.watchdog.beat()
        if self.events is not None:
            self.events.append("eval", step=step, val_bpb=bpb, seconds=round(time.monotonic() - began, 4))
            self._write_samples(self.events, step)
            if self.peak_flops is not None:
                self._measure_peak()
        self.model.train()
        return bpb

    def _measure_peak(self) -> None:
        """The most that was seen so far: others may use the cores while it is measured, and MFU would pass 100 %."""
        gemm_peak.cache_clear()
        peak = gemm_peak(self.world.device, self.dtype) * self.world.size
        self.peak_flops = max(peak, self.peak_flops or 0.0)

    def _write_samples(self, events: EventLog, step: int) -> None:
        """Worker 0's alone; the others wait for it in what they do together next."""
        if not self.job.sample_tokens:
            return
        began = time.monotonic()
        samples = write_samples(self.model, self.job.tokenizer, self.job.plan.stage, self.job.sample_tokens)
        self.watchdog.beat()
        seconds = round(time.monotonic() - began, 4)
        events.append("samples", step=step, samples=[sample._asdict() for sample in samples], seconds=seconds)

    def _is_last(self, state: TrainState) -> bool:
        return state.cursor.step == self.job.plan.steps

    def _save(self, state: TrainState) -> None:
        began = time.monotonic()
        optimizer_state = self.optimizer.state_dict()  # collective: every worker sends its part to worker 0
        self.watchdog.pause()
        if self.saver is not None:
            self.saver.save(state, self.model.state_dict(), optimizer_state, began)
            self.stall_s = time.monotonic() - began
        if not self._is_last(state):
            self.world.meet()  # worker 0 may have waited for the checkpoint before, as long as the storage took
            self.watchdog.beat()

    def _log_saved(self, wait: bool = False) -> None:
        """Events of the checkpoints that were committed since the last call; `wait`: of all."""
        if self.saver is None or self.events is None:
            return
        if wait:
            self.saver.wait()
        for saved in self.saver.finished():
            self._note_saved(saved.seconds, saved.stall_s)
            self.events.append(
                "checkpoint",
                step=saved.step,
                bytes=saved.bytes,
                stall_s=round(saved.stall_s, 4),
                seconds=round(saved.seconds, 4),
            )

    def _checkpoint_every_s(self) -> float:
        assert self.saver is not None, "only worker 0 is asked"
        given = self.job.cadence.checkpoint_every_s
        if self.saver.busy and given != 0:
            return math.inf
        if given is not None:
            return given
        return checkpoint_interval_s(median(self.stalls_s) if self.stalls_s else None, self.mtbf_s)

    def _request(self) -> int:
        """Save at a notice, and again at the last moment; leave then, or when more workers could take part."""
        watch = self.watch
        assert watch is not None, "only worker 0 is asked"
        request = SAVE if watch.take_notice() else 0
        last_moment = None
        if watch.deadline is not None:
            saves = 2 if self.saver is not None and self.saver.busy else 1  # the one before has to be done first
            needed_s = saves * self.save_seconds + 2 * self.step_seconds
            last_moment = watch.deadline - LEAVE_MARGIN * needed_s - WATCH_EVERY_S
        if watch.may_grow or (last_moment is not None and time.time() >= last_moment):
            request |= SAVE | LEAVE
        return request

    def _leave(self) -> None:
        self.watchdog.pause()  # worker 0 may take long to save
        self._log_saved(wait=True)
        self.world.meet()  # nobody leaves before worker 0 has saved: Ray ends a group at its first error
        if self.events is not None:
            why = "notice" if self.watch is not None and self.watch.deadline is not None else "growth"
            self.events.append("leave", step=self.optimizer.steps, workers=self.world.size, why=why)
            self.events.close()
        raise LeaveGroup

    def _log_step(self, result: StepResult, state: TrainState, seconds: float) -> None:
        self.watchdog.step_ended(result.step)
        if self.events is None:
            return
        if self.kernels is not None and result.step == self.state.cursor.step:
            self.kernels.keep()  # forward and backward are compiled now
        plan = self.job.plan
        self.step_seconds = seconds
        self._log_saved()
        flops_per_s = plan.flops_per_token * plan.batch_tokens / seconds
        if result.step == self.state.cursor.step + PEAK_AFTER_STEPS:
            self._measure_peak()
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
            padding_tokens=result.padding_tokens,
            workers=self.world.size,
            seconds=round(seconds, 4),
            data_wait_s=round(result.data_wait_s, 4),
            stall_s=round(self.stall_s, 4),
            tok_per_s=round(plan.batch_tokens / seconds, 1),
            mfu=round(flops_per_s / self.peak_flops, 4) if self.peak_flops else None,
        )
        self.stall_s = 0.0


def _usable_machines() -> AbstractSet[str]:
    return look_at_machines().usable.keys()


def _ignore(message: str) -> None:
    """For what another has said already."""


def _endless(batches: Iterator[MicroBatch]) -> Iterator[MicroBatch]:
    yield from batches
    raise RuntimeError("the planned unit visits are used up; the worker group restarts and plans the next ones")
