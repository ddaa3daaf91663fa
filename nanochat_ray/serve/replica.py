"""RAY SHELL: a replica: a model and its engine, in an actor of Ray Serve.

The model runs on the engine's own thread, so that health checks and other calls never wait for a decode step.
"""

import asyncio
import logging
import math
import os
import socket
import time
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing, suppress

import ray
import torch
from ray import serve
from ray.exceptions import RayError
from ray.serve.exceptions import RayServeException
from ray.serve.schema import ReplicaState

from nanochat_ray.engine.load import ChatModel
from nanochat_ray.engine.sampler import SamplingParams
from nanochat_ray.precedence import take_precedence
from nanochat_ray.serve.backend import EngineDied, ReplyRequest, Update
from nanochat_ray.serve.failover import OtherModel
from nanochat_ray.serve.local import LocalBackend

logger = logging.getLogger("ray.serve")
INGRESS = "Ingress"  # the deployment that replicas report to
REPORT_EVERY_S = 1.0
NOTICE_CHECK_S = 1.0
HAND_OVER_BEFORE_S = 3.0  # of the end of a notice; then whoever cannot go on elsewhere at once has to wait there
GRACEFUL_SHUTDOWN_S = 60.0  # replies may end so long on a replica that is being stopped; then they go on elsewhere


@serve.deployment(graceful_shutdown_timeout_s=GRACEFUL_SHUTDOWN_S, graceful_shutdown_wait_loop_s=0.5)
class EngineReplica:
    """One replica.

    Args:
        load: makes the model; called in the replica.
        max_waiting: replies that may wait beside those that run.
        threads: of the model on a CPU; None takes all cores. (Ray would tell torch to use one.)
    """

    async def __init__(  # type: ignore[misc]  # Serve awaits it
        self, load: Callable[[], ChatModel], max_waiting: int, threads: int | None
    ) -> None:
        torch.set_num_threads(threads or os.cpu_count() or 1)
        chat = await asyncio.to_thread(_loaded, load)
        began = time.monotonic()
        await asyncio.to_thread(_warm_up, chat)
        chat.startup["warm_up_s"] = round(time.monotonic() - began, 3)
        self._backend = LocalBackend(chat, max_waiting)
        self._about = {
            "replica": serve.get_replica_context().replica_id.unique_id,
            "pid": os.getpid(),
            "node": ray.get_runtime_context().get_node_id(),
            "host": socket.gethostname(),
        }
        self._tasks = [asyncio.create_task(self._report()), asyncio.create_task(self._watch_for_notice())]

    async def generate(self, request: ReplyRequest) -> AsyncGenerator[list[Update], None]:
        """The rest of a reply in bundles, as `LocalBackend.bundles`.

        Raises:
            OtherModel: this replica cannot write this reply.
            UserError, Busy, GenerationFailed: as `Backend.generate`.
        """
        if request.model != self._backend.model.fingerprint:
            raise OtherModel
        try:
            async with aclosing(self._backend.bundles(request)) as bundles:
                async for bundle in bundles:
                    yield bundle
        except EngineDied as error:
            logger.error(f"{error}; this replica ends")
            os._exit(1)  # as for a stuck engine: all its replies go on elsewhere

    async def check_health(self) -> None:
        """Called by Serve, which replaces the replica when this raises, or when its process has ended."""
        if not self._backend.thread.healthy():
            # Serve would ask twice more, and then wait for replies that never end; this way they go on elsewhere now.
            logger.error("the engine is stuck; this replica ends")
            os._exit(1)

    def record_autoscaling_stats(self) -> dict[str, float]:
        """Called by Serve for the autoscaling policy."""
        return {"kv_use": self._backend.kv_use}

    def __del__(self) -> None:
        for task in self._tasks:
            task.cancel()
        self._backend.close()

    async def _report(self) -> None:
        """Tell every ingress how this replica is. To be asked would not do: a full replica takes no more calls."""
        ingresses = serve.get_deployment_handle(INGRESS, serve.get_replica_context().app_name)
        while True:
            (stats,) = await self._backend.stats()
            healthy, _ = await self._backend.ready()
            report = ingresses.broadcast("report", {**stats, **self._about, "healthy": healthy})
            with suppress(TimeoutError, RayError, RayServeException):  # ingresses come and go, too
                await report.results_async(timeout_s=REPORT_EVERY_S, return_exceptions=True)
            await asyncio.sleep(REPORT_EVERY_S)

    async def _watch_for_notice(self) -> None:
        """When this machine is about to be taken: hand all replies over as soon as another replica can go on."""
        from ray._private.state import state  # the public API does not tell which machines are draining

        node = ray.get_runtime_context().get_node_id()
        while True:
            await asyncio.sleep(NOTICE_CHECK_S)
            deadline_ms = (await asyncio.to_thread(state.get_draining_nodes)).get(node)
            if deadline_ms is None:
                continue
            left_s = deadline_ms / 1000 - time.time() if deadline_ms else math.inf  # 0: some time, says Ray
            others = False
            with suppress(RayError, RayServeException):  # the controller may be busy with the same machines
                others = await asyncio.to_thread(_others_run)
            if others or left_s < HAND_OVER_BEFORE_S:
                self._backend.hand_over()
                return


def _loaded(load: Callable[[], ChatModel]) -> ChatModel:
    take_precedence()  # for the threads of the model's step, which this one starts
    return load()


def _others_run() -> bool:
    """Whether another replica of this deployment runs; one that is being stopped does not count as running."""
    context = serve.get_replica_context()
    deployment = serve.status().applications[context.app_name].deployments[context.deployment]
    states = deployment.replica_states
    migrating = states.get(ReplicaState.STOPPING, 0) + states.get(ReplicaState.PENDING_MIGRATION, 0)
    return states.get(ReplicaState.RUNNING, 0) > (0 if migrating else 1)


def _warm_up(chat: ChatModel) -> None:
    """The first step allocates, and on some devices compiles; no reply should wait for that."""
    prompt = [chat.engine.tokenizer.special(name) for name in ("bos", "user_start", "user_end", "assistant_start")]
    for _ in chat.engine.stream(prompt, SamplingParams(temperature=0.0, max_tokens=2)):
        pass
