"""RAY SHELL: the chat server as a Ray Serve application: an ingress in front of autoscaled engine replicas.

    client ─▶ Serve's proxy ─▶ Ingress (api.py: HTTP, tokens, journal) ─▶ EngineReplica (replica.py: model, engine)
                               cluster_backend.py goes on with a reply elsewhere when its replica is lost

A reply's replica is chosen by its conversation, so that the next turn finds its beginning in that replica's cache; when
that replica is full the next one takes it.
"""

import asyncio
import functools
import logging
import os
import signal
import socket
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal, NoReturn, cast

import ray
from fastapi import FastAPI
from pydantic import BaseModel, ConfigDict, Field, model_validator
from ray import serve
from ray._common.constants import HEAD_NODE_RESOURCE_NAME
from ray.exceptions import RayError
from ray.serve.config import AutoscalingConfig, AutoscalingPolicy, RequestRouterConfig
from ray.serve.exceptions import RayServeException
from ray.serve.handle import DeploymentHandle
from ray.serve.schema import ReplicaState

from nanochat_ray.cli import warn
from nanochat_ray.cluster import STOP_SIGNALS, connect
from nanochat_ray.engine.load import ChatModel, describe_chat_model, load_chat_model, require_trained
from nanochat_ray.errors import UserError
from nanochat_ray.precedence import give_way
from nanochat_ray.serve.api import api_of
from nanochat_ray.serve.backend import ServedModel
from nanochat_ray.serve.cluster_backend import ClusterBackend
from nanochat_ray.serve.keys import ApiKeys, StoredKey, read_keys
from nanochat_ray.serve.replica import GRACEFUL_SHUTDOWN_S, EngineReplica
from nanochat_ray.serve.replies import Replies
from nanochat_ray.storage import run_folder
from nanochat_ray.train.checkpoint import MODEL, STATE, Checkpoints

APP_NAME = "chat"
HOST = "127.0.0.1"
MAX_RUNNING = 32  # replies that a replica writes at the same time
MAX_WAITING = 8  # replies that wait at a replica, so that its batch is full again at once when one ends
MAX_QUEUED = 64  # replies that wait for a replica; whoever comes then is refused
TELL_EVERY_S = 2.0
DRAIN_S = 10.0  # that replies get to their end when the server is stopped
MAX_OPEN = 2048  # requests at the ingress, most of them waiting for tokens
AFFINITY_ROUTER = "ray.serve.experimental.consistent_hash_router.ConsistentHashRouter"
# Serve's controller hears of the load each second, not each ten: it decides by the last three.
METRICS_EVERY_S = 1.0
_SERVE_ENVIRONMENT = {
    "RAY_SERVE_LOG_TO_STDERR": "0",
    # Each of a stream's chunks would cross two threads more in every process. Nothing here blocks an event loop: the
    # model has a thread of its own.
    "RAY_SERVE_RUN_USER_CODE_IN_SEPARATE_THREAD": "0",
    "RAY_SERVE_RUN_ROUTER_IN_SEPARATE_LOOP": "0",
    "RAY_SERVE_REQUEST_PATH_LOG_BUFFER_SIZE": "1000",
    "RAY_SERVE_PROXY_USE_GRPC": "1",  # to the ingress; ClusterBackend asks for the same to the replicas
}


class Served(BaseModel):
    """What to serve: a trained stage of a run. The `args` of an application in a Serve config are these fields."""

    model_config = ConfigDict(extra="forbid")

    storage: str
    run: str
    stage: Literal["sft", "base"] = "sft"
    step: int | None = Field(default=None, ge=0)  # the newest valid checkpoint at the time of the deployment
    device: Literal["cuda", "mps", "cpu"] | None = None  # the best that there is
    dtype: Literal["bf16", "fp32", "int8"] | None = None  # what suits the device
    kernels: Literal["auto", "on", "off"] = "auto"
    max_running: int = Field(default=MAX_RUNNING, ge=1)
    max_queued: int = Field(default=MAX_QUEUED, ge=1)
    threads: int | None = Field(default=None, ge=1)  # of the model on a CPU; all cores
    min_replicas: int = Field(default=1, ge=0)
    max_replicas: int = Field(default=1, ge=1)
    api_keys: str | None = None  # file of hashed keys, see keys.py; without one nobody needs a key
    allowed_hosts: list[str] = []  # names to answer to beside loopback's, for a server behind others

    @model_validator(mode="after")
    def _ordered(self) -> "Served":
        if self.min_replicas > self.max_replicas:
            raise ValueError(f"min_replicas {self.min_replicas} is more than max_replicas {self.max_replicas}")
        return self


