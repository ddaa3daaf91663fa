"""RAY SHELL: a `Backend` whose replies are written by the replicas of a Serve deployment, wherever they are."""

import asyncio
import contextvars
import time
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import suppress
from typing import Any, cast

import grpc  # Ray Serve's own dependency
from ray import serve
from ray.exceptions import RayActorError, RayError, TaskCancelledError
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError, RayServeException
from ray.serve.handle import DeploymentHandle, DeploymentResponseGenerator
from ray.serve.schema import DeploymentStatusTrigger, ReplicaState

from nanochat_ray.serve.backend import Busy, GenerationFailed, ReplyRequest, ServedModel, Update, Waiting
from nanochat_ray.serve.failover import ReplicaLost, continued
from nanochat_ray.serve.local import SIGN_OF_LIFE_S

NEWS_EVERY_S = 0.5  # for one that waits
# gRPC's own error: its server, the replica, was stopped in the middle.
_LOSSES = (RayActorError, TaskCancelledError, DeploymentUnavailableError, grpc.aio.AioRpcError)
STATUS_HOLDS_S = 1.0
SILENT_S = 10 * SIGN_OF_LIFE_S  # then the machine has gone without closing the connection; gRPC itself takes minutes
REPORT_HOLDS_S = 5.0  # a replica that says nothing for so long is not well, or not there any more


class ClusterBackend:
    """The replicas behind a handle. Must be used on one event loop."""

    def __init__(self, replicas: DeploymentHandle, model: ServedModel) -> None:
        self.model = model
        self._replicas = replicas
        self._reports: dict[str, tuple[float, dict[str, Any]]] = {}  # by replica: when it came, and what it says
        self._not_begun: dict[object, None] = {}  # in order of arrival
        self._status = _Status(replicas.deployment_name)

    def generate(self, request: ReplyRequest) -> AsyncIterator[Update]:
        """See `Backend.generate`."""
        return continued(self._bundles, request)

    async def ready(self) -> tuple[bool, str]:
        """See `Backend.ready`."""
        if any(stats["healthy"] for stats in await self.stats()):
            return True, "ok"
        return False, await self._status.in_words()

    async def stats(self) -> list[dict[str, Any]]:
        """See `Backend.stats`."""
        oldest = time.monotonic() - REPORT_HOLDS_S
        self._reports = {name: report for name, report in self._reports.items() if report[0] > oldest}
        return [stats for _, stats in self._reports.values()]

    def note(self, stats: dict[str, Any]) -> None:
        """Take a replica's report of itself."""
        self._reports[stats["replica"]] = (time.monotonic(), stats)

    async def _bundles(self, request: ReplyRequest) -> AsyncGenerator[list[Update], None]:
        """A reply from some replica, as `failover.continued` wants it."""
        # Not by reference: a chunk sent by gRPC costs 0.6 of the CPU time of one that is an object of Ray's.
        handle = self._replicas.options(stream=True, session_id=request.session, _by_reference=False)
        # In a context of its own: else all calls of one HTTP request have that request's id, by which Serve's router
        # (2.60) remembers them, and of several at the same time (`n` choices) some are never sent.
        sent = contextvars.Context().run(handle.generate.remote, request)
        response = cast(DeploymentResponseGenerator[list[Update]], sent)
        place = object()
        self._not_begun[place] = None
        following = asyncio.ensure_future(anext(response))
        try:
            async for news in self._until_begun(following, place):
                yield [news]
            del self._not_begun[place]
            while True:
                if not (await asyncio.wait({following}, timeout=SILENT_S))[0]:
                    raise ReplicaLost(f"nothing was heard from the replica for {SILENT_S:.0f} s")
                if following.cancelled():  # there, not here: the replica does not want to finish it
                    raise ReplicaLost("the replica gave the reply up")
                try:
                    bundle = following.result()
                except StopAsyncIteration:
                    return
                if bundle:  # else a sign of life
                    yield bundle
                following = asyncio.ensure_future(anext(response))
        except BackPressureError as error:
            raise Busy("as many conversations wait as this server takes") from error
        except _LOSSES as error:
            raise ReplicaLost(str(error)) from error
        finally:
            self._not_begun.pop(place, None)
            following.cancel()
            with suppress(RayError, RayServeException):  # raises what the reply ended with
                response.cancel()
            await asyncio.wait({following})
            _ = following.cancelled() or following.exception()  # nobody asks any more; asyncio would log that

    async def _until_begun(self, following: "asyncio.Future[Any]", place: object) -> AsyncIterator[Waiting]:
        """Why a reply has not begun, each time that changes."""
        told = None
        while not (await asyncio.wait({following}, timeout=NEWS_EVERY_S))[0]:
            if not await self._status.running():
                if self._status.trouble:
                    raise GenerationFailed(await self._status.in_words())
                news = Waiting("starting")
            else:
                news = Waiting("queued", ahead=list(self._not_begun).index(place))
            if news != told:
                told = news
                yield news


class _Status:
    """What Serve's controller knows of a deployment of this application, asked at most once a second."""

    def __init__(self, deployment: str) -> None:
        self._deployment = deployment
        self._asked_at = -STATUS_HOLDS_S
        self._states: dict[ReplicaState, int] = {}
        self.trouble = ""
        self._asking = asyncio.Lock()

    async def running(self) -> int:
        """Replicas that take requests."""
        await self._refresh()
        return self._states.get(ReplicaState.RUNNING, 0)

    async def in_words(self) -> str:
        """Why there is no replica to answer."""
        await self._refresh()
        if self._states.get(ReplicaState.RUNNING):
            return "the replicas do not answer"
        if self.trouble:
            return f"no replica can be started: {self.trouble}"
        return "starting a replica" if self._states else "no replica runs; the next message starts one"

    async def _refresh(self) -> None:
        async with self._asking:
            if time.monotonic() - self._asked_at < STATUS_HOLDS_S:
                return
            application = serve.get_replica_context().app_name
            status = await asyncio.to_thread(serve.status)
            self._asked_at = time.monotonic()
            deployment = status.applications[application].deployments[self._deployment]
            self._states = deployment.replica_states
            # Not so a lost replica: the deployment is UNHEALTHY until another one runs, which is what starts next.
            failing = deployment.status_trigger == DeploymentStatusTrigger.REPLICA_STARTUP_FAILED
            self.trouble = deployment.message.strip().splitlines()[-1] if failing and deployment.message else ""
