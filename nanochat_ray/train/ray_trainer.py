"""RAY SHELL: a group of workers under Ray Train, fed in order by Ray Data, from the driver's side.

At every start of a group, the newest valid checkpoint says where the stream goes on, and the dataset is planned from
there; what a worker does is in worker.py, when a group changes its size in elastic.py.
"""

import textwrap
import time
import uuid
from concurrent.futures import wait
from dataclasses import replace
from functools import partial

import ray.train
from ray.train import FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchConfig

from nanochat_ray.cli import warn
from nanochat_ray.cluster import Cluster, answers, call_in_thread, preloading, require_room
from nanochat_ray.errors import UserError
from nanochat_ray.storage import retrying
from nanochat_ray.stream.cursor import RowId
from nanochat_ray.stream.ray_stream import micro_batch_dataset, ordered_data_config
from nanochat_ray.train.elastic import (
    CPUS_PER_DATA_TASK,
    LOOK_ERRORS,
    WATCH_EVERY_S,
    ElasticTrainer,
    give_back_reservations,
    look_at_machines,
)
from nanochat_ray.train.events import read_events
from nanochat_ray.train.job import TrainingJob
from nanochat_ray.train.lease import clear_stage
from nanochat_ray.train.progress import live_progress
from nanochat_ray.train.reports import REPORTS, note_wait, report_failure, reported_failure
from nanochat_ray.train.restarts import RESTARTS_WITHOUT_PROGRESS
from nanochat_ray.train.worker import load, train_on_worker

REASON_CHARACTERS = 400
HEAD_AWAY_FOR_S = 40.0  # a restarted head finds all processes again; after 60 s Ray ends them, this one without a word


def run_training(job: TrainingJob, cluster: Cluster, workers: tuple[int, int], fresh: bool = False) -> bool:
    """Train, with a live line, until the plan's last step is saved; False when it already was.

    Args:
        job: of a stage whose lease the caller holds.
        fresh: discard what the stage holds, once everything else has been checked.

    Raises:
        UserError: the cluster is too small, what a worker reported as the user's to mend, or workers kept failing.
    """
    job = replace(job, attempt=uuid.uuid4().hex, attempt_began=round(time.time(), 3))
    state = None if fresh else job.saved_state()
    if state is not None and state.cursor.step == job.plan.steps:
        print(f"{job.stage} is trained: {job.plan.steps} steps are done (--fresh starts anew)")
        return False
    if state is None and not fresh:
        _require_no_checkpoint_lost(job)
    resources = require_workers(cluster, workers)
    if fresh:
        clear_stage(job.stage)
    job.stage.write_json("plan.json", job.plan.to_dict())
    try:
        with live_progress(job.stage, job.plan.steps):
            _fit_with_new_controllers(job, cluster, workers, resources)
        _raise_reported_failure(job)
    except (ray.train.TrainingFailedError, ray.exceptions.RayError) as error:
        _raise_reported_failure(job)
        raise UserError(f"training failed: {_reason(error)}") from error
    finally:
        _clean_up(job)
    return True


def _trainer(job: TrainingJob, workers: tuple[int, int], resources: dict[str, float], name: str) -> ElasticTrainer:
    return ElasticTrainer(
        train_on_worker,
        train_loop_config={"job": job, "most": workers[1], "per_worker": resources},
        datasets={"train": lambda: _dataset_from_checkpoint(job)},
        dataset_config=ordered_data_config(),
        requester=f"train-{job.stage}",
        note_wait=partial(note_wait, job),
        torch_config=TorchConfig(backend="nccl" if "GPU" in resources else "gloo"),
        scaling_config=ScalingConfig(
            num_workers=workers,  # type: ignore[arg-type]
            resources_per_worker=resources,
            use_gpu="GPU" in resources,
            # Workers that fill a machine's cores leave none for the tasks that read their data.
            placement_strategy="PACK" if "GPU" in resources else "SPREAD",
        ),
        run_config=RunConfig(
            name=name,  # never an old one: our own checkpoints say where to go on
            storage_path=str(job.stage / "ray"),
            failure_config=FailureConfig(max_failures=-1),
            worker_runtime_env=preloading(load),  # type: ignore[call-arg]
        ),
    )


def _fit_with_new_controllers(
    job: TrainingJob, cluster: Cluster, workers: tuple[int, int], resources: dict[str, float]
) -> None:
    """Run until a group has done all steps, from the last checkpoint again where Ray Train's controller is lost.

    The controller is one process, and it gives up where a machine is lost in the moment between the start of a group
    and that of its training function (Ray 2.60). Neither is a reason to end the user's command.
    """
    lost_at: list[int] = []
    while True:
        trainer = _trainer(job, workers, resources, name=f"{job.attempt}-{len(lost_at)}")
        try:
            return _fit(trainer, cluster, resources, workers[0])
        except (ray.train.TrainingFailedError, ray.exceptions.RayError) as error:
            _raise_reported_failure(job)
            lost_at.append(_last_step(job))
            if not _is_of_ray(error) or lost_at.count(lost_at[-1]) > RESTARTS_WITHOUT_PROGRESS:
                raise
            warn(f"Ray Train's controller was lost after step {lost_at[-1]}, another one goes on: {_reason(error)}")
            give_back_reservations()


