"""Named hardware: what a plan assumes about speed, memory and price. Standard library only.

Peaks and bandwidths are the vendors' dense figures. What of them training reaches, and prices, rounded from public
clouds in 2026, are assumptions, and are printed as such. Nothing here measures the machine it runs on: see
nanochat_ray/device.py.
"""

import re
from dataclasses import dataclass

from nanochat_ray.errors import UsageError

GIB = 2**30


@dataclass(frozen=True)
class Reached:
    """The fractions of the data sheet's figures that are assumed to be reached."""

    products: float  # of the bf16 peak, by large matrix products
    attention: float  # of the bf16 peak, by attention forward and backward
    bandwidth: float = 0.85  # of memory
    link: float = 0.75  # between workers
    fp8_products: float = 0.0  # of the fp8 peak, with the passes that scale and cast


@dataclass(frozen=True)
class Hardware:
    """A group of equal workers."""

    name: str
    workers: int
    peak_flops: float  # per worker, dense bf16
    fp8_flops: float  # per worker, dense; 0 without fp8 units
    bandwidth: float  # of a worker's memory, bytes/s
    link_bytes_per_s: float  # of a worker, in each direction
    launch_s: float  # between two kernels that a worker's CPU starts
    reached: Reached
    memory_bytes: int  # per worker
    reserved_bytes: int  # per worker, for the runtime, compiler scratch and fragmentation
    on_demand_per_hour: float  # US dollars for the whole group
    spot_per_hour: float  # US dollars for the whole group


@dataclass(frozen=True)
class _Gpu:
    peak_flops: float
    fp8_flops: float
    bandwidth: float
    link: float
    memory_gib: int
    on_demand: float
    spot: float
    reached: Reached


# Products: what cuBLAS is reported to reach on large bf16 products. Attention: FlashAttention-2, which torch has built
# in, forward and backward; on Hopper it uses about half of what FlashAttention-3 does.
_GPUS = {
    "A100": _Gpu(312e12, 0, 2.0e12, 300e9, 79, 1.80, 0.90, Reached(0.80, 0.55)),
    "H100": _Gpu(989e12, 1979e12, 3.35e12, 450e9, 79, 3.00, 1.50, Reached(0.70, 0.33, fp8_products=0.50)),
    "H200": _Gpu(989e12, 1979e12, 4.8e12, 450e9, 139, 3.80, 1.90, Reached(0.70, 0.33, fp8_products=0.50)),
    "B200": _Gpu(2250e12, 4500e12, 8.0e12, 900e9, 179, 5.50, 2.75, Reached(0.70, 0.25, fp8_products=0.50)),
}
_GPU_LAUNCH_S = 4e-6
_CPU_CORE_FLOPS = 200e9  # bf16 GEMM of one AVX512-BF16 core, measured; older cores reach a quarter
_CPU_CORE_BANDWIDTH = 14e9  # with both cores of a machine of two reading, measured
_CPU_CORE_DOLLARS = 0.05
NAMES = "<N>xH100, <N>xH200, <N>xB200, <N>xA100 or cpu<N> (N cores), for example 8xH100, 1xA100, cpu2"


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
                fp8_flops=gpu.fp8_flops,
                bandwidth=gpu.bandwidth,
                link_bytes_per_s=gpu.link,
                launch_s=_GPU_LAUNCH_S,
                reached=gpu.reached,
                memory_bytes=gpu.memory_gib * GIB,
                reserved_bytes=4 * GIB,
                on_demand_per_hour=count * gpu.on_demand,
                spot_per_hour=count * gpu.spot,
            )
    if match := re.fullmatch(r"cpu([1-9]\d*)", name.lower()):
        cores = int(match[1])
        return Hardware(
            name=f"cpu{cores}",
            workers=1,
            peak_flops=cores * _CPU_CORE_FLOPS,
            fp8_flops=0.0,
            bandwidth=cores * _CPU_CORE_BANDWIDTH,
            link_bytes_per_s=1e9,
            launch_s=0.0,
            reached=Reached(products=0.80, attention=0.30),
            memory_bytes=4 * GIB * cores,
            reserved_bytes=1 * GIB,
            on_demand_per_hour=cores * _CPU_CORE_DOLLARS,
            spot_per_hour=cores * _CPU_CORE_DOLLARS / 3,
        )
    raise UsageError(f"--hardware {name!r} is not known; use {NAMES}")
