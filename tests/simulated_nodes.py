"""A Ray cluster of three simulated machines, in a process of its own: `RAY_TMPDIR=… python -m tests.simulated_nodes`.

Prints one JSON line with the address of its GCS and the hex ids of the two workers; then, for each line on its standard
input, one with the nodes that drain and their deadlines in ms. Ends with its input.
"""

import json
import sys

import ray
from ray._private.state import state
from ray.cluster_utils import Cluster
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

NODE = {"num_cpus": 1, "object_store_memory": 80 << 20}


@ray.remote(num_cpus=1)
class Busy:
    """Keeps a node at work: an idle one that drains is gone at once."""

    def ready(self) -> None:
        pass


def main() -> None:
    cluster = Cluster(initialize_head=True, head_node_args={**NODE, "include_dashboard": False})
    workers = [cluster.add_node(**NODE), cluster.add_node(**NODE)]
    cluster.connect()
    here = [NodeAffinitySchedulingStrategy(worker.node_id, soft=False) for worker in workers]
    busy = [Busy.options(scheduling_strategy=each).remote() for each in here]
    ray.get([each.ready.remote() for each in busy])
    print(json.dumps({"address": cluster.address, "workers": [worker.node_id for worker in workers]}), flush=True)
    for _ in sys.stdin:
        print(json.dumps(state.get_draining_nodes()), flush=True)
    ray.shutdown()
    cluster.shutdown()


if __name__ == "__main__":
    main()
