"""The keeper of one program: puts up the walls, starts judge and program behind them, watches, and leaves nothing.

A fresh process that `sandbox.run_program` starts for each program:

    caller ── keeper ══ walls ══ judge (the first process behind them) ── program

It alone holds what the program writes, keeps the time, and reports. It never runs generated code or tests itself.
"""

import json
import os
import selectors
import signal
import sys
import time
from contextlib import suppress
from typing import Any, NoReturn

from nanochat_ray.eval import sandbox_judge, sandbox_walls

_LOOK_EVERY_S = 0.1  # at the folder's size, where no file system of its own bounds it
_SAID_MOST = 1 << 16  # bytes of a message of the judge


def main() -> None:
    """Read a job from stdin, run it in the folder named as argument, write the report to stdout."""
    job = sandbox_judge.receive(0) | {"folder": sys.argv[1]}
    sandbox_walls.die_with_parent(job["parent"])
    sandbox_walls.adopt_orphans()
    os.umask(0o022)
    users = sandbox_walls.own_users(job["without"])
    box = os.path.join(job["folder"], "box")
    os.mkdir(box, 0o700)
    if users[1] is not None:
        os.chown(box, users[1], users[1])
        os.chmod(job["folder"], 0o711)
    sandbox_walls.library_folders()
    walls = sandbox_walls.separate(job["without"])
    sandbox_walls.hide_memory()
    pipes = {name: os.pipe() for name in ("stdout", "stderr", "verdict")}
    judge = os.fork()
    if judge == 0:
        _judge(job, users, box, walls, {name: pipe[1] for name, pipe in pipes.items()})
    os.close(0)  # the tests, which are the judge's to read
    for pipe in pipes.values():
        os.close(pipe[1])
    report = _watch(job, box, {name: pipe[0] for name, pipe in pipes.items()})
    _end(judge)
    sandbox_judge.send(1, report)


def _watch(job: dict[str, Any], box: str, pipes: dict[str, int]) -> dict[str, Any]:
    """Gather what is written until there is a verdict, or a limit is reached."""
    limits = job["limits"]
    deadline = time.monotonic() + limits["wall_s"]
    heard = {name: bytearray() for name in pipes}
    said: tuple[str, str] | None = None
    with selectors.DefaultSelector() as selector:
        for name, descriptor in pipes.items():
            os.set_blocking(descriptor, False)
            selector.register(descriptor, selectors.EVENT_READ, name)
        while said is None:
            left = deadline - time.monotonic()
            if left <= 0:
                said = (sandbox_judge.TIMED_OUT, f"after {limits['wall_s']:g} s")
            elif _size(box) > limits["box_bytes"]:
                said = (sandbox_judge.KILLED, f"it wrote more than {limits['box_bytes']:,} bytes")
            for key, _ in selector.select(max(0.0, min(left, _LOOK_EVERY_S))):
                if not _read(key.fd, heard[key.data]):
                    selector.unregister(key.fd)
                    if key.data == "verdict":
                        said = said or ("", "")  # it said all it will, see below
            if len(heard["stdout"]) + len(heard["stderr"]) > limits["output_bytes"]:
                said = ("output too long", f"more than {limits['output_bytes']:,} bytes")
    for name in ("stdout", "stderr"):
        _read(pipes[name], heard[name])  # what was written before the verdict
    verdict = _verdict(bytes(heard["verdict"][:_SAID_MOST]))
    outcome, detail = said if said[0] else (verdict.get("outcome", ""), verdict.get("detail", ""))
    return {
        "outcome": outcome,
        "detail": detail,
        "walls": verdict.get("walls", []),
        **{name: bytes(heard[name][: limits["kept_bytes"]]).decode(errors="replace") for name in ("stdout", "stderr")},
    }


def _read(descriptor: int, into: bytearray) -> bool:
    """Append what is there, at most a pipe's worth; False at the end."""
    try:
        part = os.read(descriptor, 1 << 16)
    except BlockingIOError:
        return True
    into += part
    return bool(part)


def _verdict(text: bytes) -> dict[str, Any]:
    with suppress(ValueError):
        return dict(json.loads(text))
    return {}


def _size(folder: str) -> int:
    """Bytes of all files below, 4096 for each of whatever kind; a folder that cannot be read counts as one."""
    total, folders = 0, [folder]
    while folders:
        with suppress(OSError), os.scandir(folders.pop()) as entries:
            for entry in entries:
                with suppress(OSError):
                    total += 4096 + entry.stat(follow_symlinks=False).st_blocks * 512
                    if entry.is_dir(follow_symlinks=False):
                        folders.append(entry.path)
    return total


def _end(judge: int) -> None:
    """Kill the judge and all that was started behind the walls, and wait until none is left.

    With namespaces, the death of the judge is the death of all. Without, orphans became our children: they are
    stopped first, so that none starts another while we look.
    """
    with suppress(ProcessLookupError):
        os.kill(judge, signal.SIGKILL)
    while True:
        for how in (signal.SIGSTOP, signal.SIGKILL):
            for pid in _descendants():
                with suppress(ProcessLookupError, PermissionError):
                    os.kill(pid, how)
        try:
            os.waitpid(-1, 0)
        except ChildProcessError:
            return


