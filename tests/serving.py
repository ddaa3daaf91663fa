"""The chat server as a test needs it: in a process of its own (Ray and all), with the scripted model behind it."""

import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
MAX_RUNNING, MAX_QUEUED = 3, 4
SWAP = signal.SIGUSR1  # the scripted server replaces its model


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@contextmanager
def running(
    command: list[str], ready: str, environment: Mapping[str, str] = os.environ
) -> Iterator[tuple[subprocess.Popen, str]]:
    """A process and its first line of output that contains `ready`; interrupted at the end, when it must exit."""
    environment = {**environment, "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"}
    process = subprocess.Popen(
        [sys.executable, *command], cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True, start_new_session=True
    )
    try:
        assert process.stdout is not None
        seen = []
        for line in process.stdout:
            seen.append(line)
            if ready in line:
                break
        else:
            raise AssertionError(f"it ended with {process.wait()} before it was ready: {''.join(seen)}")
        yield process, line.strip()
        process.send_signal(signal.SIGTERM)
        process.wait(timeout=60)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


@dataclass(frozen=True)
class Server:
    url: str
    logs: Path  # where its Ray cluster writes
    process: subprocess.Popen


@contextmanager
def scripted_server(load: str = "load_scripted", **served: Any) -> Iterator[Server]:
    """A server with the scripted model, as a function of tests/fakes.py loads it; `served` as fields of `Served`."""
    chosen = {"storage": "none", "run": "scripted", "max_running": MAX_RUNNING, "max_queued": MAX_QUEUED, **served}
    command = ["-m", "tests.serving", str(free_port()), load, json.dumps(chosen)]
    with running(command, ready="http://") as (process, line):
        url, logs = line.split()
        yield Server(url, Path(logs), process)


def main(port: int, load: str, chosen: dict[str, Any]) -> None:
    import ray
    from ray import serve

    from nanochat_ray.serve.app import APP_NAME, HOST, Served, app_of, serve_app_until_interrupted
    from tests import fakes

    served = Served(**chosen)

    def on_ready(url: str) -> None:
        signal.signal(SWAP, lambda *_: swap())
        print(url, ray._private.worker._global_node.get_logs_dir_path())

    def swap() -> None:
        changed = app_of(fakes.load_changed, fakes.describe_changed, served)
        serve.run(changed, name=APP_NAME, route_prefix="/")

    def build() -> Any:
        return app_of(getattr(fakes, load), fakes.describe_scripted, served)

    serve_app_until_interrupted(build, HOST, port, None, served.max_replicas, on_ready)


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2], json.loads(sys.argv[3]))
