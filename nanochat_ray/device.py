"""The device and dtype to compute with, each with the reason for the choice, and how fast this machine is.

Peaks are of dense matrix multiplication: vendors' figures for GPUs with a name we know, measured otherwise.
"""

import functools
import time
from collections.abc import Callable

import torch

from nanochat_ray.errors import UsageError
from nanochat_ray.plan.hardware import known_peak

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
FP8 = "fp8"  # of training: the layers' products; activations are bf16, as is everything else
# Of a model that is used and not trained. int8 is how its matrices are stored and multiplied; the rest is bf16.
USED_DTYPES = {**DTYPES, "int8": torch.int8}

_GEMM_SIZE = 2048
_STREAM_BYTES = 256 * 2**20  # well above any CPU's caches


def pick_device(name: str | None = None) -> tuple[torch.device, str]:
    """The device of that name, or the best there is, and why.

    Raises:
        UsageError: there is no such device here.
    """
    available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if name is None:
        best = next(kind for kind, here in available.items() if here)
        return torch.device(best), "no GPU found" if best == "cpu" else f"{best} is available"
    kind = name.partition(":")[0]
    if not available.get(kind, False):
        usable = ", ".join(kind for kind, here in available.items() if here)
        raise UsageError(f"device {name!r} is not available here; these are: {usable}")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UsageError(f"device {name!r} is no device name; use for example cpu, cuda or cuda:0") from None
    if kind == "cuda" and device.index is not None and device.index >= torch.cuda.device_count():
        raise UsageError(f"device {name!r} is not available here; there are {torch.cuda.device_count()} CUDA devices")
    return device, "chosen"


def pick_dtype(device: torch.device, name: str | None = None) -> tuple[torch.dtype, str]:
    """The dtype of activations: bf16 where the device multiplies bf16 matrices in hardware, else fp32; and why.

    Raises:
        UsageError: the name is not one of DTYPES, nor FP8.
    """
    if name == FP8:
        return torch.bfloat16, "the dtype around products in fp8"
    if name is not None:
        if name in USED_DTYPES and name not in DTYPES:
            raise UsageError(f"{name} is for models that are used, not for training; choose from {', '.join(DTYPES)}")
        if name not in DTYPES:
            raise UsageError(f"dtype {name!r} is not one of {', '.join(DTYPES)}")
        return DTYPES[name], "chosen"
    if device.type == "cuda":
        major, minor = torch.cuda.get_device_capability(device)
        if (major, minor) >= (8, 0):
            return torch.bfloat16, f"SM {major}.{minor} has bf16 matrix units"
        return torch.float32, f"SM {major}.{minor} has no bf16 matrix units"
    if device.type == "cpu":
        capabilities = torch.cpu.get_capabilities()
        for feature, label in (("amx_bf16", "AMX"), ("avx512_bf16", "AVX512-BF16")):
            if capabilities.get(feature, False):
                return torch.bfloat16, f"the CPU has {label}"
        return torch.float32, "the CPU has neither AVX512-BF16 nor AMX"
    return torch.float32, f"bf16 has not been tried on {device.type}"


def pick_used_dtype(device: torch.device, name: str | None = None) -> tuple[torch.dtype, str]:
    """As `pick_dtype`, for a model that is used and not trained: int8 is possible, on CPUs, when it is asked for.

    Raises:
        UsageError: the name is not one of USED_DTYPES, or the device has no such dtype.
    """
    if name == FP8:
        raise UsageError(f"{name} is for training; choose from {', '.join(USED_DTYPES)}")
    if name in DTYPES or name not in USED_DTYPES:
        return pick_dtype(device, name)
    if device.type != "cpu":
        raise UsageError(f"{name} is the CPU's; on {device.type} choose from {', '.join(DTYPES)}")
    return USED_DTYPES[name], "chosen"


def activations_of(dtype: torch.dtype) -> torch.dtype:
    """The dtype that a network computes in whose matrices have this one."""
    return torch.bfloat16 if dtype == torch.int8 else dtype


@functools.cache
def gemm_peak(device: torch.device, dtype: torch.dtype, threads: int | None = None) -> float:
    """FLOP/s of dense matrix multiplication: by name for known GPUs in bf16, else the fastest of a few measured 2048³.

    Args:
        threads: CPU threads to use; None leaves torch's setting.
    """
    if device.type == "cuda" and dtype is torch.bfloat16:
        peak = known_peak(torch.cuda.get_device_name(device))
        if peak is not None:
            return peak
    a, b, product = (torch.rand(_GEMM_SIZE, _GEMM_SIZE, device=device, dtype=dtype) for _ in range(3))
    return 2 * _GEMM_SIZE**3 / _fastest_seconds(lambda: torch.mm(a, b, out=product), device, threads)


@functools.cache
def memory_bandwidth(device: torch.device, threads: int | None = None) -> float:
    """Bytes/s read from main memory: the fastest of a few sums and maxima over 256 MiB.

    Code that fetches ahead may read a tenth faster still, and caches help with what they hold a part of.
    """
    data = torch.ones(_STREAM_BYTES // 8, dtype=torch.int64, device=device)
    return _STREAM_BYTES / min(_fastest_seconds(read, device, threads) for read in (data.sum, data.max))


def _fastest_seconds(work: Callable[[], object], device: torch.device, threads: int | None, repeats: int = 5) -> float:
    before = torch.get_num_threads()
    if threads is not None:
        torch.set_num_threads(threads)
    try:
        seconds = []
        for _ in range(repeats + 1):
            _synchronize(device)
            start = time.perf_counter()
            work()
            _synchronize(device)
            seconds.append(time.perf_counter() - start)
    finally:
        torch.set_num_threads(before)
    return min(seconds)  # the limit is what the machine can do, not what its neighbours leave of it


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()
