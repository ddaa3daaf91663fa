"""Runs a generated program against its tests, so that it can hurt nothing and cannot claim success.

    result = run_program("def double(x): return 2 * x", "assert solution.double(4) == 8")
    result.passed

The program is loaded in a process of its own and its functions are called by a judge in another, which alone runs the
tests and alone reports; see `sandbox_judge`. Around both stand as many walls as the system allows; see `sandbox_walls`,
and ask `protections()` which stand here.

What holds everywhere: a program passes only if its functions returned, as plain data, what the tests accept, and the
tests ran to their end. It cannot see the tests. It does not get the caller's environment variables, open files or
standard input; it is ended with all it started when its tests end, or at the limit of time; its folder is removed.

What depends on the walls: without "files" and "landlock" it reads whatever the user who runs this can read, and writes
what that user can write; without "namespaces" and "seccomp" it has the network; without "namespaces", "user" and
"seccomp" it can start processes, and send signals to this user's, the caller's included. A run that it disturbs so ends
as an error, never as "passed".

What is not guaranteed: against a hole in the kernel nothing here helps (rent a virtual machine for that). Memory is
limited per process. A function is given its arguments by value: tests that look at what it did to them see nothing. Two
programs on one machine compete for its cores, so that a limit of time should be a generous one.
"""

import functools
import json
import os
import secrets
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Collection
from dataclasses import asdict, dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any

from nanochat_ray.errors import UserError
from nanochat_ray.eval import sandbox_walls
from nanochat_ray.eval.sandbox_judge import message

_GRACE_S = 10  # beyond the limit of time, for the keeper to start and to clean up on a busy machine
_KEEPER = "from nanochat_ray.eval.sandbox_keeper import main; main()"
_SOURCES = Path(__file__).parents[2]

_WHAT_WALLS_DO = {
    "namespaces": "no network, and no other process in sight (namespaces)",
    "files": "a file system of its own: Python's library, read-only, and an empty folder of limited size",
    "user": "another user id than the caller's, with no rights",
    "seccomp": "no new processes, no sockets, no signals to or tracing of others (seccomp)",
    "landlock": "reads Python's library only, writes its folder only (Landlock)",
    "limits": "limits on CPU time, memory, size of a file, open files, processes",
}


class Outcome(StrEnum):
    """How a run ended."""

    PASSED = "passed"
    FAILED = "failed"  # an assertion, an exception, or the program ended by itself before its tests had
    TIMED_OUT = "timed out"  # by the clock or in CPU time
    OUT_OF_MEMORY = "out of memory"
    KILLED = "killed"  # by a signal (a crash), or for writing too much to its folder
    OUTPUT_TOO_LONG = "output too long"


@dataclass(frozen=True)
class Limits:
    """Of one run. Time is that of the program and its tests together; the rest is per process."""

    wall_s: float = 10.0
    cpu_s: int = 5
    memory_bytes: int = 512 << 20  # address space
    box_bytes: int = 32 << 20  # all files in its folder
    file_bytes: int = 16 << 20  # one file
    open_files: int = 64
    processes: int = 16  # and threads
    output_bytes: int = 1 << 20  # more than this on stdout and stderr ends the run
    kept_bytes: int = 16 << 10  # of each in the result


@dataclass(frozen=True)
class ProgramResult:
    """One run.

    detail          why it did not pass, one line; empty if it did
    stdout, stderr  what the program wrote, at most `Limits.kept_bytes` of each; other bytes than UTF-8 are replaced
    seconds         by the clock, the start of processes included
    walls           names of the walls that stood, out of `sandbox_walls.WALLS`
    """

    outcome: Outcome
    detail: str
    stdout: str
    stderr: str
    seconds: float
    walls: tuple[str, ...]

    @property
    def passed(self) -> bool:
        """The tests ran to their end."""
        return self.outcome == Outcome.PASSED