def _last_step(job: TrainingJob) -> int:
    return max((event["step"] for event in read_events(job.stage) if event["kind"] == "step"), default=0)


def _is_of_ray(error: BaseException) -> bool:
    """Whether a process or a machine was lost, as opposed to a mistake in what runs there."""
    cause = error.controller_failure if isinstance(error, ray.train.ControllerError) else error
    return isinstance(cause, ray.exceptions.RayError) and not isinstance(cause, ray.exceptions.RayTaskError)


def _require_no_checkpoint_lost(job: TrainingJob) -> None:
    """To begin again where there was a checkpoint must be the user's own decision: it discards the events."""
    saved = [event["step"] for event in read_events(job.stage) if event["kind"] == "checkpoint"]
    if saved:
        raise UserError(
            f"{job.stage} was saved at step {max(saved)}, but its folder checkpoints/ holds none with a manifest any "
            "more: restore one, use another --run, or start anew with --fresh"
        )


def _clean_up(job: TrainingJob) -> None:
    try:
        for name in job.stage.list():
            if name == "ray" or name.startswith(REPORTS):  # also what a killed worker was about to write
                job.stage.delete(name)
    except OSError as error:  # a storage that fails must not hide why the run ended
        warn(f"reports of workers were left in {job.stage} ({error})")


def _fit(trainer: ElasticTrainer, cluster: Cluster, per_worker: dict[str, float], least: int) -> None:
    """Run in a thread, so that Ctrl-C ends the wait at once and `connect` ends the rest; watch the cluster meanwhile.

    In the main thread Ray Train would ask its controller to stop, which hears nothing while it waits for machines.

    Raises:
        UserError: the cluster's head is lost. Ray would end this process a little later, with no word on what to do.
    """
    outcome = call_in_thread(trainer.fit)
    host, port = cluster.address.rsplit(":", 1)
    seen, told = time.monotonic(), False
    while not wait([outcome], timeout=WATCH_EVERY_S).done:
        if answers(host, int(port)):
            seen = time.monotonic()
            room = _room(per_worker, least)
            if room < least and not told:
                print(
                    f"waiting for machines: there is room for {room} workers, at least {least} are needed", flush=True
                )
            told = room < least
        elif time.monotonic() - seen > HEAD_AWAY_FOR_S:
            raise _head_is_lost(cluster)
    error = outcome.exception()
    if isinstance(error, ray.exceptions.RayError) and not answers(host, int(port)):
        raise _head_is_lost(cluster) from error  # the controller lived there
    outcome.result()


def _room(per_worker: dict[str, float], least: int) -> int:
    """For how many workers there is room, or `least` when the head has just gone, which the next look will find."""
    try:
        return look_at_machines().places(per_worker, least)
    except LOOK_ERRORS:
        return least


def _head_is_lost(cluster: Cluster) -> UserError:
    return UserError(
        f"the head of the cluster, {cluster.address}, does not answer any more; start it again, or another cluster, "
        "and run the same command to continue from the last checkpoint"
    )


def require_workers(cluster: Cluster, workers: tuple[int, int]) -> dict[str, float]:
    """What each worker takes of a machine: a GPU where the cluster has some.

    Raises:
        UserError: the cluster can never hold the fewest workers.
    """
    require_room(cluster, workers[0], cluster.per_worker)
    return cluster.per_worker


def _dataset_from_checkpoint(job: TrainingJob) -> ray.data.Dataset:
    try:
        state = retrying(lambda: job.saved_state(deeply=False), job.stage, warn)
    except UserError as error:  # Ray would start the group again for ever; so it does start, and ends at once
        report_failure(job, str(error))
        state = None
    start, done = (state.cursor.next_row, state.cursor.step) if state else (RowId(0, 0, 0), 0)
    plan = job.plan
    remaining = (plan.steps - done) * plan.batch_tokens
    return micro_batch_dataset(
        job.source, job.train_units, plan.micro_batch_rows, plan.seed, start, remaining, CPUS_PER_DATA_TASK
    )


def _raise_reported_failure(job: TrainingJob) -> None:
    message = reported_failure(job)
    if message is not None:
        raise UserError(message)


def _reason(error: BaseException) -> str:
    """One line. Of a lost actor what Ray says first, since its last line is the least of it; else the last line."""
    cause = error.controller_failure if isinstance(error, ray.train.ControllerError) else error
    if isinstance(cause, ray.exceptions.ActorDiedError):
        return textwrap.shorten(str(cause), REASON_CHARACTERS, placeholder=" …")
    lines = [line.strip() for line in str(cause).splitlines() if line.strip()]
    return lines[-1] if lines else repr(cause)
