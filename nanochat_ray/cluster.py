"""RAY SHELL: joining a Ray cluster, or starting one on this machine."""

import logging
import os
import secrets
import signal
import socket
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import ray

# A private name: the public way, `worker_process_setup_hook`, gives actors with another hook no way to replace it.
from ray._private.ray_constants import WORKER_PROCESS_SETUP_HOOK_ENV_VAR

from nanochat_ray.errors import UserError

# What the processes of every cluster shall find, local or joined.
_WORKER_ENVIRONMENT = {
    "OMP_WAIT_POLICY": "passive",  # spinning threads collapse as soon as another process wants a core
    # glibc would give the memory of every large tensor back to the kernel and fault it in again at the next one. Set
    # both: the trim threshold alone freezes the mmap threshold at 128 KiB, which made training 1.7 times slower.
    "MALLOC_TRIM_THRESHOLD_": str(2**30),
    "MALLOC_MMAP_THRESHOLD_": str(2**25),
    # Ray Train gives process groups so many seconds to end properly; the lost machine that ends one never answers.
    "TORCH_PROCESS_GROUP_SHUTDOWN_TIMEOUT_S": "1",
    "RAY_ENABLE_AUTO_CONNECT": "0",  # a thread that Ctrl-C left behind must not start a cluster of its own
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",  # how often the controller asks its workers how they are
    "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "20",  # then it counts the machines again
    "RAY_DATA_AUTOSCALING_REQUEST_EXPIRE_TIME_S": "30",  # cores stay reserved so long for a pipeline that was killed
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",  # train/elastic.py watches, and would only be cut short by it
}
# What Ray itself reads when a local cluster starts.
_LOCAL_RAY_ENVIRONMENT = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_worker_niceness": "0",  # Ray's default of 15 starves trainers beside any other process
    "RAY_prestart_worker_first_driver": "0",  # idle processes that none of our actors' environments would match
    "RAY_enable_metrics_collection": "0",  # nobody reads them here, and two cores feel it
    "RAY_task_events_report_interval_ms": "0",
}
_LOCAL_OBJECT_STORE_BYTES = 256 << 20
_LOCAL_WORKERS_PER_CORE = 4
_CPUS_FOR_DATA = 2
END_WITHIN_S = 3.0
ANSWER_WITHIN_S, JOIN_WITHIN_S = 0.5, 10.0  # a machine in the same region answers in milliseconds
WAITS_FOR_RAY = "waits for Ray"  # threads of this name end with the connection
STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM)


@dataclass(frozen=True)
class Cluster:
    """Where we are connected: what is there, or what an autoscaler may bring where that is more.

    own   started by this process, and ends with it
    """

    address: str
    cpus: float
    gpus: float
    nodes: int
    own: bool = False

    @property
    def per_worker(self) -> dict[str, float]:
        """What each process with a model takes: a GPU if there are any, and a CPU."""
        return {"GPU": 1.0, "CPU": 1.0} if self.gpus else {"CPU": 1.0}

    def describe(self) -> str:
        gpus = f", {self.gpus:g} GPUs" if self.gpus else ""
        return f"Ray cluster {self.address}: {self.nodes} node(s), {self.cpus:g} CPU slots{gpus}"


@contextmanager
def connect(address: str | None, workers: int = 1, preload: Callable[[], None] | None = None) -> Iterator[Cluster]:
    """Join the cluster at `address` (or the one this job was submitted to), or start a local one for `workers`.

    A local cluster obeys only its own processes, gets as many logical CPUs as the workers and the data pipeline want,
    and ends with the block. A cluster that was there before is left as it was.

    Args:
        preload: for `preloading`, in each process of the job on a cluster that was there before.

    Raises:
        UserError: no cluster answers at the address, or the machine is too small for so many workers.
    """
    if ray.is_initialized():  # a job that runs several stages connects once
        yield _describe(own=False)
        return
    submitted = "RAY_ADDRESS" in os.environ or "RAY_JOB_ID" in os.environ
    prepare_environment()
    ray._private.worker.print_to_stdstream = _leave_to_rays_logs
    if address is None and not submitted:
        _start_local(workers)
    else:
        _join(address, preload)
    try:
        with _signals_interrupt():
            yield _describe(own=address is None and not submitted)
    finally:
        with ending_all(_processes_below_raylet()):
            ray.shutdown()
        for thread in threading.enumerate():
            if thread.name == WAITS_FOR_RAY:
                thread.join(END_WITHIN_S)


def call_in_thread(function: Callable[[], Any]) -> Future[Any]:
    """Call what waits for Ray where Ctrl-C cannot reach it, so that this thread is free at once; `connect` ends it.

    Left alone, such a thread notices within a second that Ray is shut down. If the interpreter ends before, it crashes
    the process.
    """
    outcome: Future[Any] = Future()

    def run() -> None:
        try:
            outcome.set_result(function())
        except BaseException as error:  # for whoever waits for the outcome to raise
            outcome.set_exception(error)

    threading.Thread(target=run, name=WAITS_FOR_RAY, daemon=True).start()
    return outcome


def _leave_to_rays_logs(*_: Any, **__: Any) -> None:
    """Instead of printing what raylets report: pages about each machine that is lost, in the midst of our own lines.

    Ray has no switch for it. `log_to_driver=False` keeps away only what workers print.
    """