def run_program(
    program: str, tests: str = "", limits: Limits | None = None, without: Collection[str] = ()
) -> ProgramResult:
    """Load a program and run its tests. Any thread may call it, several at once.

    program  Python source, not trusted
    tests    Python source, trusted to be what it should be: in it, `solution.f(...)` calls the program's function `f`.
             Values go both ways as plain data; see `sandbox_judge.as_json`. Without tests, a program passes that says
             it was loaded without an exception, which it can say untruly.
    without  walls to leave out though the system allows them: what the others are worth is tested so

    Raises:
        UserError: the sandbox itself cannot be set up on this machine, or broke; nothing is known about the program.
    """
    unknown = set(without) - set(sandbox_walls.WALLS)
    if unknown:
        raise ValueError(f"no such walls: {sorted(unknown)}")
    limits = limits or Limits()
    began = time.monotonic()
    folder = tempfile.mkdtemp(prefix="nanochat-sandbox-")
    try:
        report = _keep(program, tests, limits, without, folder)
    finally:
        _remove_when_left(folder)
    if report.get("outcome") not in set(Outcome):
        raise UserError(
            f"the sandbox for generated programs broke: {report.get('detail') or 'its keeper said nothing'}; "
            "it needs a machine that can start processes, with some memory and disk free in " + tempfile.gettempdir()
        )
    return ProgramResult(
        outcome=Outcome(report["outcome"]),
        detail=report["detail"],
        stdout=report["stdout"],
        stderr=report["stderr"],
        seconds=time.monotonic() - began,
        walls=tuple(report["walls"]),
    )


@functools.cache
def protections() -> tuple[str, ...]:
    """What stands between generated programs and this machine, and what does not; found out by running one.

    Raises:
        UserError: the sandbox cannot be set up on this machine.
    """
    return described(run_program("pass").walls)


def described(walls: Collection[str]) -> tuple[str, ...]:
    """The lines of `protections()` for these walls that stand, out of `sandbox_walls.WALLS`, on whatever machine."""
    return (
        "tests run in a process that the program cannot reach",
        *(_WHAT_WALLS_DO[wall] for wall in sandbox_walls.WALLS if wall in walls),
        *(f"NOT in force here: {_WHAT_WALLS_DO[wall]}" for wall in sandbox_walls.WALLS if wall not in walls),
    )


def _keep(program: str, tests: str, limits: Limits, without: Collection[str], folder: str) -> dict[str, Any]:
    """The keeper's report; `outcome` is missing or empty if there is none."""
    job = {
        "program": program,
        "limits": asdict(limits),
        "without": sorted(without),
        "parent": os.getpid(),
    }
    process = subprocess.Popen(
        [sys.executable, "-s", "-S", "-c", _KEEPER, folder],  # so that `ps` tells whose it is
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        cwd=_SOURCES,  # where -c finds our modules
        env={"PATH": "/usr/bin:/bin", "LANG": "C.UTF-8", "PYTHONHASHSEED": "0"},  # sets have one order in every run
        start_new_session=True,
    )
    try:
        said, errors = process.communicate(message(job) + message(tests), limits.wall_s + _GRACE_S)
    except subprocess.TimeoutExpired:
        return {"detail": f"its keeper did not end within {limits.wall_s + _GRACE_S:g} s"}
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)  # the keeper and the judge; with them goes all behind the walls
            process.communicate()
    if process.returncode != 0 or len(said) < 4:
        last = errors.decode(errors="replace").strip().splitlines()[-1:]
        return {"detail": last[0] if last else f"its keeper ended with {process.returncode}"}
    return dict(json.loads(said[4:]))


def _remove_when_left(folder: str) -> None:
    """Remove the folder; where the keeper was killed, its processes may take a moment to follow it."""
    deadline = time.monotonic() + 2
    while True:
        try:
            return remove_folder(folder)
        except OSError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.05)


def remove_folder(folder: str) -> None:
    """Remove a folder that a program has filled, whatever it made: any depth, links, folders without permissions.

    Every folder inside is moved to the top before it is emptied, so that no path becomes long and nothing recurses;
    links are removed, never followed. Nobody else may be writing to it.
    """
    number, moved = 0, secrets.token_hex(8)  # a name that the program has not taken
    while True:
        with os.scandir(folder) as entries:
            found = list(entries)
        if not found:
            break
        for entry in found:
            if not entry.is_dir(follow_symlinks=False):
                os.unlink(entry.path)
                continue
            os.chmod(entry.path, 0o700)
            with os.scandir(entry.path) as inner:
                children = list(inner)
            for child in children:
                if child.is_dir(follow_symlinks=False):
                    os.chmod(child.path, 0o700)  # a folder that cannot be written cannot be moved either
                number += 1
                os.rename(child.path, os.path.join(folder, f"{moved}-{number}"))
            os.rmdir(entry.path)
    os.rmdir(folder)
