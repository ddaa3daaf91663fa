"""RAY SHELL: which machines a group of workers may use, when it should leave for a new size, and how Ray is told.

Ray Train restarts a group whose workers fail and picks the new size itself. Two things are added here. The size is
counted from the machines that answer and are not about to go, not from a list that may be 20 seconds old. And a group
never loses work to a resize or a spot notice: worker 0 watches the machines, and lets all workers agree inside a step
to save, and to leave when their machines' time is over or when more could take part.
"""

import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import ray
import torch.distributed as dist

# Not public: the first tells what is free on each machine, the others are the only places where Ray Train takes a
# scaling policy and callbacks of the controller. The version is pinned and tests hold them.
from ray._private.state import available_resources_per_node
from ray._raylet import PlacementGroupID
from ray.train.torch import TorchTrainer
from ray.train.v2._internal.callbacks.placement_group_callback import PlacementGroupCleanerCallback
from ray.train.v2._internal.execution.callback import WorkerGroupCallback
from ray.train.v2._internal.execution.scaling_policy import ElasticScalingPolicy, NoopDecision, ScalingDecision
from ray.train.v2._internal.execution.scaling_policy.autoscaling_coordinator_client import (
    TrainAutoscalingCoordinatorClient,
)
from ray.util.placement_group import PlacementGroup

from nanochat_ray.cli import warn
from nanochat_ray.cluster import answers
from nanochat_ray.train.spares import ANSWER_WITHIN_S, BESIDE_CONTROLLER, Spares

