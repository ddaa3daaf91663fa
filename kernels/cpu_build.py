"""Compiles the CPU's kernels for the machine they run on, once, with the machine's own compiler.

A kernel is a folder of C++ beside this file: everything in it named *.cpp becomes one library, which may include the
headers of cpu/. It is kept in $XDG_CACHE_HOME/nanochat_ray/kernels (default ~/.cache) under a name that says what it
was made of: sources, flags, compiler and processor. A second process, or the next run, loads it in milliseconds.

python -m kernels.cpu_build        # all of them now, so that nothing has to wait for them later
"""

import ctypes
import functools
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from nanochat_ray.errors import UserError

SOURCES = Path(__file__).parent
SHARED = "cpu"  # headers of all
# No contraction: where the compiler fused a·b + c on its own, it would do so in one loop and not in another, and equal
# tokens would get unequal bits.
FLAGS = ("-O3", "-std=c++17", "-ffp-contract=off", "-fvisibility=hidden", "-shared", "-fPIC", "-pthread")
_DIGEST_BYTES = 32
COMPILERS = ("c++", "g++", "clang++")


@functools.cache
def load(kernel: str, extra_flags: tuple[str, ...] = ()) -> ctypes.CDLL:
    """The library of a kernel, compiled if need be; `extra_flags` come after all others.

    Raises:
        UserError: it cannot be compiled or kept here; says why.
    """
    compiler = find_compiler()
    native = "-march=native" if platform.machine() in ("x86_64", "AMD64") else "-mcpu=native"
    command = [*compiler, *FLAGS, native, *extra_flags]
    target = cache_folder() / f"{kernel}-{_fingerprint(kernel, compiler, command)}.so"
    if not _is_whole(target):
        compile_to(target, kernel, command)
    try:
        return ctypes.CDLL(str(target))
    except OSError as error:
        raise UserError(f"the compiled kernel does not load: {error}; delete {target} to compile it again") from error


def why_not(kernel: str) -> str | None:
    """Why this machine cannot have a kernel, in words; None if it can. May compile: seconds."""
    try:
        load(kernel)
    except UserError as error:
        return str(error)
    return None


def cache_folder() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "nanochat_ray" / "kernels"


def find_compiler() -> list[str]:
    """$CXX, or the first of c++, g++ and clang++ that is installed.

    Raises:
        UserError: there is none.
    """
    try:
        chosen = shlex.split(os.environ.get("CXX", ""))
    except ValueError as error:
        raise UserError(f"no C++ compiler: $CXX is {os.environ['CXX']!r}, which is no command ({error})") from error
    for candidate in [chosen] if chosen else [[name] for name in COMPILERS]:
        if shutil.which(candidate[0]):
            return candidate
    if chosen:
        raise UserError(f"no C++ compiler: $CXX is {shlex.join(chosen)}, which is not installed")
    raise UserError(f"no C++ compiler: none of {', '.join(COMPILERS)} is installed; on Debian: apt install g++")


def compile_to(target: Path, kernel: str, command: Sequence[str]) -> None:
    """Compile a kernel's sources; `target` appears whole, so several processes may do this at once.

    Raises:
        UserError: with the compiler's first error.
    """
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent) as folder:
            made = Path(folder, target.name)
            sources = [str(path) for path in sorted((SOURCES / kernel).glob("*.cpp"))]
            output = _run([*command, f"-I{SOURCES / SHARED}", *sources, "-o", str(made)])
            if not made.is_file():
                raise UserError(f"{shlex.join(command)} made no library: {_first_error(output)}")
            with made.open("r+b") as file:
                digest = hashlib.file_digest(file, "sha256").digest()
                file.write(digest)  # behind the library, where the loader does not look
                file.flush()
                os.fsync(file.fileno())
            os.replace(made, target)
    except OSError as error:
        raise UserError(f"the CPU kernel cannot be kept in {target.parent}: {error}; set XDG_CACHE_HOME") from error


def _run(command: Sequence[str]) -> str:
    """What the compiler says.

    Raises:
        UserError: it cannot be run, or fails.
    """
    try:
        run = subprocess.run(command, capture_output=True, text=True, errors="replace")
    except OSError as error:
        raise UserError(f"no C++ compiler: {command[0]} cannot be run: {error}") from error
    if run.returncode:
        raise UserError(f"{command[0]} cannot compile the CPU kernel: {_first_error(run.stderr)}")
    return run.stdout + run.stderr


def _is_whole(target: Path) -> bool:
    """Whether a library was kept and nothing is missing: a truncated one would end the process with a bus error."""
    try:
        kept = target.read_bytes()
    except OSError:
        return False
    return hashlib.sha256(kept[:-_DIGEST_BYTES]).digest() == kept[-_DIGEST_BYTES:]


def _first_error(output: str) -> str:
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    return next((line for line in lines if "error" in line), lines[0] if lines else "it said nothing")


def _fingerprint(kernel: str, compiler: Sequence[str], command: Sequence[str]) -> str:
    digest = hashlib.sha256()
    for path in sorted([*(SOURCES / SHARED).glob("*"), *(SOURCES / kernel).iterdir()]):
        digest.update(path.name.encode() + path.read_bytes())
    version = _run([*compiler, "--version"])
    for part in (shlex.join(command).encode(), version.encode(), _processor()):
        digest.update(len(part).to_bytes(8, "little") + part)
    return digest.hexdigest()[:24]


def _processor() -> bytes:
    """What `native` depends on: a home directory may be shared by unlike machines."""
    try:
        lines = Path("/proc/cpuinfo").read_bytes().splitlines()
    except OSError:
        return f"{platform.machine()} {platform.processor()}".encode()
    names = (b"flags", b"Features", b"model name", b"CPU part", b"isa")
    return b"\n".join(sorted({line for line in lines if line.startswith(names)}))


def kernels() -> list[str]:
    """Names of all there are."""
    return sorted(folder.name for folder in SOURCES.iterdir() if folder.is_dir() and any(folder.glob("*.cpp")))


def main() -> int:
    """Compile whatever is not kept yet; without a compiler, say what that costs and that all else works."""
    began = time.monotonic()
    try:
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            list(pool.map(load, kernels()))
    except UserError as error:
        print(f"the CPU's kernels are not compiled: {error}. Everything works without them, slower", file=sys.stderr)
        return 0
    print(f"the CPU's kernels are compiled: {', '.join(kernels())} ({time.monotonic() - began:.0f} s)")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
