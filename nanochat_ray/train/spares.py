"""RAY SHELL: spare processes, with every library loaded, that become the actors of the next group of workers.

A fresh Ray process needs seconds of a core to import torch and Ray's libraries, and a group needs one for each worker
and three beside the controller. Ray gives an actor an idle process of the same job and environment if there is one; so
some are started while training runs, and a lost machine does not wait for imports. On a machine with two cores this
took the start of an actor from 6.5 s to 0.1 s.
"""

from collections.abc import Callable, Mapping
from typing import Any

import grpc
import ray

KEEP_ALIVE_S = 24 * 3600  # the machine or the job ends before
ASK_WITHIN_S = 2.0
BESIDE_CONTROLLER = 3  # Ray Train's synchronization actor and dataset manager, Ray Data's split coordinator


class Spares:
    """Keeps as many idle processes as the next group can use; lives in the controller of a run.

    Args:
        start: `(node, number, serialized runtime environment)`: start that many on a machine; whether it was reached.
    """

    def __init__(self, start: Callable[[Mapping[str, Any], int, str], bool] | None = None):
        self._start = start or _prestart
        self._ready: dict[str, int] = {}  # by node id, started and not yet taken

    def taken(self, workers: Mapping[str, int]) -> None:
        """A group has begun with so many workers per node id; it took what was ready."""
        for node, number in workers.items():
            self._ready[node] = max(0, self._ready.get(node, 0) - number)

    def refill(self, nodes: Mapping[str, Mapping[str, Any]], wanted: Mapping[str, int], environment: str) -> None:
        """Start what is missing.

        Args:
            nodes: by node id, what `ray.nodes()` says of it.
            wanted: by node id, how many should be ready.
        """
        for node, number in wanted.items():
            missing = number - self._ready.get(node, 0)
            if missing > 0 and self._start(nodes[node], missing, environment):
                self._ready[node] = number


def _prestart(node: Mapping[str, Any], number: int, environment: str) -> bool:
    """Ask a machine's raylet for idle processes: the service is part of Ray, a Python function for it is not.

    False when it does not answer: machines go, and a spare is only a matter of speed.
    """
    from ray._private.grpc_utils import init_grpc_channel
    from ray.core.generated import node_manager_pb2, node_manager_pb2_grpc

    request = node_manager_pb2.PrestartWorkersRequest(
        job_id=bytes.fromhex(ray.get_runtime_context().get_job_id()),
        keep_alive_duration_secs=KEEP_ALIVE_S,
        num_workers=number,
    )
    request.runtime_env_info.serialized_runtime_env = environment
    with init_grpc_channel(f"{node['NodeManagerAddress']}:{node['NodeManagerPort']}") as channel:
        try:
            node_manager_pb2_grpc.NodeManagerServiceStub(channel).PrestartWorkers(request, timeout=ASK_WITHIN_S)
        except grpc.RpcError:
            return False
    return True
