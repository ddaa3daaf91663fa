"""RAY SHELL: which machines a group of workers may use, when it should leave for a new size, and how Ray is told.

Ray Train restarts a group whose workers fail and picks the new size itself. Two things are added here. The size is
counted from the machines that answer and are not about to go, not from a list that may be 20 seconds old. And a group
never loses work to a resize or a spot notice: worker 0 watches the machines, and lets all workers agree inside a step
to save, and to leave when their machines' time is over or when more could take part.
"""

import socket
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import ray
import torch.distributed as dist
from ray.train.torch import TorchTrainer

# Not public, but the only place where Ray Train takes a scaling policy; the version is pinned and tests hold it.
from ray.train.v2._internal.execution.scaling_policy import ElasticScalingPolicy, NoopDecision, ScalingDecision

from nanochat_ray.cli import warn

WATCH_EVERY_S = 1.0
ANSWER_WITHIN_S = 0.5  # a machine in the same region answers in milliseconds
STEADY_FOR_S = 2.0  # machines often come in groups; leaving for each of them would cost a restart each
CPUS_PER_DATA_TASK = 0.5


class LeaveGroup(Exception):
    """All workers leave on purpose, after a checkpoint of the step they are at; Ray Train starts the next group."""


@dataclass(frozen=True)
class Machines:
    """The machines that could hold workers at one moment.

    Attributes:
        usable: by node id (hex), the resources of each that answers and stays.
        leaving: by node id, when each that has had notice will go: seconds since the epoch.
    """

    usable: Mapping[str, Mapping[str, float]]
    leaving: Mapping[str, float]

    def places(self, per_worker: Mapping[str, float]) -> int:
        """How many workers the usable machines hold, each with room for a task that reads its data.

        Without that room Ray Data waits for a free core for ever, and says nothing.
        """
        needs = {**per_worker, "CPU": per_worker["CPU"] + CPUS_PER_DATA_TASK}
        return sum(
            min(int(resources.get(name, 0.0) // amount) for name, amount in needs.items())
            for resources in self.usable.values()
        )


def look_at_machines() -> Machines:
    """What the cluster's head knows, checked by knocking at each machine: a dead one is listed for some seconds."""
    from ray._private.state import state  # where Ray Train itself asks; the public API does not tell who is draining

    deadlines_ms = state.get_draining_nodes()  # by node id; 0: at any moment
    alive = {node["NodeID"]: node for node in ray.nodes() if node["Alive"]}
    leaving = {name: (deadline / 1000 or time.time()) for name, deadline in deadlines_ms.items() if name in alive}
    usable = {
        name: node["Resources"]
        for name, node in alive.items()
        if name not in leaving and _answers(node["NodeManagerAddress"], node["NodeManagerPort"])
    }
    return Machines(usable, leaving)


def _answers(host: str, port: int) -> bool:
    try:
        socket.create_connection((host, port), timeout=ANSWER_WITHIN_S).close()
    except OSError:
        return False
    return True


class Watch:
    """Worker 0's eye on the machines, in a thread, so that a step never waits for the cluster's head.

    Args:
        own: the machines of this group's workers.
        size: how many workers there are.
        most: how many there may be.
    """

    def __init__(
        self,
        own: set[str],
        size: int,
        most: int,
        per_worker: Mapping[str, float],
        look: Callable[[], Machines] = look_at_machines,
        clock: Callable[[], float] = time.time,
    ):
        self._own, self._size, self._most, self._per_worker = own, size, most, per_worker
        self._look, self._clock = look, clock
        self._noticed: set[str] = set()
        self._room_since: float | None = None
        self.deadline: float | None = None  # when the first machine of the group goes, seconds since the epoch
        self.may_grow = False
        self._notice = threading.Event()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._follow, daemon=True)

    def start(self) -> "Watch":
        self._thread.start()
        return self

    def stop(self) -> None:
        self._stop.set()
        self._thread.join()

    def take_notice(self) -> bool:
        """Whether a machine of the group got its notice since the last call."""
        had = self._notice.is_set()
        self._notice.clear()
        return had

    def look(self) -> None:
        """Look once."""
        machines = self._look()
        leaving = {name: deadline for name, deadline in machines.leaving.items() if name in self._own}
        if leaving.keys() - self._noticed:
            self._noticed |= leaving.keys()
            self._notice.set()
        self.deadline = min(leaving.values(), default=None)
        if min(machines.places(self._per_worker), self._most) <= self._size:
            self._room_since = None
        elif self._room_since is None:
            self._room_since = self._clock()
        self.may_grow = self._room_since is not None and self._clock() - self._room_since >= STEADY_FOR_S

    def _follow(self) -> None:
        while not self._stop.wait(WATCH_EVERY_S):
            try:
                self.look()
            except (OSError, RuntimeError, ray.exceptions.RayError) as error:
                warn(f"the cluster's head did not say which machines there are ({error}); asking again")


class UsableMachinesPolicy(ElasticScalingPolicy):
    """Ray Train's elastic policy, with the machines as they are now; a running group is never cut off from outside."""

    def make_decision_for_running_worker_group(self, *_: Any, **__: Any) -> ScalingDecision:
        self._maybe_send_resource_request()  # an autoscaler keeps bringing machines
        return NoopDecision()

    def _get_reserved_resources(self) -> Any:
        return look_at_machines().usable

    def _count_possible_workers(self, reserved_resources: Any) -> int:
        places = Machines(reserved_resources, {}).places(self.scaling_config._resources_per_worker_not_none)
        return min(places, self.scaling_config.max_workers)


class ElasticTrainer(TorchTrainer):
    """A TorchTrainer whose groups of `num_workers=(min, max)` follow `UsableMachinesPolicy`."""

    def _initialize_and_run_controller(self, **given: Any) -> Any:
        config: Any = self.scaling_config  # of the second version of Ray Train, whose types Ray's stubs do not show
        if config.elasticity_enabled:
            given["scaling_policy"] = UsableMachinesPolicy(config)
        return super()._initialize_and_run_controller(**given)  # type: ignore[misc]


def machines_of_group() -> set[str]:
    """The node ids of all workers. Collective."""
    own = ray.get_runtime_context().get_node_id()
    if not dist.is_initialized():
        return {own}
    everyone: list[str] = [""] * dist.get_world_size()
    dist.all_gather_object(everyone, own)
    return set(everyone)


def is_lost_peer(error: BaseException) -> bool:
    """Whether a collective failed because another worker went away, as opposed to a mistake of this one."""
    text = str(error).lower()  # gloo raises plain RuntimeErrors
    return isinstance(error, dist.DistError) or "gloo" in text or "nccl" in text or "connection closed" in text
