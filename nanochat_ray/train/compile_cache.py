"""Compiled kernels travel with their run, so that a machine that joins it, or comes back, need not compile them again.

    <stage>/compile_cache/<key>/kernels.zip     what torch.compile left in its folder on worker 0's machine
                                manifest.json   written last: size and sha256 of the archive, names of its files

The whole folder is kept, and not what `torch.compiler.save_cache_artifacts` returns: on a CPU those lack the compiled
C++, so that every graph was found and yet the first step took as long as without them (depth 2: 46 s; with the folder
5 s, with neither 41 s). On GPUs, where this has not been measured, the folder has the kernels of every device that
worker 0's machine has used by the end of the group's first step.

Trust: this is code, the one artifact of a run that is. It is read from the run's own storage and from nowhere else,
belongs to no published model, and may be deleted at any time. Whoever can write there can run code on the workers.
"""

import hashlib
import io
import json
import os
import platform
import uuid
import zipfile
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path, PurePosixPath

import pyarrow as pa
import torch

from nanochat_ray.cli import warn
from nanochat_ray.plan import Plan
from nanochat_ray.storage import Folder

COMPILE_CACHE = "compile_cache"
ARCHIVE, MANIFEST = "kernels.zip", "manifest.json"
_FOLDER_OF_COMPILER = "TORCHINDUCTOR_CACHE_DIR"  # torch looks there at every compilation
_LOCAL_PREFIX = "nanochat_ray_"
_PARTIAL = ".partial"
_PASSING = (".lock", _PARTIAL)  # in which torch's processes wait for each other, or that ours are writing


@dataclass(frozen=True)
class CompileCache:
    """The kernels of one model on one kind of machine.

    Attributes:
        folder: in the run's storage.
        local: where torch keeps them here.
        kept: names of the files that `folder` had, whole, when this was opened.
    """

    folder: Folder
    local: Path
    kept: frozenset[str] = frozenset()

    @staticmethod
    def open(
        stage: Folder, plan: Plan, device: torch.device, dtype: torch.dtype, warn: Callable[[str], None] = warn
    ) -> "CompileCache":
        """Have torch compile into a folder of this model, with what the run has kept for it. Before the first step.

        A damaged or foreign archive is left alone with a warning: torch then compiles, as without one.
        """
        from torch._inductor.runtime.cache_dir_utils import cache_dir

        key = key_of(plan, device, dtype)
        parent = Path(cache_dir())
        if parent.name.startswith(_LOCAL_PREFIX):  # this process has opened one before
            parent = parent.parent
        local = parent / f"{_LOCAL_PREFIX}{key}"
        os.environ[_FOLDER_OF_COMPILER] = str(local)
        cache = CompileCache(stage / COMPILE_CACHE / key, local)
        try:
            return replace(cache, kept=cache._unpack())
        except FileNotFoundError:
            pass  # nothing was kept yet
        except (OSError, ValueError, KeyError, TypeError, zipfile.BadZipFile, pa.ArrowException) as error:
            warn(f"the compiled kernels in {cache.folder} are not used ({error}); compiling anew")
        return cache

    def keep(self, warn: Callable[[str], None] = warn) -> bool:
        """Write what torch has compiled here to the run's storage, if it is more than was kept; one worker calls it.

        A storage that refuses costs the next group its compilation, not the run its life.
        """
        try:
            names = self._names()
            if names <= self.kept:
                return False
            data = self._pack(names)
            self.folder.write(ARCHIVE, data)
            seal = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest(), "files": sorted(names)}
            self.folder.write_json(MANIFEST, seal)
        except OSError as error:
            warn(f"the compiled kernels could not be kept in {self.folder} ({error})")
            return False
        return True

    def _names(self) -> set[str]:
        files = (path.relative_to(self.local) for path in self.local.rglob("*") if path.is_file())
        return {path.as_posix() for path in files if path.suffix not in _PASSING}

    def _pack(self, names: set[str]) -> bytes:
        buffer = io.BytesIO()
        with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
            for name in sorted(names):
                archive.writestr(zipfile.ZipInfo(name), (self.local / name).read_bytes(), zipfile.ZIP_DEFLATED)
        return buffer.getvalue()

    def _unpack(self) -> frozenset[str]:
        manifest = json.loads(self.folder.read(MANIFEST))
        names = frozenset(manifest["files"])
        if names <= self._names():
            return names  # another worker of this machine, or an earlier group, has them here
        data = self.folder.read(ARCHIVE)
        if (len(data), hashlib.sha256(data).hexdigest()) != (manifest["bytes"], manifest["sha256"]):
            raise ValueError(f"{ARCHIVE} is not what {MANIFEST} says")
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            for name in archive.namelist():
                if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts:
                    raise ValueError(f"{name} lies outside the folder of the compiler")
                _write_once(self.local / name, archive.read(name))
        return names


def key_of(plan: Plan, device: torch.device, dtype: torch.dtype) -> str:
    """What compiled kernels depend on, hashed: torch, the processor, the model's shape, the micro-batch, the dtype.

    Only a first sorting. Within the folder torch finds a kernel by a hash of the whole computation.
    """
    facts = {
        "torch": [torch.__version__, torch.version.cuda, platform.python_version(), platform.libc_ver()],
        "processor": _processor(device),
        "model": asdict(plan.model),
        "rows": plan.micro_batch_rows,
        "dtype": str(dtype),
    }
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:16]


def _processor(device: torch.device) -> list[object]:
    """What code is generated for. On a CPU that is every instruction that this model of processor has."""
    if device.type == "cuda":
        return [torch.cuda.get_device_name(device), torch.cuda.get_device_capability(device)]
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:  # not Linux
        lines = [platform.processor()]
    names = ("model name", "flags", "Features", "CPU part")  # the last two on ARM
    described = sorted({line for line in lines if line.startswith(names)})
    return [device.type, platform.machine(), *described, torch.get_num_threads()]  # their number is compiled in


def _write_once(path: Path, data: bytes) -> None:
    """Other workers of this machine may be doing the same, and torch may be reading."""
    if path.exists():
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.{uuid.uuid4().hex[:8]}{_PARTIAL}")
    partial.write_bytes(data)
    partial.replace(path)
