"""The machine and versions that figures came from: only what is named here, no host name, path or environment."""

import platform
import shutil
import subprocess
from importlib import metadata
from pathlib import Path

import psutil

PACKAGES = ("nanochat_ray", "torch", "ray", "triton", "numpy", "pyarrow", "tiktoken", "rustbpe")


def describe_machine() -> list[tuple[str, str]]:
    """(what, value) of processor, memory, system, versions and, in a git checkout, the commit."""
    cores = psutil.cpu_count(logical=False)
    facts = [
        ("processor", _processor()),
        ("cores", f"{psutil.cpu_count()} logical" + (f", {cores} physical" if cores else "")),
        ("memory", f"{psutil.virtual_memory().total / 2**30:.0f} GiB"),
        *(("GPU", gpu) for gpu in _gpus()),
        ("system", f"{platform.system()} {platform.release()}, {platform.machine()}"),
        ("python", platform.python_version()),
    ]
    facts += [(name, version) for name in PACKAGES if (version := _version(name))]
    commit = _commit()
    return [*facts, ("commit", commit)] if commit else facts


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:  # not Linux
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _gpus() -> list[str]:
    if shutil.which("nvidia-smi") is None:
        return []
    return _output(["nvidia-smi", "--query-gpu=name,memory.total", "--format=csv,noheader"]).splitlines()


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _commit() -> str:
    root = str(Path(__file__).parents[1])
    commit = _output(["git", "-C", root, "rev-parse", "--short=12", "HEAD"])
    changed = _output(["git", "-C", root, "status", "--porcelain", "--untracked-files=no"])
    return f"{commit}, with uncommitted changes" if commit and changed else commit


def _output(command: list[str]) -> str:
    """What the command prints, or "" when it cannot be run: a report does without it."""
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return ""