@serve.deployment(max_ongoing_requests=MAX_OPEN, graceful_shutdown_timeout_s=GRACEFUL_SHUTDOWN_S)
@serve.ingress()
class Ingress:
    """What HTTP requests meet: everything but the model.

    Args:
        describe: the model's facts; called in the ingress.
        keys: without any, nobody needs one.
    """

    def __init__(
        self,
        replicas: DeploymentHandle,
        describe: Callable[[], ServedModel],
        served: Served,
        keys: Sequence[StoredKey],
    ) -> None:
        self._backend = ClusterBackend(replicas, describe())
        self._keys = ApiKeys(keys, time.monotonic) if keys else None
        self._allowed_hosts = served.allowed_hosts

    def report(self, stats: dict[str, Any]) -> None:
        """Called by each replica every second."""
        self._backend.note(stats)

    async def drain(self, within_s: float) -> None:
        """Refuse what comes from now on, and wait for the replies that are being written."""
        self._replies.closing = True
        deadline = time.monotonic() + within_s
        while self._replies.active and time.monotonic() < deadline:
            await asyncio.sleep(0.05)

    def __serve_build_asgi_app__(self) -> FastAPI:
        api = api_of(self._backend, keys=self._keys, allowed_hosts=self._allowed_hosts)
        self._replies: Replies = api.state.replies
        return api


def build(args: Served) -> serve.Application:
    """The application for a trained stage of a run; `nanochat_ray.serve.app:build` is a Serve config's `import_path`.

    Every replica, now and later, loads the checkpoint that is the newest valid one now.

    Raises:
        UserError: nothing is trained there; says which command trains it. The file of API keys cannot be read.
    """
    require_trained(args.storage, args.run, args.stage)
    keys = read_keys(Path(args.api_keys)) if args.api_keys else []
    if args.step is None:
        folder = run_folder(args.storage, args.run) / args.stage
        step = Checkpoints.of(folder).newest_valid(warn, files=(STATE, MODEL))
        if step is None:
            raise UserError(f"no checkpoint in {folder} is finished; run the job that trains it again")
        args = args.model_copy(update={"step": step})
    if args.kernels == "auto" and not _gpus_each():
        _warn_without_compiler()
    place = (args.storage, args.run, args.stage, args.device, args.dtype)
    chosen: dict[str, Any] = {
        "kernels": args.kernels,
        "step": args.step,
        "max_running": args.max_running,
        "threads": args.threads,
    }
    load = functools.partial(load_chat_model, *place, **chosen)
    describe = functools.partial(_describe, args)
    return app_of(load, describe, args, keys)


def _describe(args: Served) -> ServedModel:
    return ServedModel(*describe_chat_model(args.storage, args.run, args.stage, args.step, args.dtype, args.kernels))


def app_of(
    load: Callable[[], ChatModel], describe: Callable[[], ServedModel], served: Served, keys: Sequence[StoredKey] = ()
) -> serve.Application:
    """The application around any model that `load`, called in a replica, returns.

    A replica takes a GPU where the cluster that this process is connected to has one.
    """
    replicas = cast(serve.Deployment, EngineReplica).options(
        ray_actor_options={"num_cpus": 1, "num_gpus": _gpus_each()},
        max_ongoing_requests=served.max_running + MAX_WAITING,
        max_queued_requests=served.max_queued,
        health_check_period_s=5,
        autoscaling_config=_autoscaling(served),
        request_router_config=RequestRouterConfig(request_router_class=AFFINITY_ROUTER),  # type: ignore[arg-type]
    )
    # With Serve's controller and jobs.serve's proxy: no spot machine that is taken has the journal.
    on_head = {"num_cpus": 0, "resources": {HEAD_NODE_RESOURCE_NAME: 0.001}}
    ingress = cast(serve.Deployment, Ingress).options(ray_actor_options=on_head)
    return ingress.bind(replicas.bind(load, MAX_WAITING, served.threads), describe, served, keys)


def _gpus_each() -> int:
    return 1 if ray.is_initialized() and ray.cluster_resources().get("GPU", 0) >= 1 else 0


def _warn_without_compiler() -> None:
    """What a replica says of this is in its log; whoever starts the server should hear it."""
    from kernels.cpu_build import find_compiler

    try:
        find_compiler()
    except UserError as error:
        warn(f"replies will come at a third of the speed: {error}")


