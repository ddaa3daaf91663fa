"""RAY SHELL: spare processes, with every library loaded, that become the actors of the next group of workers.

A fresh Ray process needs seconds of a core to import torch and Ray's libraries, and a group needs one for each worker
and three beside the controller. Ray gives an actor an idle process of the same job and environment if there is one; so
some are started while training runs, and a lost machine does not wait for imports. On a machine with two cores this
took the start of a worker from 6.5 s to 0.1 s.
"""

from collections.abc import Mapping
from typing import Any

import grpc
import ray

BESIDE_CONTROLLER = 3  # Ray Train's synchronization actor and dataset manager, Ray Data's split coordinator
KEEP_ALIVE_S = 24 * 3600  # the machine or the job ends before
ANSWER_WITHIN_S = 2.0


def ask_for_spares(node: Mapping[str, Any], number: int, environment: str) -> None:
    """See to it that a machine has so many idle processes of an environment, or begins to: ask again later.

    Nothing happens when it does not answer: machines go, and a spare is only a matter of speed. The service is part of
    Ray, a Python function for it is not. A machine of few cores starts one at a time and forgets the rest.

    Args:
        node: what `ray.nodes()` says of the machine.
        environment: serialized, as a process of it says: `get_runtime_context().get_runtime_env_string()`.
    """
    from ray._private.grpc_utils import init_grpc_channel
    from ray.core.generated import node_manager_pb2, node_manager_pb2_grpc

    request = node_manager_pb2.PrestartWorkersRequest(  # type: ignore[attr-defined]
        job_id=bytes.fromhex(ray.get_runtime_context().get_job_id()),
        keep_alive_duration_secs=KEEP_ALIVE_S,
        num_workers=number,
    )
    request.runtime_env_info.serialized_runtime_env = environment
    with init_grpc_channel(f"{node['NodeManagerAddress']}:{node['NodeManagerPort']}") as channel:
        raylet = node_manager_pb2_grpc.NodeManagerServiceStub(channel)
        try:
            raylet.PrestartWorkers(request, timeout=ANSWER_WITHIN_S)
        except grpc.RpcError:
            return
