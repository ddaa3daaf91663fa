"""RAY SHELL: a simulated Ray cluster whose machines come and go, for benchmarks and tests of elastic training.

A process of its own, told by lines on its standard input:

    with spot_cluster(machines=2) as cluster:
        cluster.drain(cluster.machines[0], notice_s=8); cluster.kill(cluster.machines[1]); cluster.add()

It is a process of its own, because two clusters in one are trouble, and Ray adds nodes from a main thread only.

The head has no CPU, as in cluster/aws-spot.yaml; a machine has two, so that one worker and the task that reads its data
fit. `RAY_…` settings and a random token are in `cluster.environment`, for whoever joins.
"""

import json
import os
import secrets
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from nanochat_ray.cluster import ending_all

ROOT = Path(__file__).parents[2]  # where jobs/ lies
STORE_BYTES = 100 << 20
ENVIRONMENT = {
    "RAY_AUTH_MODE": "token",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_worker_niceness": "0",
    "RAY_health_check_initial_delay_ms": "1000",
    "RAY_health_check_period_ms": "500",
    "RAY_health_check_timeout_ms": "3000",
    "RAY_health_check_failure_threshold": "3",
    "RAY_prestart_worker_first_driver": "0",
    "OMP_NUM_THREADS": "1",
    "OMP_WAIT_POLICY": "passive",
}


@dataclass
class SpotCluster:
    process: subprocess.Popen[str]
    environment: dict[str, str]
    address: str = ""
    machines: list[str] = field(default_factory=list)  # hex node ids, oldest first

    def tell(self, **order: Any) -> Any:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        print(json.dumps(order), file=self.process.stdin, flush=True)
        for line in self.process.stdout:
            if line.startswith("{"):  # what Ray prints is not for us
                return json.loads(line)
        raise AssertionError("the simulated cluster has ended")

    def add(self) -> str:
        self.machines.append(self.tell(do="add")["machine"])
        return self.machines[-1]

    def drain(self, machine: str, notice_s: float) -> float:
        """Give a machine its notice; returns its deadline, seconds since the epoch. It does not go by itself."""
        return self.tell(do="drain", machine=machine, notice_s=notice_s)["deadline"]

    def draining(self) -> dict[str, int]:
        """Machines that had their notice, and their deadlines in ms."""
        return self.tell(do="list")["draining"]

    def occupy(self, machine: str) -> None:
        """Keep a machine at work: an idle one that drains is gone at once."""
        self.tell(do="occupy", machine=machine)

    def kill(self, machine: str) -> None:
        """All of the machine's processes at once, as when the cloud takes it."""
        self.machines.remove(machine)
        self.tell(do="kill", machine=machine)

    def processes(self) -> list[psutil.Process]:
        """Of the cluster and its drivers, also on machines that were killed, whose children nobody has."""
        found = []
        for process in psutil.process_iter():
            with suppress(psutil.Error):  # it has ended meanwhile, or is somebody else's
                if process.environ().get("RAY_AUTH_TOKEN") == self.environment["RAY_AUTH_TOKEN"]:
                    found.append(process)
        return found

    def kill_head(self) -> None:
        """The same to the head, after which the cluster is good for nothing; its machines end by themselves."""
        self.tell(do="kill_head")


@contextmanager
def spot_cluster(machines: int) -> Iterator[SpotCluster]:
    with tempfile.TemporaryDirectory(prefix="nm", dir="/tmp") as folder:  # short: it becomes part of socket names
        environment = {**os.environ, **ENVIRONMENT, "RAY_AUTH_TOKEN": secrets.token_hex(16), "RAY_TMPDIR": folder}
        command = [sys.executable, "-m", "nanochat_ray.bench.spot_cluster"]
        pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
        with subprocess.Popen(command, cwd=ROOT, env=environment, text=True, **pipes) as process:
            cluster = SpotCluster(process, environment)
            try:
                cluster.address = cluster.tell(do="start")["address"]
                for _ in range(machines):
                    cluster.add()
                yield cluster
            finally:
                assert process.stdin is not None
                with ending_all(cluster.processes()):
                    process.stdin.close()
                    process.wait(timeout=60)


def main() -> None:
    import ray
    from ray._private.state import state
    from ray._raylet import GcsClient  # type: ignore[attr-defined]
    from ray.cluster_utils import Cluster
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    @ray.remote(num_cpus=1)
    class Busy:
        def ready(self) -> None:
            pass

    head = {"num_cpus": 0, "object_store_memory": STORE_BYTES, "include_dashboard": False}
    cluster, busy = Cluster(initialize_head=True, head_node_args=head), []
    nodes: dict[str, Any] = {}
    headless = False
    cluster.connect()
    for line in sys.stdin:
        order = json.loads(line)
        answer: dict[str, Any] = {"address": cluster.address}
        if order["do"] == "add":
            # Machines that unpacked the job's code in one folder would remove it under each other's starting processes.
            own_folder = f"runtime_resources_{time.time_ns()}"
            node = cluster.add_node(num_cpus=2, object_store_memory=STORE_BYTES, runtime_env_dir_name=own_folder)
            nodes[node.node_id] = node
            answer["machine"] = node.node_id
        elif order["do"] == "drain":
            answer["deadline"] = time.time() + order["notice_s"]
            preemption = 2  # DRAIN_NODE_REASON_PREEMPTION
            client = GcsClient(address=cluster.address)
            accepted, why = client.drain_node(order["machine"], preemption, "test", round(answer["deadline"] * 1000))
            assert accepted, why
        elif order["do"] == "occupy":
            here = NodeAffinitySchedulingStrategy(order["machine"], soft=False)
            busy.append(Busy.options(scheduling_strategy=here).remote())  # type: ignore[attr-defined]
            ray.get(busy[-1].ready.remote())
        elif order["do"] == "list":
            answer["draining"] = state.get_draining_nodes()
        elif order["do"] == "kill":
            cluster.remove_node(nodes.pop(order["machine"]), allow_graceful=False)
        elif order["do"] == "kill_head":
            head_node: Any = cluster.head_node
            head_node.kill_all_processes(check_alive=False, allow_graceful=False)
            headless = True
        print(json.dumps(answer), flush=True)
    if headless:  # Ray's own shutdown would wait for the head
        for node in nodes.values():
            node.kill_all_processes(check_alive=False, allow_graceful=False)
        os._exit(0)
    ray.shutdown()
    cluster.shutdown()


if __name__ == "__main__":
    main()
