"""Programs that try to pass without being right, to get out, or to do harm: none passes, none hurts."""

import os
import shutil
import socket
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import pytest

from nanochat_ray.eval.sandbox import Limits, Outcome, remove_folder, run_program
from tests.sandbox_corpus import CHEATS, HARM, SECRET, TESTS

QUICK = Limits(wall_s=1.5, cpu_s=1, memory_bytes=256 << 20, box_bytes=4 << 20, file_bytes=2 << 20, output_bytes=1 << 18)
PATIENT = replace(QUICK, wall_s=20, cpu_s=10)  # for what ends by itself, however busy the machine is


class Surroundings:
    """What a program might find or hurt, and how to see that it did not."""

    def __init__(self, folder: Path):
        self.outside, self.private, self.runs = folder / "outside", folder / "private", folder / "runs"
        self.outside.mkdir()
        self.outside.chmod(0o777)
        (self.outside / "kept").write_text("kept")
        self.private.write_text(SECRET)
        self.private.chmod(0o600)
        self.runs.mkdir()
        self.listeners = [
            socket.create_server(("127.0.0.1", 0)),
            socket.socket(socket.AF_INET, socket.SOCK_DGRAM),
            socket.socket(socket.AF_UNIX),
            socket.socket(socket.AF_UNIX),
        ]
        tcp, udp, unix, abstract = self.listeners
        udp.bind(("127.0.0.1", 0))
        unix.bind(str(self.outside / "unix"))
        (self.outside / "unix").chmod(0o777)
        unix.listen()
        abstract.bind(f"\0{self.outside}/unix")
        abstract.listen()
        for listener in self.listeners:
            listener.setblocking(False)
        self.names = {
            "outside": self.outside, "private": self.private, "parent": os.getpid(), "unix": self.outside / "unix",
            "tcp": tcp.getsockname()[1], "udp": udp.getsockname()[1],
        }  # fmt: skip

    def fill(self, program: str) -> str:
        for name, value in self.names.items():
            program = program.replace(f"{{{name}}}", str(value))
        return program

    def heard(self) -> list[object]:
        found = []
        for listener in self.listeners:
            with suppress(BlockingIOError):
                found.append(listener.recv(9) if listener.type == socket.SOCK_DGRAM else listener.accept())
        return found

    def left_behind(self) -> list[str]:
        """Processes of any of our runs, whoever's child they are now."""
        found = []
        for process in Path("/proc").glob("[0-9]*/cmdline"):
            with suppress(OSError):
                if str(self.runs).encode() in process.read_bytes():
                    found.append(process.parent.name)
        return found


@pytest.fixture
def surroundings(monkeypatch):
    if not keeps_us_safe(run_program("").walls):
        pytest.skip("this system has neither namespaces nor seccomp and Landlock: the programs would do harm")
    folder = Path(tempfile.mkdtemp(prefix="sandbox-test-", dir="/tmp"))  # pytest's own nobody else may enter
    folder.chmod(0o755)
    around = Surroundings(folder)
    monkeypatch.setattr(tempfile, "tempdir", str(around.runs))
    monkeypatch.setenv("API_KEY", SECRET)
    yield around
    for listener in around.listeners:
        listener.close()
    shutil.rmtree(folder)


def run_all(programs, around, without=()):
    """Four at once; name → result."""
    alive = threading.active_count()
    with ThreadPoolExecutor(4) as pool:
        started = {
            name: pool.submit(
                run_program, around.fill(program), TESTS, QUICK if Outcome.TIMED_OUT in ends else PATIENT, without
            )
            for name, (ends, program) in programs.items()
        }
        results = {name: future.result() for name, future in started.items()}
    assert threading.active_count() == alive
    return results


