"""Named hardware: what a plan assumes about speed, memory and price. Standard library only.

Peaks and bandwidths are the vendors' dense figures. What of them training reaches, and prices, rounded from public
clouds in 2026, are assumptions, and are printed as such; so is the network between machines. Nothing here measures the
machine it runs on: see nanochat_ray/device.py.
"""

import re
from dataclasses import dataclass

from nanochat_ray.errors import UsageError

GIB = 2**30
MOST_WORKERS = 4096  # of a group, and cores of a CPU: more is a slip of the finger
GPUS_OF_A_MACHINE = 8  # at most, that NVLink joins

# Dense bf16 FLOP/s from the vendors' data sheets (without sparsity), by words of the name that the driver gives a GPU.
_BF16_PEAKS = {
    "B200": 2250e12,
    "H200": 989e12,
    "H100 NVL": 835e12,
    "H100 PCIe": 756e12,
    "H100": 989e12,
    "A100": 312e12,
    "A10G": 70e12,
    "A10": 125e12,
    "L40S": 362e12,
    "L40": 181e12,
    "L4": 121e12,
    "RTX 4090": 165e12,
    "RTX 3090": 71e12,
}


@dataclass(frozen=True)
class Reached:
    """The fractions of the data sheet's figures that are assumed to be reached."""

    products: float  # of the bf16 peak, by large matrix products
    attention: float  # of the bf16 peak, by attention forward and backward
    bandwidth: float = 0.85  # of memory
    link: float = 0.75  # between workers, in a machine and between machines
    fp8_products: float = 0.0  # of the fp8 peak, with the passes that scale and cast


@dataclass(frozen=True)
class Hardware:
    """A group of equal workers."""

    name: str
    workers: int
    machine_workers: int  # that one machine holds; a larger group talks over the network
    peak_flops: float  # per worker, dense bf16
    fp8_flops: float  # per worker, dense; 0 without fp8 units
    bandwidth: float  # of a worker's memory, bytes/s
    link_bytes_per_s: float  # of a worker to others of its machine, in each direction
    network_bytes_per_s: float  # of a worker to other machines, in each direction
    launch_s: float  # between two kernels that a worker's CPU starts
    reached: Reached
    memory_bytes: int  # per worker
    reserved_bytes: int  # per worker, for the runtime, compiler scratch and fragmentation
    on_demand_per_hour: float  # US dollars for the whole group
    spot_per_hour: float  # US dollars for the whole group


@dataclass(frozen=True)
class _Gpu:
    fp8_flops: float
    bandwidth: float
    link: float
    memory_gib: int
    on_demand: float
    spot: float
    reached: Reached


# Products: what cuBLAS is reported to reach on large bf16 products. Attention: FlashAttention-2, which torch has built
# in, forward and backward, over causal pairs and with the scores that its backward pass computes again; on Hopper it
# uses about half of what FlashAttention-3 does.
_GPUS = {
    "A100": _Gpu(0, 2.0e12, 300e9, 79, 1.80, 0.90, Reached(0.80, 0.55)),
    "H100": _Gpu(1979e12, 3.35e12, 450e9, 79, 3.00, 1.50, Reached(0.70, 0.33, fp8_products=0.50)),
    "H200": _Gpu(1979e12, 4.8e12, 450e9, 139, 3.80, 1.90, Reached(0.70, 0.33, fp8_products=0.50)),
    "B200": _Gpu(4500e12, 8.0e12, 900e9, 179, 5.50, 2.75, Reached(0.70, 0.25, fp8_products=0.50)),
}
_GPU_LAUNCH_S = 4e-6
# Assumed: 400 Gbit/s for each GPU, through which all that it exchanges goes. Sums made inside each machine first need
# less of it, TCP instead of RDMA reaches less.
_GPU_NETWORK = 50e9
_CPU_CORE_FLOPS = 200e9  # bf16 GEMM of one AVX512-BF16 core, measured; older cores reach a quarter
_CPU_CORE_BANDWIDTH = 14e9  # with both cores of a machine of two reading, measured
_CPU_CORE_DOLLARS = 0.05
NAMES = "<N>xH100, <N>xH200, <N>xB200, <N>xA100 or cpu<N> (N cores), for example 8xH100, 1xA100, cpu2"


def known_peak(name: str) -> float | None:
    """Dense bf16 FLOP/s of a GPU by the name that its driver gives it, `NVIDIA A100-SXM4-80GB`; None: not known."""
    return next((peak for words, peak in _BF16_PEAKS.items() if re.search(rf"\b{words}\b", name)), None)


def find_hardware(name: str) -> Hardware:
    """The hardware of that name: `8xH100`, `1xA100`, `cpu2`.

    Raises:
        UsageError: no such name, which lists what would work; or more workers than anybody has.
    """
    if match := re.fullmatch(r"([1-9]\d*)x(\w+)", name):
        model = match[2].upper()
        if gpu := _GPUS.get(model):
            count = _count(name, match[1], "GPUs")
            return Hardware(
                name=f"{count}x{model}",
                workers=count,
                machine_workers=min(count, GPUS_OF_A_MACHINE),
                peak_flops=_BF16_PEAKS[model],
                fp8_flops=gpu.fp8_flops,
                bandwidth=gpu.bandwidth,
                link_bytes_per_s=gpu.link,
                network_bytes_per_s=_GPU_NETWORK,
                launch_s=_GPU_LAUNCH_S,
                reached=gpu.reached,
                memory_bytes=gpu.memory_gib * GIB,
                reserved_bytes=4 * GIB,
                on_demand_per_hour=count * gpu.on_demand,
                spot_per_hour=count * gpu.spot,
            )
    if match := re.fullmatch(r"cpu([1-9]\d*)", name.lower()):
        cores = _count(name, match[1], "cores")
        return Hardware(
            name=f"cpu{cores}",
            workers=1,
            machine_workers=1,
            peak_flops=cores * _CPU_CORE_FLOPS,
            fp8_flops=0.0,
            bandwidth=cores * _CPU_CORE_BANDWIDTH,
            link_bytes_per_s=1e9,
            network_bytes_per_s=1e9,
            launch_s=0.0,
            reached=Reached(products=0.80, attention=0.30),
            memory_bytes=4 * GIB * cores,
            reserved_bytes=1 * GIB,
            on_demand_per_hour=cores * _CPU_CORE_DOLLARS,
            spot_per_hour=cores * _CPU_CORE_DOLLARS / 3,
        )
    raise UsageError(f"--hardware {name!r} is not known; use {NAMES}")


def _count(name: str, digits: str, what: str) -> int:
    if len(digits) > len(str(MOST_WORKERS)) or int(digits) > MOST_WORKERS:
        raise UsageError(f"--hardware {name} has more than {MOST_WORKERS:,} {what}; name a group that could be rented")
    return int(digits)