def _processes_below_raylet() -> list[psutil.Process]:
    """Those of the cluster that this process has started; none of one that it joined."""
    raylets = [child for child in psutil.Process().children() if child.name() == "raylet"]
    return [process for raylet in raylets for process in raylet.children(recursive=True)]


@contextmanager
def ending_all(processes: Sequence[psutil.Process]) -> Iterator[None]:
    """After the block, which should end these processes, kill those that it has not.

    Now and then a worker of Ray hangs in its own exit, in a destructor that waits for a lock which it holds itself (Ray
    2.60, `Publisher`), and would keep its 200 to 400 MB for ever.
    """
    try:
        yield
    finally:
        for process in psutil.wait_procs(processes, timeout=END_WITHIN_S)[1]:
            with suppress(psutil.NoSuchProcess):
                process.kill()


@contextmanager
def _signals_interrupt() -> Iterator[None]:
    """SIGTERM, as `ray job stop` sends it, acts as Ctrl-C. Ray's own handler, from `ray.init`, prints a C++ stack."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, signal.default_int_handler) for number in STOP_SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def prepare_environment() -> None:
    """Set what the processes that this one starts from now on shall find in their environment, unless it is set."""
    for name, value in {**_WORKER_ENVIRONMENT, **_LOCAL_RAY_ENVIRONMENT}.items():
        os.environ.setdefault(name, value)


def _start_local(workers: int) -> None:
    cores = os.cpu_count() or 1
    most = _LOCAL_WORKERS_PER_CORE * cores
    if workers > most:
        raise UserError(
            f"{workers} workers are more than this machine of {cores} cores can hold ({most}); "
            "ask for fewer, or join a larger cluster with --address"
        )
    # Ray listens on every interface whatever address it is given, and whoever reaches it may run code; so it turns
    # token authentication on. This token is known to the cluster's own processes only; else one goes to ~/.ray.
    os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
    ray.init(
        address="local",
        num_cpus=workers + _CPUS_FOR_DATA,
        include_dashboard=False,
        object_store_memory=_LOCAL_OBJECT_STORE_BYTES,
        log_to_driver=False,
        logging_level=logging.ERROR,
    )


def preloading(function: Callable[[], None]) -> dict[str, Any]:
    """A runtime environment whose processes call a function of a module before they have anything else to do.

    The module and all that it imports are there, then, when the process becomes an actor.
    """
    return {"env_vars": {WORKER_PROCESS_SETUP_HOOK_ENV_VAR: f"{function.__module__}.{function.__name__}"}}


def answers(host: str, port: int, within_s: float = ANSWER_WITHIN_S) -> bool:
    """Whether something listens there, and says so at once."""
    try:
        socket.create_connection((host, port), timeout=within_s).close()
    except OSError:
        return False
    return True


def _join(address: str | None, preload: Callable[[], None] | None) -> None:
    host, _, port = (address or "").rpartition(":")
    if port.isdigit() and "/" not in host and not answers(host, int(port), JOIN_WITHIN_S):
        raise UserError(f"no Ray cluster answers at {address}; check --address")  # Ray would try for minutes
    runtime_env = preloading(preload) if preload else {"env_vars": {}}
    runtime_env["env_vars"] |= {name: os.environ[name] for name in _WORKER_ENVIRONMENT}
    if address is not None:  # else `ray job submit` has uploaded the code
        runtime_env |= {"working_dir": str(Path(__file__).parents[1]), "excludes": [".venv", "out"]}
    try:
        ray.init(address=address or "auto", log_to_driver=False, logging_level=logging.ERROR, runtime_env=runtime_env)
    except (ConnectionError, RuntimeError, ValueError) as error:
        where = address or os.environ.get("RAY_ADDRESS", "auto")
        raise UserError(f"no Ray cluster answers at {where} ({str(error).splitlines()[0]}); check --address") from error


def _describe(own: bool) -> Cluster:
    resources, may_bring = ray.cluster_resources(), _largest_with_autoscaler()
    return Cluster(
        address=ray.get_runtime_context().gcs_address,
        cpus=max(resources.get("CPU", 0.0), may_bring.get("CPU", 0)),
        gpus=max(resources.get("GPU", 0.0), may_bring.get("GPU", 0)),
        nodes=len([node for node in ray.nodes() if node["Alive"]]),
        own=own,
    )


def require_room(cluster: Cluster, workers: int, per_worker: dict[str, float]) -> None:
    """Refuse a number of workers that the cluster can never hold.

    Raises:
        UserError: each resource that falls short.
    """
    have = {"CPU": cluster.cpus, "GPU": cluster.gpus}
    short = [
        f"{workers * need:g} {name}, it can have {have[name]:g}"
        for name, need in per_worker.items()
        if workers * need > have[name]
    ]
    if short:
        advice = "; ask for fewer --workers" if workers > 1 else ""
        raise UserError(f"{workers} worker(s) need {' and '.join(short)} ({cluster.describe()}){advice}")


def _largest_with_autoscaler() -> dict[str, int]:
    """What the cluster's autoscaler may grow it to, by resource; empty without one.

    Ray tells this only to itself: its own training and data libraries ask the same private function.
    """
    from ray._private.state import state

    return state.get_max_resources_from_cluster_config() or {}
