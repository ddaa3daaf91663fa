"""What all benchmarks share: how busy the machine was and with what, fresh processes, and the table for people."""

import os
import threading
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import ParamSpec, TypeVar

import psutil

from nanochat_ray.cluster import prepare_environment

SAMPLE_EVERY_S = 2.0  # each sample costs 10 ms of a core

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")


@dataclass(frozen=True)
class Line:
    """One figure for people, with the limit or the peer it must be read beside."""

    what: str
    figure: str
    beside: str = ""


def print_table(title: str, lines: list[Line], machine: dict[str, float]) -> None:
    """The lines, and last how far the machine was busy with other things: a figure from a busy machine is too low.

    Args:
        machine: what `Watch.to_dict` said.
    """
    loads = f"{machine['load_average_before']} before, {machine['load_average_after']} after"
    busy = Line(
        "cores busy with other programs",
        f"{machine['cores_busy_with_others']} of {os.cpu_count()}",
        f"load average {loads}",
    )
    table = [*lines, busy]
    what, figure = (max(len(getattr(line, name)) for line in table) for name in ("what", "figure"))
    print(f"\n{title}")
    for line in table:
        print(f"  {line.what:<{what}}  {line.figure:>{figure}}  {line.beside}".rstrip())


def in_fresh_process(
    function: Callable[Arguments, Result], *arguments: Arguments.args, **named: Arguments.kwargs
) -> Result:
    """The result of a function of a module, called in a new process with the environment that Ray's workers get.

    How threads wait and how memory is freed is fixed when a process starts, so that it cannot be compared otherwise.
    """
    prepare_environment()
    with ProcessPoolExecutor(max_workers=1, mp_context=get_context("spawn")) as pool:
        return pool.submit(function, *arguments, **named).result()


class Watch:
    """Follows this process and all its descendants while a block runs.

    After the block:
        peaks    {process id: (name, highest resident bytes)}, sampled, and exact up to the last sample on Linux
        cpu_s    CPU seconds of all of them; what a process used after its last sample is missed
        others   mean number of cores that other programs kept busy meanwhile
        load     1-minute load average before and after
    """

    def __init__(self) -> None:
        self.peaks: dict[int, tuple[str, int]] = {}
        self._own: dict[int, tuple[float, float]] = {}  # process id → CPU seconds when first and when last seen
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._follow, daemon=True)

    def __enter__(self) -> "Watch":
        self._load_before = os.getloadavg()[0]
        self._began, self._busy_before = time.monotonic(), _busy_seconds()
        self._known_before = {process.pid for process in _family()}
        self._sample()
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()
        self._sample()
        self.cpu_s = sum(last - first for first, last in self._own.values())
        seconds = time.monotonic() - self._began
        self.others = max(0.0, (_busy_seconds() - self._busy_before - self.cpu_s) / seconds)
        self.load = (self._load_before, os.getloadavg()[0])

    def peak_of(self, name: str) -> int | None:
        """The highest resident bytes of any process whose name holds `name`; None if there was none."""
        return max((size for title, size in self.peaks.values() if name in title), default=None)

    def to_dict(self) -> dict[str, float]:
        return {
            "load_average_before": round(self.load[0], 2),
            "load_average_after": round(self.load[1], 2),
            "cores_busy_with_others": round(self.others, 2),
        }

    def _follow(self) -> None:
        while not self._stop.wait(SAMPLE_EVERY_S):
            self._sample()

    def _sample(self) -> None:
        for process in _family():
            try:
                times = process.cpu_times()
                name, peak = " ".join(process.cmdline()[:4]), _peak_rss(process)
            except psutil.Error:
                continue  # it has ended
            used = times.user + times.system
            start = used if process.pid in self._known_before else 0.0
            first, _ = self._own.get(process.pid, (start, used))
            self._own[process.pid] = (first, used)
            self.peaks[process.pid] = (name, max(peak, self.peaks.get(process.pid, ("", 0))[1]))


def _family() -> list[psutil.Process]:
    own = psutil.Process()
    return [own, *own.children(recursive=True)]


def _busy_seconds() -> float:
    """CPU seconds of the whole machine that were not idle."""
    times = psutil.cpu_times()
    return sum(times) - times.idle - getattr(times, "iowait", 0.0) - getattr(times, "guest", 0.0)


def _peak_rss(process: psutil.Process) -> int:
    """The kernel's own high-water mark where it keeps one, else the size at this moment; bytes."""
    try:
        lines = Path(f"/proc/{process.pid}/status").read_text().splitlines()
    except OSError:
        lines = []
    marks = [int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:")]
    return marks[0] if marks else process.memory_info().rss