WATCH_EVERY_S = 1.0
# Machines often come in groups, and leaving for each of them would cost a restart each. Meanwhile a new one loads the
# libraries (spares.py); what it has not loaded when the group leaves, the group stands still for.
STEADY_FOR_S = 6.0
IN_VAIN_FOR_S = 600.0
SETTLE_S = 2.0  # longest wait for the reservations of a group that ended to be given back
GLANCE_EVERY_S = 0.05
# A group's first seconds want the cores of its machines, and its last helpers the spares there, themselves.
SPARES_AFTER_S = 12.0
CPUS_PER_DATA_TASK = 0.5
LOOK_ERRORS = (OSError, RuntimeError, ray.exceptions.RayError)  # of a head or a machine that is just going


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

    def places(self, per_worker: Mapping[str, float], least: int = 0) -> int:
        """How many workers the usable machines hold, each with room for a task that reads its data.

        Args:
            least: so many may do with room for one such task among them. Without any, Ray Data waits for a free core
                for ever, and says nothing.
        """
        comfortable = sum(self.places_by_machine(per_worker).values())
        if comfortable >= least:
            return comfortable
        tight = sum(_fits(resources, per_worker) for resources in self.usable.values())
        cpus = sum(resources.get("CPU", 0.0) for resources in self.usable.values())
        with_one_task = int((cpus - CPUS_PER_DATA_TASK) // per_worker["CPU"])
        return min(least, tight, max(0, with_one_task))

    def places_by_machine(self, per_worker: Mapping[str, float]) -> dict[str, int]:
        """By node id, how many workers each usable machine holds, each with room for a task that reads its data."""
        needs = {**per_worker, "CPU": per_worker["CPU"] + CPUS_PER_DATA_TASK}
        return {name: _fits(resources, needs) for name, resources in self.usable.items()}


def _fits(resources: Mapping[str, float], needs: Mapping[str, float]) -> int:
    return min(int(resources.get(name, 0.0) // amount) for name, amount in needs.items())


def look_at_machines() -> Machines:
    """What the cluster's head knows, checked by knocking at each machine: a dead one is listed for some seconds."""
    from ray._private.state import state  # where Ray Train itself asks; the public API does not tell who is draining

    deadlines_ms = state.get_draining_nodes()  # by node id; 0: at any moment
    alive = {node["NodeID"]: node for node in ray.nodes() if node["Alive"]}
    leaving = {name: (deadline / 1000 or time.time()) for name, deadline in deadlines_ms.items() if name in alive}
    usable = {
        name: node["Resources"]
        for name, node in alive.items()
        if name not in leaving and answers(node["NodeManagerAddress"], node["NodeManagerPort"])
    }
    return Machines(usable, leaving)


class Watch:
    """Worker 0's eye on the machines, in a thread, so that a step never waits for the cluster's head.

    Args:
        own: the machines of this group's workers.
        size: how many workers there are.
        most: how many there may be.
    """

    def __init__(
        self,
        own: Iterable[str],
        size: int,
        most: int,
        per_worker: Mapping[str, float],
        look: Callable[[], Machines] = look_at_machines,
        clock: Callable[[], float] = time.time,
    ):
        self._own, self._size, self._most, self._per_worker = set(own), size, most, per_worker
        self._look, self._clock = look, clock
        self._noticed: set[str] = set()
        self._room_since: float | None = None
        self.patient = False  # the last growth found no room: what is free belongs to others
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
        steady_for_s = IN_VAIN_FOR_S if self.patient else STEADY_FOR_S
        self.may_grow = self._room_since is not None and self._clock() - self._room_since >= steady_for_s

    def _follow(self) -> None:
        while not self._stop.wait(WATCH_EVERY_S):
            try:
                self.look()
            except LOOK_ERRORS as error:
                warn(f"the cluster's head did not say which machines there are ({error}); asking again")


class UsableMachinesPolicy(ElasticScalingPolicy):
    """Ray Train's elastic policy, with the machines as they are now; a running group is never cut off from outside.

    Lives in the controller of the run, which asks it about twice a second.

    Args:
        requester: who asks for machines; the same whenever the same work is started again.
        note_wait: is told, before each group, for how many seconds there were too few machines for it.
    """

    def __init__(self, scaling_config: Any, requester: str, note_wait: Callable[[float], None]):
        super().__init__(scaling_config)
        self._requester = requester
        self._note_wait = note_wait
        self._short_since: float | None = None
        self._waited_s = 0.0
        self._group: float | None = None  # when the running one began, by the controller's clock
        self._next_look = self._settled_at = 0.0
        self._spare_workers, self._spares_beside = Spares(), Spares()

    def after_controller_start(self, train_run_context: Any) -> None:
        # Ray would ask by a new name for each controller, and keep from this one, for three minutes, what a killed one
        # had asked for: Ray Data would count no core as its own.
        self._requester_id = self._requester
        self._coordinator_client = TrainAutoscalingCoordinatorClient(self._requester)
        self._send_resource_request()

    def make_decision_for_non_running_worker_group(self) -> ScalingDecision:
        self._maybe_send_resource_request()  # an autoscaler brings machines
        config, now = self.scaling_config, time.monotonic()
        try:
            places = look_at_machines().places(config._resources_per_worker_not_none, config.min_workers)
        except LOOK_ERRORS as error:
            warn(f"the cluster's head did not say which machines there are ({error}); asking again")
            places = 0
        if places < config.min_workers:
            self._short_since = now if self._short_since is None else self._short_since
            time.sleep(WATCH_EVERY_S / 4)  # the controller would ask again at once
            return NoopDecision()
        if self._short_since is not None:
            self._waited_s += now - self._short_since
        self._note_wait(self._waited_s)
        self._short_since, self._waited_s = None, 0.0
        return self._get_resize_decision(min(places, config.max_workers))

    def make_decision_for_running_worker_group(self, worker_group_state: Any, *_: Any, **__: Any) -> ScalingDecision:
        self._maybe_send_resource_request()
        try:
            self._keep_spares(worker_group_state)
        except LOOK_ERRORS as error:  # what is raised here would end the run, and machines go at any moment
            warn(f"no spare processes were asked for ({error}); asking again")
        return NoopDecision()

    def _keep_spares(self, group: Any) -> None:
        """Processes for the next group, on the machines of this one and on others that could take part."""
        now, here = time.monotonic(), ray.get_runtime_context().get_node_id()
        own = Counter(worker.metadata.node_id for worker in group.workers)
        if group.start_time != self._group:
            # First, since it may fail, and is then asked for again.
            asked = group.workers[0].execute_async(_environment_of_process)
            self._environment = ray.get(asked, timeout=ANSWER_WITHIN_S)
            self._group, self._next_look, self._settled_at = group.start_time, now, now + SPARES_AFTER_S
            self._spare_workers.taken(own)
            self._spares_beside.taken({here: BESIDE_CONTROLLER})
        if now < self._next_look:
            return
        self._next_look = now + WATCH_EVERY_S
        config: Any = self.scaling_config
        places = look_at_machines().places_by_machine(config._resources_per_worker_not_none)
        if len(places) < 2:
            return  # one machine that loses its workers has lost all
        machines = {node["NodeID"]: node for node in ray.nodes()}
        settled = now >= self._settled_at
        wanted = {
            name: max(own[name], min(number, config.max_workers))
            for name, number in places.items()
            if settled or name not in own
        }
        self._spare_workers.refill(machines, wanted, self._environment)
        if settled:
            self._spares_beside.refill(machines, {here: BESIDE_CONTROLLER}, _environment_of_process())


def _environment_of_process() -> str:
    return ray.get_runtime_context().get_runtime_env_string()


class WaitUntilGivenBack(WorkerGroupCallback):
    """Between two groups, waits until the machines know that the old one's reservations are gone.

    Otherwise the new group is reserved where room is seen first, and crowds on the machine that had no worker.
    """

    def __init__(self, per_worker: Mapping[str, float]):
        self._per_worker = per_worker

    def after_worker_group_shutdown(self, worker_group_context: Any) -> None:
        with suppress(*LOOK_ERRORS):  # the policy looks again, and says so
            self._wait_until_given_back()

    def _wait_until_given_back(self) -> None:
        until = time.monotonic() + SETTLE_S
        places = look_at_machines().places_by_machine(self._per_worker)
        while time.monotonic() < until:
            free = available_resources_per_node()
            if all(_fits(free.get(name, {}), self._per_worker) >= number for name, number in places.items()):
                return
            time.sleep(GLANCE_EVERY_S)


class ElasticTrainer(TorchTrainer):
    """A TorchTrainer whose groups of `num_workers=(min, max)` follow `UsableMachinesPolicy`."""

    def __init__(self, *positional: Any, requester: str, note_wait: Callable[[float], None], **named: Any):
        super().__init__(*positional, **named)
        self._requester, self._note_wait = requester, note_wait

    def _initialize_and_run_controller(self, **given: Any) -> Any:
        given["scaling_policy"] = UsableMachinesPolicy(self.scaling_config, self._requester, self._note_wait)
        return super()._initialize_and_run_controller(**given)  # type: ignore[misc]

    def _create_default_callbacks(self) -> list[Any]:
        config: Any = self.scaling_config
        callbacks: list[Any] = super()._create_default_callbacks()  # type: ignore[misc]
        # Its process, one more to start, gives back what a killed controller had reserved: so does the driver.
        needed = [callback for callback in callbacks if not isinstance(callback, PlacementGroupCleanerCallback)]
        return [*needed, WaitUntilGivenBack(config._resources_per_worker_not_none)]


def give_back_reservations() -> None:
    """Remove the placement groups of this job: Ray keeps that of a killed controller until the job ends."""
    job = ray.get_runtime_context().get_job_id()
    for name in ray.util.placement_group_table():
        if name.endswith(job):  # that is how these ids are made
            ray.util.remove_placement_group(PlacementGroup(PlacementGroupID(bytes.fromhex(name))))


def grew_in_vain(events: Sequence[Mapping[str, Any]], attempt: str, workers: int) -> bool:
    """Whether the last group left in order to grow, and this one, which has just begun, is no larger."""
    before = [event for event in events if event["kind"] in ("start", "leave")]
    if len(before) < 2 or before[-2].get("attempt") != attempt:
        return False
    return before[-1].get("why") == "growth" and before[-1]["workers"] >= workers


def machines_of_group() -> list[str]:
    """The node id of each worker, by rank. Collective."""
    own = ray.get_runtime_context().get_node_id()
    if not dist.is_initialized():
        return [own]
    everyone: list[str] = [""] * dist.get_world_size()
    dist.all_gather_object(everyone, own)
    return everyone


def is_lost_peer(error: BaseException) -> bool:
    """Whether a collective failed because another worker went away, as opposed to a mistake of this one."""
    text = str(error).lower()  # gloo raises plain RuntimeErrors
    return isinstance(error, dist.DistError) or "gloo" in text or "nccl" in text or "connection closed" in text
