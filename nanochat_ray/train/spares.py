"""RAY SHELL: spare processes, with every library loaded, that become the actors of the next group of workers.

A fresh Ray process needs seconds of a core to import torch and Ray's libraries, and a group needs one for each worker
and three beside the controller. Ray gives an actor an idle process of the same job and environment if there is one; so
some are started while training runs, and a lost machine does not wait for imports. On a machine with two cores this
took the start of a worker from 6.5 s to 0.1 s.
"""

import time
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

import grpc
import ray

BESIDE_CONTROLLER = 3  # Ray Train's synchronization actor and dataset manager, Ray Data's split coordinator
KEEP_ALIVE_S = 24 * 3600  # the machine or the job ends before
ANSWER_WITHIN_S = 2.0
START_TAKES_S = 8.0  # a machine forgets what it is asked for while it starts as many as it can at once
CPUS_PER_START = 4  # those that import at once leave three of four cores to training
Machine = Mapping[str, Any]  # what `ray.nodes()` says of it


class Spares:
    """Keeps spare processes of one runtime environment; lives in the controller of a run.

    Args:
        start: `(machine, serialized environment, processes)`: start them there; whether the machine was reached.
    """

    def __init__(
        self, start: Callable[[Machine, str, int], bool] | None = None, clock: Callable[[], float] = time.monotonic
    ):
        self._start, self._clock = start or _prestart, clock
        self._ready: Counter[str] = Counter()  # by node id: started and not yet taken
        self._started_at: dict[str, float] = {}

    def taken(self, processes: Mapping[str, int]) -> None:
        """A group has begun with so many processes per node id; it took what was ready."""
        for node, number in processes.items():
            self._ready[node] = max(0, self._ready[node] - number)

    def refill(self, machines: Mapping[str, Machine], wanted: Mapping[str, int], environment: str) -> None:
        """Start some processes on each machine where some are missing, but not while others are starting there.

        Args:
            machines: by node id.
            wanted: by node id, how many should be ready.
            environment: as a process of it says: `get_runtime_context().get_runtime_env_string()`.
        """
        now = self._clock()
        for node, number in wanted.items():
            starting = now - self._started_at.get(node, -START_TAKES_S) < START_TAKES_S
            at_once = max(1, int(machines[node]["Resources"].get("CPU", 0)) // CPUS_PER_START)
            missing = min(number - self._ready[node], at_once)
            if missing > 0 and not starting and self._start(machines[node], environment, missing):
                self._ready[node] += missing
                self._started_at[node] = now


def _prestart(machine: Machine, environment: str, processes: int) -> bool:
    """Ask a machine's raylet for idle processes. The service is part of Ray, a Python function for it is not.

    False when it does not answer: machines go, and a spare is only a matter of speed.
    """
    from ray._private.grpc_utils import init_grpc_channel
    from ray.core.generated import node_manager_pb2, node_manager_pb2_grpc

    request = node_manager_pb2.PrestartWorkersRequest(  # type: ignore[attr-defined]
        job_id=bytes.fromhex(ray.get_runtime_context().get_job_id()),
        keep_alive_duration_secs=KEEP_ALIVE_S,
        num_workers=processes,
    )
    request.runtime_env_info.serialized_runtime_env = environment
    with init_grpc_channel(f"{machine['NodeManagerAddress']}:{machine['NodeManagerPort']}") as channel:
        try:
            node_manager_pb2_grpc.NodeManagerServiceStub(channel).PrestartWorkers(request, timeout=ANSWER_WITHIN_S)
        except grpc.RpcError:
            return False
    return True
