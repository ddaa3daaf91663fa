"""A failure script: what happens to a run, its machines, its driver and its storage, told in order.

    with spot_cluster(machines=2) as cluster:
        chaos = Chaos(cluster, "pretrain", stage, flags)
        chaos.wait_for(workers=2)
        chaos.kill(rank=1)
        chaos.wait_for(workers=1)

Every happening waits until the group at work has done some steps, so that none strikes a group that only begins.
"""

import time
from collections.abc import Callable
from typing import Protocol

from nanochat_ray.bench.spot_cluster import SpotCluster
from nanochat_ray.bench.spot_run import SpotRun
from nanochat_ray.storage import Folder
from nanochat_ray.train.checkpoint import MODEL, Checkpoints
from nanochat_ray.train.ledger import Ledger

WORKERS_END_AFTER_S = 6.0  # their driver
STEPS_BETWEEN = 5


class Store(Protocol):
    """A storage server that can be away."""

    def stop(self) -> None: ...

    def start(self) -> None: ...


class Chaos:
    """Lets things happen to `python -m jobs.<job>` on a simulated cluster, from when it is made.

    Args:
        stage: the folder that the job writes.
        flags: of the job, without `--address`.
        store: where the stage lies, if that is a server.
    """

    def __init__(self, cluster: SpotCluster, job: str, stage: Folder, flags: list[str], store: Store | None = None):
        self.cluster, self.stage, self.store = cluster, stage, store
        self._begin: Callable[[], SpotRun] = lambda: SpotRun(self.cluster, job, stage, flags)
        self._groups_before = 0  # the present command
        self.run = self._begin()

    @property
    def ledger(self) -> Ledger:
        return Ledger(self.run.events())

    def wait_for(self, workers: int, steps: int = STEPS_BETWEEN) -> None:
        """Until a group of so many workers has done so many steps."""

        def at_work(step: dict) -> bool:
            groups = self.run.events("start")
            own = len(groups) > self._groups_before and groups[-1]["workers"] == step["workers"] == workers
            return own and step["step"] >= groups[-1]["step"] + steps

        self.run.wait_for_step(at_work)

    def kill(self, rank: int) -> None:
        """The machine of a worker vanishes without notice."""
        self.cluster.kill(self._machine_of(rank))

    def drain(self, rank: int, notice_s: float) -> None:
        """The machine of a worker gets its notice, and is taken when that is over."""
        machine = self._machine_of(rank)
        deadline = self.cluster.drain(machine, notice_s)
        time.sleep(max(0.0, deadline - time.time()))
        self.cluster.kill(machine)
        leave = self.run.events("leave")[-1]
        assert leave["why"] == "notice"
        assert leave["time"] <= deadline

    def add_nodes(self, number: int = 1) -> None:
        for _ in range(number):
            self.cluster.add()

    def kill_driver(self) -> None:
        """The machine of the user's command is gone, and with it, after some seconds, the workers."""
        self.run.kill()
        time.sleep(WORKERS_END_AFTER_S)  # else one of them may still write a newer checkpoint than is seen now

    def kill_controller(self) -> None:
        """The process that leads the groups ends, and with it the group at work; the user's command lives on."""
        self._groups_before = len(self.run.events("start"))
        for process in self.cluster.processes():
            if "TrainController" in "".join(process.cmdline()):
                process.kill()

    def kill_head(self) -> None:
        """The machine of the cluster's head is gone; the others find that out for themselves."""
        self.cluster.kill_head()

    def corrupt_newest_checkpoint(self) -> str:
        """One bit of its weights flips; its folder's name."""
        checkpoints = Checkpoints.of(self.stage)
        name = f"step_{checkpoints.steps()[-1]:06d}"
        content = bytearray((checkpoints.folder / name).read(MODEL))
        content[-1] ^= 1
        (checkpoints.folder / name).write(MODEL, bytes(content))
        return name

    def storage_fails(self, seconds: float) -> tuple[float, float]:
        """The server of the storage is away for a while; from when until when, seconds since the epoch."""
        assert self.store is not None
        began = time.time()
        self.store.stop()
        time.sleep(seconds)
        self.store.start()
        return began, time.time()

    def rerun(self) -> None:
        """The user gives the same command again."""
        self._groups_before = len(self.run.events("start"))
        self.run = self._begin()

    def _machine_of(self, rank: int) -> str:
        return self.run.events("start")[-1]["machines"][rank]