def unhurt(around):
    assert around.left_behind() == []
    assert list(around.runs.iterdir()) == []
    assert sorted(path.name for path in around.outside.iterdir()) == ["kept", "unix"]
    assert (around.outside / "kept").read_text() == "kept"
    assert around.private.read_text() == SECRET
    assert around.heard() == []
    assert not Path("/dev/shm/escaped").exists()


def ended_otherwise(programs, results):
    return {
        name: (str(result.outcome), result.detail)
        for name, result in results.items()
        if result.outcome not in programs[name][0]
    }


def attempt(programs, around, without=()):
    results = run_all(programs, around, without)
    assert ended_otherwise(programs, results) == {}
    wrote = {name: result.stdout + result.stderr + result.detail for name, result in results.items()}
    assert not {name: text for name, text in wrote.items() if SECRET in text or "escaped" in text}
    unhurt(around)
    return results


ALL = CHEATS | HARM
LONG = {name: ALL[name] for name in ALL if Outcome.TIMED_OUT in ALL[name][0]}
SHORT = {name: ALL[name] for name in ALL if name not in LONG}
AT_ONCE = ("endless loop in a finalizer", "it ignores signals", "it stops itself", "fork bomb that ignores refusals")


@pytest.mark.slow
def test_what_neither_passes_nor_hurts(surroundings):
    began = time.monotonic()
    attempt(SHORT, surroundings)
    time.sleep(max(0.0, began + 1.0 - time.monotonic()))  # longer than the daemon waits
    unhurt(surroundings)


@pytest.mark.slow
def test_what_would_go_on_for_ever_is_ended_in_time(surroundings):
    results = attempt({name: ALL[name] for name in AT_ONCE}, surroundings)
    assert max(result.seconds for result in results.values()) < QUICK.wall_s + 8


@pytest.mark.slow
@pytest.mark.parametrize(
    "missing",
    [(), ("seccomp",), ("landlock",), ("seccomp", "landlock"), ("files",), ("namespaces",)],
    ids=lambda missing: "all walls" if not missing else "without " + " and ".join(missing),
)
def test_no_single_wall_is_all_that_holds(missing, surroundings):
    if set(missing) & {"namespaces", "files"} and not readable_by_others():
        missing = (*missing, "user")
    if not keeps_us_safe(set(run_program("").walls) - set(missing)):
        missing = ()  # here it is the only one of its kind
    results = attempt(ALL, surroundings, missing)
    assert not [result for result in results.values() if set(result.walls) & set(missing)]
    time.sleep(1)
    unhurt(surroundings)


def keeps_us_safe(walls):
    """Whether these keep a program from our processes, our files and the network."""
    return bool({"namespaces", "seccomp"} & set(walls)) and bool({"files", "landlock"} & set(walls))


def readable_by_others():
    """Whether the library is, of the Python that runs this; in a home folder it is not."""
    return all(folder.stat().st_mode & 0o005 == 0o005 for folder in Path(os.path.realpath(os.__file__)).parents)


def test_a_folder_is_removed_whatever_is_in_it(tmp_path):
    kept = tmp_path / "kept"
    kept.mkdir()
    (kept / "file").write_text("kept")
    folder = tmp_path / "box"
    (folder / "a/b").mkdir(parents=True)
    (folder / "a/b/file").write_text("x")
    for name, target in [("link", kept), ("a/link", kept / "file"), ("loop", "loop"), ("up", "..")]:
        (folder / name).symlink_to(target)
    os.mkfifo(folder / "pipe")
    (folder / "a/b").chmod(0)
    (folder / "a").chmod(0)
    here = os.open(folder, os.O_RDONLY)
    for _ in range(250):  # a longer path than there may be
        os.mkdir("d" * 20, dir_fd=here)
        deeper = os.open("d" * 20, os.O_RDONLY, dir_fd=here)
        os.close(here)
        here = deeper
    os.close(here)
    remove_folder(str(folder))
    assert [path.name for path in tmp_path.iterdir()] == ["kept"]
    assert (kept / "file").read_text() == "kept"
