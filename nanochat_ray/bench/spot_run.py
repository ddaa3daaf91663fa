"""The user's own command on a simulated spot cluster, and what its events say while it runs."""

import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from typing import Any, TypeVar

from nanochat_ray.bench.spot_cluster import ROOT, SpotCluster
from nanochat_ray.storage import Folder
from nanochat_ray.train.events import read_events

Answer = TypeVar("Answer")
Event = dict[str, Any]
LOOK_EVERY_S = 0.1
END_WITHIN_S = 60.0


class SpotRun:
    """`python -m jobs.<job>` on a cluster, from when it is made until `interrupt`, `kill` or its own end.

    Args:
        stage: the folder whose events to follow.
        flags: of the job, without `--address`.
    """

    def __init__(self, cluster: SpotCluster, job: str, stage: Folder, flags: list[str]):
        self.stage = stage
        self._output = tempfile.TemporaryFile("w+")  # noqa: SIM115 (closed with the run)
        command = [sys.executable, "-m", f"jobs.{job}", *flags, "--address", cluster.address]
        self.process = subprocess.Popen(
            command, cwd=ROOT, env=cluster.environment, stdout=self._output, stderr=subprocess.STDOUT, text=True
        )

    def events(self, *kinds: str) -> list[Event]:
        """Of these kinds; of all without any."""
        return [event for event in read_events(self.stage) if not kinds or event["kind"] in kinds]

    def wait_for_step(self, wanted: Callable[[Event], Answer], timeout_s: float = 150.0) -> Answer:
        """What `wanted` says of the last step, once it is true.

        Raises:
            RuntimeError: the command ended, or it did not happen in time; with its output and groups.
        """
        deadline = time.monotonic() + timeout_s
        while time.monotonic() < deadline:
            if self.process.poll() is not None:
                raise RuntimeError(f"the command ended with {self.process.returncode}:\n{self.output()}")
            steps = self.events("step")
            if steps and (answer := wanted(steps[-1])):
                return answer
            time.sleep(LOOK_EVERY_S)
        raise RuntimeError(f"not in {timeout_s:g} s: {self.events('start', 'leave')}\n{self.output()}")

    def wait_for_output(self, text: str, timeout_s: float = 60.0) -> None:
        """Until the command has printed it.

        Raises:
            RuntimeError: it did not in time.
        """
        deadline = time.monotonic() + timeout_s
        while text not in self.output():
            if time.monotonic() > deadline:
                raise RuntimeError(f"not in {timeout_s:g} s: {text!r} in\n{self.output()}")
            time.sleep(LOOK_EVERY_S)

    def wait_for_failure(self, timeout_s: float = 120.0) -> str:
        """Wait until the command has failed; its output.

        Raises:
            RuntimeError: it succeeded.
        """
        if self.process.wait(timeout_s) == 0:
            raise RuntimeError(f"the command succeeded:\n{self.output()}")
        return self.output()

    def interrupt(self) -> str:
        """As Ctrl-C; its output.

        Raises:
            RuntimeError: it crashed.
        """
        self.process.send_signal(signal.SIGINT)
        code = self.process.wait(END_WITHIN_S)
        if code not in (0, 1):
            raise RuntimeError(f"interrupted, the command ended with {code}:\n{self.output()}")
        return self.output()

    def kill(self) -> None:
        """As when the machine of the command is gone."""
        self.process.kill()
        self.process.wait(END_WITHIN_S)

    def output(self) -> str:
        self._output.seek(0)
        return self._output.read()