def _autoscaling(served: Served) -> AutoscalingConfig:
    return AutoscalingConfig(
        min_replicas=served.min_replicas,
        max_replicas=served.max_replicas,
        target_ongoing_requests=0.75 * served.max_running,  # so that there is room while another one starts
        look_back_period_s=3 * METRICS_EVERY_S,
        metrics_interval_s=METRICS_EVERY_S,
        upscale_delay_s=1.0,
        downscale_delay_s=60.0,
        policy=AutoscalingPolicy(policy_function="nanochat_ray.serve.autoscaling:policy"),
    )


def serve_until_interrupted(
    served: Served, host: str, port: int, address: str | None, on_ready: Callable[[str], None]
) -> None:
    """Serve a run's model until Ctrl-C or SIGTERM; then stop everything that was started.

    Args:
        on_ready: called with the URL once a replica answers, or, with `min_replicas` 0, once one can be started.

    Raises:
        UserError: nothing is trained there, the port is in use, or the model does not load.
    """
    require_trained(served.storage, served.run, served.stage)
    if served.api_keys:
        read_keys(Path(served.api_keys))
    serve_app_until_interrupted(functools.partial(build, served), host, port, address, served.max_replicas, on_ready)


def serve_app_until_interrupted(
    build: Callable[[], serve.Application],
    host: str,
    port: int,
    address: str | None,
    replicas: int,
    on_ready: Callable[[str], None],
) -> None:
    """As `serve_until_interrupted`, for the application that `build` makes once the cluster is there."""
    require_free_port(host, port)
    logging.getLogger("ray.serve").setLevel(logging.WARNING)
    for name, value in _SERVE_ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    give_way()  # inherited by Ray's processes, where this starts them
    with connect(address, workers=replicas) as cluster:
        if not cluster.own:
            _require_no_serve()
        serve.start(
            proxy_location="HeadOnly",
            http_options={"host": host, "port": port},
            logging_config={"log_level": "WARNING", "enable_access_log": False},
        )
        try:
            try:
                serve.run(build(), name=APP_NAME, route_prefix="/")
            except RuntimeError as error:  # Ray's, which names the deployment and not what is wrong with it
                raise UserError(f"the model could not be served: {_why_not_started() or error}") from error
            on_ready(f"http://{host}:{port}")
            with suppress(KeyboardInterrupt):
                _tell_changes()
            with suppress(KeyboardInterrupt):  # the second time means now
                _drain()
        finally:
            for number in STOP_SIGNALS:  # another Ctrl-C must not leave processes behind
                signal.signal(number, signal.SIG_IGN)
            if not cluster.own:  # else everything ends with the cluster, and nobody waits for replies that go on
                serve.shutdown()


def _tell_changes() -> NoReturn:
    """Print how many replicas and ingresses there are, each time that changes: who started the server sees losses."""
    told = None
    while True:
        with suppress(RayError, RayServeException, KeyError):  # the controller is being started again
            deployments = serve.status().applications[APP_NAME].deployments
            states = {name: deployment.replica_states for name, deployment in deployments.items()}
            if told not in (None, states):
                print("; ".join(map(_in_words, states, states.values())), file=sys.stderr, flush=True)
            told = states
        time.sleep(TELL_EVERY_S)


def _in_words(deployment: str, states: dict[ReplicaState, int]) -> str:
    counts = (f"{number} {ReplicaState(state).value.lower()}" for state, number in states.items())
    return f"{deployment}: {', '.join(counts) or 'none'}"


def _drain() -> None:
    with suppress(TimeoutError, RayError, RayServeException):  # no ingress, no replies
        drained = serve.get_app_handle(APP_NAME).drain.remote(DRAIN_S)
        drained.result(timeout_s=DRAIN_S + 1)


def _require_no_serve() -> None:
    """Raises:
    UserError: Serve runs on the cluster. It has one port and one shutdown for all its applications.
    """
    status = serve.status()
    if status.proxies or status.applications:
        names = ", ".join(status.applications) or "no application"
        raise UserError(
            f"Ray Serve runs on this cluster already, with {names}; deploy there with "
            "`serve deploy cluster/serve.yaml`, or end it with `serve shutdown`"
        )


def _why_not_started() -> str:
    """The last line of the traceback of a replica that did not start."""
    deployments = serve.status().applications[APP_NAME].deployments.values()
    lines = [line.strip() for deployment in deployments for line in deployment.message.splitlines() if line.strip()]
    line = next((line for line in reversed(lines) if "Error" in line), lines[-1] if lines else "")
    return line.removeprefix(f"{UserError.__module__}.{UserError.__name__}: ")  # people need not know whose it is


def require_free_port(host: str, port: int) -> None:
    """Raises:
    UserError: something listens on the port already, or it may not be opened.
    """
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except (OSError, OverflowError) as error:
            raise UserError(f"port {port} on {host} cannot be opened ({error}); choose another with --port") from error
