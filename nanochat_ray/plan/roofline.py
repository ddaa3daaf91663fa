"""How long a training step takes on named hardware, from what it computes and what it moves. Standard library only.

Roofline (Williams, Waterman and Patterson, CACM 52(4), 2009): a part that computes F FLOPs and moves Q bytes takes
max(F / reachable FLOP/s, Q / reachable bytes/s). Parts follow each other, so a step is their sum. What is reachable is
a fraction of the data sheet, an assumption that stands in hardware.py. On GPUs nothing of this has been measured by us.
"Read once" and "written once" below mean that nothing stays in a cache from one kernel to the next.
"""

from collections.abc import Iterable
from dataclasses import dataclass, replace

from nanochat_ray.plan.hardware import Hardware
from nanochat_ray.plan.record import Plan
from nanochat_ray.plan.shape import ModelShape, attended_pairs

_ELEMENT = 2  # bytes of an activation in bf16

# Widths per token and layer of the passes over activations between the products, forward and backward, if each reads
# what it needs once and writes what it makes once: residual mixing and norm 4, rotation and norm of queries 2 and of
# keys 2, value embeddings 3, residual and norm 4, squared ReLU 8, residual 3; the backward pass twice the forward.
_PASSED_WIDTHS, _PASSED_KV_WIDTHS = 3 * (4 + 2 + 4 + 8 + 3), 3 * (2 + 3)

# Attention, per pair of a query and a key and per channel: two products forward, of 2 FLOPs each; four backward, and
# the scores once more. Forward it reads q, k, v and writes y; backward it reads q, k, v, y, dy and writes dq, dk, dv.
_ATTENTION_FLOPS = 2 * (2 + 4 + 1)
_ATTENTION_WIDTHS, _ATTENTION_KV_WIDTHS = 2 + 4, 2 + 4

_LOGIT_PASSES = 3  # over a chunk of logits: read for the sum, read and written for the gradient

# Bytes per weight and micro-batch. The cast: fp32 read, bf16 written. The gradient: bf16 read, the sum in fp32 read and
# written.
_CAST_AND_ADD = (4 + 2) + (2 + 4 + 4)

# Bytes per weight of Muon's update besides the products, as model/updates.py and model/shards.py write it, one kernel
# after another. fp32 is 4 and bf16 2.
_MUON_BYTES = (
    (4 + 4)  # the gradient scaled: read, written
    + (4 + 4)  # the weights stacked
    + (4 + 4 + 4)  # the new momentum, from momentum and gradient
    + (4 + 4 + 4)  # the update, from gradient and momentum
    + (4 + 2)  # the update in bf16
    + 2 * (2 + 4 + 4)  # two norms, of all and of the rows: read, written in fp32, read
    + (2 + 2)  # rows evened out
    + (2 + 4 + 4)  # the norm before Polar Express
    + (2 + 2)  # divided by it
    + (2 + 4)  # the result in fp32
    + 4  # its norm
    + (4 + 4)  # divided by it
    + (4 + 4) + 4  # NorMuon: squares, their means
    + (4 + 4)  # scaled by them
    + (4 + 4 + 4)  # update times weight
    + (4 + 4)  # where that is not negative
    + (4 + 4 + 4)  # the weight there
    + (4 + 4 + 4)  # the update and a part of that
    + (4 + 4 + 4)  # the new weight, from weight and update
    + 2 * (4 + 4)  # momentum and weight copied to where they live
)  # fmt: skip
# The same on every worker, of all matrices: a buffer zeroed, gradients copied into it, weights copied from it.
_MUON_BUFFER_BYTES = 4 + (4 + 4) + (4 + 4)
_POLAR_EXPRESS_STEPS = 5
# The gradient scaled; then gradient, weight and two moments read, weight and two moments written.
_ADAMW_BYTES = (4 + 4) + 4 * 4 + 3 * 4
_EXCHANGED_BYTES = 4 + 4  # per weight: its gradient to its owner and the weight back, in fp32
_LAUNCHES_PER_LAYER = 60  # kernels of a layer forward and backward, compiled

