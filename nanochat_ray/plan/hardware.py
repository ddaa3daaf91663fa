"""Named hardware: what a plan assumes about speed, memory and price. Standard library only.

Peaks are the vendors' dense bf16 figures; MFU and prices are assumptions, rounded from public clouds in 2026, and are
printed as such. Nothing here measures the machine it runs on: see nanochat_ray/device.py.
"""

import re
from dataclasses import dataclass

from nanochat_ray.errors import UsageError

GIB = 2**30


@dataclass(frozen=True)
class Hardware:
    """A group of equal workers."""

    name: str
    workers: int
    peak_flops: float  # per worker, dense bf16
    memory_bytes: int  # per worker
    reserved_bytes: int  # per worker, for the runtime, compiler scratch and fragmentation
    mfu: float  # assumed fraction of the peak that training reaches
    on_demand_per_hour: float  # US dollars for the whole group
    spot_per_hour: float  # US dollars for the whole group


@dataclass(frozen=True)
class _Gpu:
    peak_flops: float
    memory_gib: int
    mfu: float
    on_demand: float
    spot: float


_GPUS = {
    "A100": _Gpu(312e12, 79, 0.50, 1.80, 0.90),
    "H100": _Gpu(989e12, 79, 0.50, 3.00, 1.50),
    "H200": _Gpu(989e12, 139, 0.50, 3.80, 1.90),
}
_CPU_CORE_FLOPS = 200e9  # bf16 GEMM of one AVX512-BF16 core, measured; older cores reach a quarter
_CPU_CORE_DOLLARS = 0.05
NAMES = "<N>xH100, <N>xH200, <N>xA100 or cpu<N> (N cores), for example 8xH100, 1xA100, cpu2"


def find_hardware(name: str) -> Hardware:
    """The hardware of that name: `8xH100`, `1xA100`, `cpu2`.

    Raises:
        UsageError: no such name; lists what would work.
    """
    if match := re.fullmatch(r"([1-9]\d*)x(\w+)", name):
        count, gpu = int(match[1]), _GPUS.get(match[2].upper())
        if gpu:
            return Hardware(
                name=f"{count}x{match[2].upper()}",
                workers=count,
                peak_flops=gpu.peak_flops,
                memory_bytes=gpu.memory_gib * GIB,
                reserved_bytes=4 * GIB,
                mfu=gpu.mfu,
                on_demand_per_hour=count * gpu.on_demand,
                spot_per_hour=count * gpu.spot,
            )
    if match := re.fullmatch(r"cpu([1-9]\d*)", name.lower()):
        cores = int(match[1])
        return Hardware(
            name=f"cpu{cores}",
            workers=1,
            peak_flops=cores * _CPU_CORE_FLOPS,
            memory_bytes=4 * GIB * cores,
            reserved_bytes=1 * GIB,
            mfu=0.40,
            on_demand_per_hour=cores * _CPU_CORE_DOLLARS,
            spot_per_hour=cores * _CPU_CORE_DOLLARS / 3,
        )
    raise UsageError(f"--hardware {name!r} is not known; use {NAMES}")