def _descendants() -> list[int]:
    """All processes below this one, where there is a /proc to read."""
    children: dict[int, list[int]] = {}
    for name in os.listdir("/proc") if os.path.isdir("/proc") else []:
        if name.isdigit():
            with suppress(OSError, ValueError, IndexError), open(f"/proc/{name}/stat", "rb") as file:
                parent = int(file.read().rpartition(b")")[2].split()[1])
                children.setdefault(parent, []).append(int(name))
    found, new = [], [os.getpid()]
    while new:
        new = [child for parent in new for child in children.get(parent, [])]
        found += new
    return found


def _judge(
    job: dict[str, Any], users: tuple[int, int] | tuple[None, None], box: str, walls: list[str], pipes: dict[str, int]
) -> NoReturn:
    """The first process behind the walls: starts the program, judges it, writes the verdict.

    users  ids of this process and of the program's; see `sandbox_walls.own_users`
    """
    verdict: dict[str, Any] = {"outcome": "", "detail": "the judge broke"}
    try:
        parent = 0 if "namespaces" in walls else os.getppid()  # 0: the keeper is out of sight
        sandbox_walls.die_with_parent(parent)
        os.chdir("/")  # not where the program may leave modules for tests to import
        limits, without = job["limits"], job["without"]
        if "namespaces" in walls:
            owner = users[1] if users[1] is not None else os.geteuid()
            walls = walls + sandbox_walls.own_root(job["folder"], limits["box_bytes"], owner, without)
        if "files" in walls:
            box = sandbox_walls.BOX
        calls, results = os.pipe(), os.pipe()
        program = os.fork()
        if program == 0:
            _arrange([os.open("/dev/null", os.O_RDONLY), pipes["stdout"], pipes["stderr"], calls[0], results[1]])
            _program(job, users[1], box)
        # 0 is where the tests come from; the program has closed it before it runs a line of what was generated
        _arrange([0, pipes["stdout"], pipes["stderr"], calls[1], results[0], pipes["verdict"]])
        patient = limits | {"cpu_s": int(limits["wall_s"]) + 2}  # what it waits for ends by the clock
        standing = sandbox_walls.confine(users[0], box, patient, without, parent)
        walls = walls + [wall for wall in sandbox_judge.read_result(4) if wall in standing]
        outcome, detail = sandbox_judge.judge(lambda: str(sandbox_judge.receive(0)), 3, 4)
        os.close(3)
        if outcome == sandbox_judge.KILLED:
            outcome, detail = _how_it_ended(program, limits, detail)
        verdict = {"outcome": outcome, "detail": detail}
    except BaseException as error:  # of ours, not the program's; the caller tells the user
        verdict["detail"] = sandbox_judge.describe(error)
    finally:
        verdict["walls"] = walls
        with suppress(OSError):
            os.write(5, json.dumps(verdict).encode())
        os._exit(0)


def _arrange(descriptors: list[int]) -> None:
    """Make these file descriptors 0, 1, 2 …, and close all others."""
    high = [os.dup2(descriptor, 100 + place) for place, descriptor in enumerate(descriptors)]
    for place, descriptor in enumerate(high):
        os.dup2(descriptor, place, inheritable=True)
    os.closerange(len(descriptors), os.sysconf("SC_OPEN_MAX"))


def _how_it_ended(program: int, limits: dict[str, Any], detail: str) -> tuple[str, str]:
    """Why the program's process sends nothing (more) that is of use."""
    with suppress(OSError):
        os.kill(program, signal.SIGCONT)
    deadline = time.monotonic() + 0.2  # it closed the pipe on its way out; if it did not go, that is the answer
    pid, status, usage = os.wait4(program, os.WNOHANG)
    while pid == 0 and time.monotonic() < deadline:
        time.sleep(0.002)
        pid, status, usage = os.wait4(program, os.WNOHANG)
    if pid == 0:
        return sandbox_judge.FAILED, f"the tests got {detail}"
    if usage.ru_utime + usage.ru_stime >= limits["cpu_s"] or (
        os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGXCPU
    ):
        return sandbox_judge.TIMED_OUT, f"after {limits['cpu_s']} s of CPU time"
    if os.WIFSIGNALED(status):
        number = os.WTERMSIG(status)
        return sandbox_judge.KILLED, f"signal {number}: {signal.strsignal(number)}"
    return sandbox_judge.FAILED, f"it exited with {os.WEXITSTATUS(status)} before its tests had ended"


def _program(job: dict[str, Any], user: int | None, box: str) -> NoReturn:
    """The process of the program: goes behind the last walls, then does as it likes."""
    try:
        parent = os.getppid()
        os.setsid()
        os.chdir(box)
        os.environ.clear()
        os.environ.update({"HOME": box, "TMPDIR": box, "PATH": "/usr/bin:/bin", "LANG": "C.UTF-8"})
        standing = sandbox_walls.confine(user, box, job["limits"], job["without"], parent)
        sandbox_judge.send(4, {"value": ["list", *standing]})
        sandbox_judge.answer_calls(job["program"], 3, 4)
    except sandbox_judge.ProgramEnded:
        pass  # the judge needs no more answers
    except BaseException as error:  # before the program ran: the walls could not be put up
        with suppress(OSError):
            sandbox_judge.send(4, {"error": sandbox_judge.describe(error)})
    finally:
        os._exit(0)
