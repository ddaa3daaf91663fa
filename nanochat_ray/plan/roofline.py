"""How long a training step takes on named hardware, from what it computes and what it moves. Standard library only.

Roofline (Williams, Waterman and Patterson, CACM 52(4), 2009): a part that computes F FLOPs and moves Q bytes takes
max(F / reachable FLOP/s, Q / reachable bytes/s). Parts follow each other, so a step is their sum. What is reachable is
a fraction of the data sheet, an assumption that stands in hardware.py. On GPUs nothing of this has been measured by us.
"""

from dataclasses import dataclass

from nanochat_ray.plan.hardware import Hardware
from nanochat_ray.plan.record import Plan
from nanochat_ray.plan.shape import ModelShape

# Bytes per token and layer of the passes over activations between the products, forward and backward, if each reads
# what it needs once and writes what it makes once: residual mixing and norm 4 widths, rotation and norm of queries and
# keys 2 + 2, value embeddings 3, residual and norm 4, squared ReLU 8, residual 3; the backward pass twice the forward.
_PASSED_WIDTHS, _PASSED_KV_WIDTHS = 3 * 21, 3 * 5
_LOGIT_PASSES = 3  # over a chunk of logits: read for the sum, read and written for the gradient
_ELEMENT = 2  # bytes of an activation in bf16
_CAST_AND_ADD = 16  # bytes per weight and micro-batch: fp32 read, bf16 written; bf16 gradient read and added in fp32
_MUON_PASSES, _ADAMW_PASSES = 60, 28  # bytes per weight of an update besides the products
_POLAR_EXPRESS_STEPS = 5
_LAUNCHES_PER_LAYER = 60  # kernels of a layer forward and backward, compiled


@dataclass(frozen=True)
class Part:
    """A part of a step on one worker: what it does, how long that takes, and which limit it meets."""

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
        workers: as many as the hardware has, unless given.
        fp8: the layers' products in fp8, the head in bf16.
    """
    workers = workers or hardware.workers
    rounds = -(-plan.micro_batches // workers)
    machine = _Machine(hardware, fp8)
    tokens = plan.micro_batch_rows * plan.model.sequence_len
    micro_batch = _micro_batch(plan.model, tokens, machine)
    idle = plan.model.n_layer * _LAUNCHES_PER_LAYER * hardware.launch_s - sum(part.seconds for part in micro_batch)
    if idle > 0:
        micro_batch.append(Part("waiting for the CPU", idle, f"{_LAUNCHES_PER_LAYER} kernels of a layer, started"))
    parts = [Part(part.name, rounds * part.seconds, part.limit) for part in micro_batch]
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

    def seconds(self, flops: float, flops_per_s: float, moved: float) -> float:
        return max(flops / flops_per_s, moved / self.bytes_per_s)


def _micro_batch(shape: ModelShape, tokens: int, machine: _Machine) -> list[Part]:
    width, kv_width, vocab = shape.n_embd, shape.kv_width, shape.padded_vocab_size
    linears = [
        (width, width),
        (width, kv_width),
        (width, kv_width),
        (width, width),
        (width, 4 * width),
        (4 * width, width),
    ]
    of_layer = sum(_products_s(tokens, *linear, machine, machine.product_flops) for linear in linears)
    scores = sum(12 * width * min(window, shape.sequence_len) for window in shape.windows) * tokens
    attended = 3 * shape.n_layer * tokens * (4 * width + 4 * kv_width) * _ELEMENT
    passes = shape.n_layer * tokens * (_PASSED_WIDTHS * width + _PASSED_KV_WIDTHS * kv_width) * _ELEMENT
    logits = _LOGIT_PASSES * tokens * vocab * _ELEMENT
    counts = shape.count_parameters()
    reached = machine.hardware.reached
    return [
        Part("products of the layers", shape.n_layer * of_layer, f"{machine.product_flops / 1e12:.3g} TFLOP/s"),
        Part(
            "attention",
            machine.seconds(scores, machine.attention_flops, attended),
            f"{machine.attention_flops / 1e12:.3g} TFLOP/s, {reached.attention:.0%} of the peak",
        ),
        Part("between the products", passes / machine.bytes_per_s, f"memory, {machine.bytes_per_s / 1e9:,.0f} GB/s"),
        Part(
            "head and loss",
            _products_s(tokens, width, vocab, machine, machine.head_flops) + logits / machine.bytes_per_s,
            f"{machine.head_flops / 1e12:.3g} TFLOP/s, {_LOGIT_PASSES} passes over the logits",
        ),
        Part(
            "casts and gradients",
            counts.total * _CAST_AND_ADD / machine.bytes_per_s,
            f"memory, {_CAST_AND_ADD} bytes per weight and micro-batch",
        ),
    ]


def _products_s(tokens: int, inputs: int, outputs: int, machine: _Machine, flops_per_s: float) -> float:
    """A linear layer's three products: forward, gradient of the input, gradient of the weight."""
    moved = (tokens * inputs + tokens * outputs + inputs * outputs) * _ELEMENT
    return 3 * machine.seconds(2 * tokens * inputs * outputs, flops_per_s, moved)


def _update(shape: ModelShape, machine: _Machine, workers: int) -> list[Part]:
    counts, hardware = shape.count_parameters(), machine.hardware
    short, kv_width = shape.n_embd, shape.kv_width
    matrices = [(short, short)] * 2 + [(kv_width, short)] * 2 + [(short, 4 * short)] * 2  # (shorter, longer) sides
    polar = shape.n_layer * _POLAR_EXPRESS_STEPS * sum(4 * s * s * long + 2 * s**3 for s, long in matrices)
    muon = machine.seconds(polar, machine.head_flops, counts.matrices * _MUON_PASSES)
    adamw = (counts.total - counts.matrices) * _ADAMW_PASSES / machine.bytes_per_s
    parts = [Part("update", (muon + adamw) / workers, "Muon's products, then memory; shared by the workers")]
    if workers > 1:
        link = hardware.link_bytes_per_s * hardware.reached.link
        moved = 2 * 4 * counts.total * (workers - 1) / workers
        parts.append(
            Part("exchange", moved / link, f"fp32 gradients and weights at {link / 1e9:,.0f} GB/s, not hidden")
        )
    return parts
