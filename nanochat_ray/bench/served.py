"""A chat server under measurement: `python -m jobs.serve` in a process of its own, or one that runs somewhere already.

Its processes are told apart by their titles: Ray writes the actor's class into them.
"""

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import psutil

from nanochat_ray.bench.http_exchange import Address
from nanochat_ray.errors import UserError
from nanochat_ray.plan import Plan
from nanochat_ray.storage import run_folder
from nanochat_ray.stream.cursor import Cursor, StreamIdentity
from nanochat_ray.tokenizer import Tokenizer
from nanochat_ray.train.checkpoint import Checkpoints, TrainState, build_model

ROOT = Path(__file__).parents[2]
READY_WITHIN_S, END_WITHIN_S = 180.0, 60.0
STATS_WITHIN_S = 5.0
REPORTS_EVERY_S = 1.0  # a replica's, at the soonest
Stats = dict[str, Any]


def save_untrained(storage: str, run: str, plan: Plan, tokenizer: Tokenizer) -> None:
    """A run whose chat model has its initial weights: it writes nonsense at the speed of a trained one."""
    folder = run_folder(storage, run)
    tokenizer.save(folder / "tokenizer")
    rows, length = plan.micro_batch_rows, plan.model.sequence_len
    cursor = Cursor(StreamIdentity("none", tokenizer.fingerprint, length, rows, plan.micro_batches, 0))
    Checkpoints.of(folder / "sft").save(TrainState(plan, cursor), build_model(plan).state_dict(), {})


@dataclass
class ChatServer:
    """A server that answers at `url`.

    pid       of its first process; None where we did not start it, so that its processes are not known
    ready_s   from the start of that process until it said its URL
    printed   its output so far, each line with the seconds since its start
    """

    url: str
    pid: int | None = None
    ready_s: float | None = None
    printed: list[tuple[float, str]] = field(default_factory=list)

    @property
    def address(self) -> Address:
        return Address.of(self.url)

    def stats(self) -> Stats:
        """Our servers' /stats; empty for a server that has none or does not answer now."""
        try:
            answer = httpx.get(f"{self.url.rstrip('/')}/stats", timeout=STATS_WITHIN_S)
            value = answer.json() if answer.status_code == 200 else {}
        except (httpx.HTTPError, ValueError):
            value = {}
        return value if isinstance(value, dict) else {}

    def replicas(self, within_s: float = 0.0) -> list[Stats]:
        """What /stats says of each replica; asked again where it knows none, because a busy one reports late."""
        deadline = time.monotonic() + within_s
        while not (found := self.stats().get("replicas", [])) and time.monotonic() < deadline:
            time.sleep(REPORTS_EVERY_S)
        return found

    def processes(self) -> list[psutil.Process]:
        """The server's first process and all that descend from it."""
        try:
            first = psutil.Process(self.pid) if self.pid else None
            return [first, *first.children(recursive=True)] if first else []
        except psutil.NoSuchProcess:
            return []

    def usage(self) -> "Usage":
        """What its processes have used by now."""
        return Usage.of(self.processes())


@dataclass(frozen=True)
class Usage:
    """Of each process of a server, by its id: role, CPU seconds so far, resident bytes, open file descriptors."""

    at: float
    processes: dict[int, tuple[str, float, int, int]]

    @staticmethod
    def of(processes: Iterable[psutil.Process]) -> "Usage":
        found = {}
        for process in processes:
            try:
                with process.oneshot():
                    times, rss = process.cpu_times(), process.memory_info().rss
                    role = role_of(process.cmdline())
                    found[process.pid] = (role, times.user + times.system, rss, process.num_fds())
            except psutil.Error:
                continue  # it has ended
        return Usage(time.monotonic(), found)

    def cpu_since(self, earlier: "Usage", without: Iterable[int] = ()) -> dict[str, float]:
        """CPU seconds by role since an earlier look, without some processes; what has ended meanwhile is missed."""
        used: dict[str, float] = {}
        for pid in self.processes.keys() - set(without):
            role, seconds, _, _ = self.processes[pid]
            before = earlier.processes.get(pid, (role, 0.0, 0, 0))[1]
            used[role] = used.get(role, 0.0) + seconds - before
        return used

    def memory(self) -> dict[str, int]:
        """Resident bytes by role."""
        return self._summed(2)

    def files(self) -> dict[str, int]:
        """Open file descriptors by role."""
        return self._summed(3)

    def _summed(self, index: int) -> dict[str, int]:
        sums: dict[str, int] = {}
        for facts in self.processes.values():
            sums[facts[0]] = sums.get(facts[0], 0) + int(facts[index])
        return sums


def role_of(command: Sequence[str]) -> str:
    """What a process is for, in a word or two, from its command line."""
    title = command[0] if command else ""
    if title.startswith("ray::"):
        kind, *names = title.removeprefix("ray::").split(":")
        return f"replica {names[-1]}" if kind == "ServeReplica" and names else kind.split(".")[0]
    if "-m" in command[:-1]:
        return command[command.index("-m") + 1]
    script = next((word for word in command[1:] if word.endswith(".py")), title)
    return Path(script).stem or "unknown"


@contextmanager
def started(storage: str, run: str, flags: Sequence[str]) -> Iterator[ChatServer]:
    """`python -m jobs.serve` on a free port, ready to answer; it is ended with the block.

    Raises:
        UserError: it ended or was not ready in time; with the end of its output.
    """
    command = [sys.executable, "-u", "-m", "jobs.serve", "--storage", storage, "--run", run, "--json"]
    command += ["--port", str(_free_port()), *flags]
    began = time.monotonic()
    process = subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )
    server = ChatServer("", process.pid)
    ready = threading.Event()

    def follow() -> None:
        assert process.stdout is not None
        for line in process.stdout:
            server.printed.append((time.monotonic() - began, line.rstrip()))
            if not server.url and (url := _url_in(line)):
                server.url, server.ready_s = url, server.printed[-1][0]
                ready.set()
        ready.set()

    threading.Thread(target=follow, daemon=True).start()
    as_before = signal.signal(signal.SIGTERM, _end_this_process)  # its default would leave the server behind
    try:
        if not ready.wait(READY_WITHIN_S) or not server.url:
            output = "\n".join(line for _, line in server.printed[-20:])
            raise UserError(f"the server was not ready within {READY_WITHIN_S:g} s:\n{output}")
        yield server
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(END_WITHIN_S)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        signal.signal(signal.SIGTERM, as_before)


def _end_this_process(number: int, _: object) -> None:
    raise SystemExit(128 + number)


def _url_in(line: str) -> str | None:
    try:
        value = json.loads(line)
    except ValueError:
        return None
    return value.get("url") if isinstance(value, dict) and "status" not in value else None


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