_Work = tuple[float, float]  # FLOPs of a kernel, and bytes that it moves


@dataclass(frozen=True)
class Part:
    """A part of a step on one worker.

    Attributes:
        limit: which one it meets, with its figure; where its kernels meet several, the one that takes most of the time
            and the other's share of it.
    """

    name: str
    seconds: float
    limit: str


@dataclass(frozen=True)
class StepEstimate:
    """Attributes:
    parts: in the order of a step; their seconds add up to the step's.
    mfu: of the dense bf16 peak, whatever the dtype.
    """

    parts: tuple[Part, ...]
    seconds: float
    tokens_per_s: float
    mfu: float


def training_step(plan: Plan, hardware: Hardware, workers: int | None = None, fp8: bool = False) -> StepEstimate:
    """One optimizer step of the plan on equal workers, which run its micro-batches in whole rounds.

    Args:
        workers: as many as the hardware has, unless given. More than one of its machines holds talk over the network.
        fp8: the layers' products in fp8, the head in bf16.
    """
    workers = workers or hardware.workers
    rounds = -(-plan.micro_batches // workers)
    machine = _Machine(hardware, fp8)
    tokens = plan.micro_batch_rows * plan.model.sequence_len
    micro_batch = _micro_batch(plan.model, tokens, machine)
    idle = plan.model.n_layer * _LAUNCHES_PER_LAYER * hardware.launch_s - sum(part.seconds for part in micro_batch)
    if idle > 0:
        micro_batch.append(Part("waiting for the CPU", idle, _launch_limit(hardware)))
    parts = [replace(part, seconds=rounds * part.seconds) for part in micro_batch]
    parts += _update(plan.model, machine, workers)
    seconds = sum(part.seconds for part in parts)
    speed = plan.batch_tokens / seconds
    return StepEstimate(tuple(parts), seconds, speed, plan.flops_per_token * speed / (workers * hardware.peak_flops))


class _Machine:
    """What one worker reaches."""

    def __init__(self, hardware: Hardware, fp8: bool):
        self.hardware = hardware
        self.head_flops = hardware.peak_flops * hardware.reached.products
        self.product_flops = hardware.fp8_flops * hardware.reached.fp8_products if fp8 else self.head_flops
        self.attention_flops = hardware.peak_flops * hardware.reached.attention
        self.bytes_per_s = hardware.bandwidth * hardware.reached.bandwidth

    def part(self, name: str, works: Iterable[_Work], flops_per_s: float, note: str = "") -> Part:
        """Kernels one after another, each of which meets one of the two limits."""
        limits = {
            f"compute, {flops_per_s / 1e12:.3g} TFLOP/s": 0.0,
            f"memory, {self.bytes_per_s / 1e9:,.0f} GB/s": 0.0,
        }
        compute, memory = limits
        for flops, moved in works:
            computing, moving = flops / flops_per_s, moved / self.bytes_per_s
            limits[compute if computing >= moving else memory] += max(computing, moving)
        seconds = sum(limits.values())
        most, least = sorted(limits, key=limits.__getitem__, reverse=True)
        share = limits[least] / seconds
        other = f"; {share:.0%} of it {least}" if share >= 0.005 else ""
        return Part(name, seconds, most + other + (note and f"; {note}"))


def _launch_limit(hardware: Hardware) -> str:
    return f"{_LAUNCHES_PER_LAYER} kernels of a layer, each started {hardware.launch_s * 1e6:.2g} µs after the last"


def _micro_batch(shape: ModelShape, tokens: int, machine: _Machine) -> list[Part]:
    width, kv_width, vocab, rows = shape.n_embd, shape.kv_width, shape.padded_vocab_size, tokens // shape.sequence_len
    linears = [
        (width, width),
        (width, kv_width),
        (width, kv_width),
        (width, width),
        (width, 4 * width),
        (4 * width, width),
    ]
    of_layer = [product for linear in linears for product in _products(tokens, *linear)]
    pairs = [rows * attended_pairs(shape.sequence_len, window) for window in shape.windows]
    attended = tokens * (_ATTENTION_WIDTHS * width + _ATTENTION_KV_WIDTHS * kv_width) * _ELEMENT
    passes = shape.n_layer * tokens * (_PASSED_WIDTHS * width + _PASSED_KV_WIDTHS * kv_width) * _ELEMENT
    logits = _LOGIT_PASSES * tokens * vocab * _ELEMENT
    cast = shape.count_parameters().total * _CAST_AND_ADD
    head_flops = machine.head_flops
    return [
        machine.part("products of the layers", shape.n_layer * of_layer, machine.product_flops),
        machine.part(
            "attention",
            [(_ATTENTION_FLOPS * width * count, attended) for count in pairs],
            machine.attention_flops,
            f"assumed to compute at {machine.hardware.reached.attention:.0%} of the peak",
        ),
        machine.part("between the products", [(0, passes)], head_flops),
        machine.part(
            "head and loss",
            [*_products(tokens, width, vocab), (0, logits)],
            head_flops,
            f"{_LOGIT_PASSES} passes over the logits",
        ),
        machine.part(
            "casts and gradients", [(0, cast)], head_flops, f"{_CAST_AND_ADD} bytes per weight and micro-batch"
        ),
    ]


def _products(tokens: int, inputs: int, outputs: int) -> list[_Work]:
    """A linear layer's three products: forward, gradient of the input, gradient of the weight."""
    moved = (tokens * inputs + tokens * outputs + inputs * outputs) * _ELEMENT
    product: _Work = 2 * tokens * inputs * outputs, moved
    return 3 * [product]


def _update(shape: ModelShape, machine: _Machine, workers: int) -> list[Part]:
    counts, hardware = shape.count_parameters(), machine.hardware
    width, kv_width = shape.n_embd, shape.kv_width
    matrices = [(width, width)] * 2 + [(kv_width, width)] * 2 + [(width, 4 * width)] * 2  # (shorter, longer) sides
    works = [work for matrix in matrices for work in _polar_express(*matrix)]
    shared = [(shape.n_layer * flops / workers, shape.n_layer * moved / workers) for flops, moved in works]
    passes = (counts.matrices * _MUON_BYTES + (counts.total - counts.matrices) * _ADAMW_BYTES) / workers
    own = counts.matrices * _MUON_BUFFER_BYTES  # of every worker, not shared
    note = f"{_MUON_BYTES} bytes per weight of Muon, {_ADAMW_BYTES} of AdamW" + ", shared" * (workers > 1)
    parts = [machine.part("update", [*shared, (0, passes + own)], machine.head_flops, note)]
    if workers > 1:
        moved = _EXCHANGED_BYTES * counts.total * (workers - 1) / workers
        sheet, place = hardware.link_bytes_per_s, "inside a machine"
        if workers > hardware.machine_workers:
            sheet, place = hardware.network_bytes_per_s, "of each worker between machines, an assumption"
        figure = f"link, {hardware.reached.link:.0%} of {sheet / 1e9:,.0f} GB/s {place}"
        limit = f"{figure}; fp32 gradients and weights, not hidden"
        parts.append(Part("exchange", moved / (sheet * hardware.reached.link), limit))
    return parts


def _polar_express(short: int, long: int) -> list[_Work]:
    """All steps on one matrix: XXᵀ, a polynomial of it, and that times X; operands are read once."""
    square, matrix = short * short, short * long
    step = [
        (2 * square * long, matrix + square),
        (2 * square * short, 2 * square),
        (2 * square * long, square + 2 * matrix),
    ]
    return [(flops, moved * _ELEMENT) for flops, moved in _POLAR_EXPRESS_STEPS * step]
