"""The shape of a model as plain numbers: widths, windows, parameter counts, FLOPs, bytes. Standard library only.

The counts are closed formulas; tests/test_plan.py compares them with the parameters of the real model.
"""

from dataclasses import dataclass
from typing import Any

from nanochat_ray.errors import UsageError

STANDARD_VOCAB_SIZE = 2**15
STANDARD_SEQUENCE_LEN = 2048
STANDARD_HEAD_SIZE = 128
STANDARD_WINDOW_PATTERN = "SSSL"
MIN_VOCAB_SIZE = 256 + 9  # every byte, and the special tokens

VOCAB_MULTIPLE = 64  # embedding and unembedding rows are padded to this, for aligned matrix multiplications
WINDOW_MULTIPLE = 128  # short attention windows are rounded up to this, the tile of GPU attention kernels
VALUE_GATE_CHANNELS = 12  # the per-head gate of a value embedding reads this many channels
SMEAR_GATE_CHANNELS = 24  # the gate that mixes in the previous embedding reads this many channels
STANDARD_ROTARY_BASE = 100_000.0
STANDARD_QUERY_KEY_SCALE = 1.2
# What sets the public nanochat of October 2025 apart: fields of a `ModelShape`, whose defaults are those of July 2026.
OCTOBER_2025: dict[str, Any] = {
    "window_pattern": "L",
    "rotary_base": 10_000.0,
    "query_key_scale": 1.0,
    "layer_scalars": False,
    "smear": False,
    "backout": False,
    "value_embeddings": False,
}
LOGITS_CHUNK_BYTES = 2**26  # of logits that exist at once: at a vocabulary of 32768, 512 tokens in fp32, 1024 in bf16


def round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple


def attended_pairs(length: int, window: int) -> int:
    """Pairs of a query and a key that it sees in a row of so many tokens: position i sees the keys i-window … i."""
    most = min(window, length - 1)  # keys before itself that a query sees, but for the first queries
    return most * (most + 1) // 2 + (length - most) * (most + 1)


def is_power_of_two(value: int) -> bool:
    return value > 0 and value & (value - 1) == 0


@dataclass(frozen=True)
class ParameterCounts:
    """Numbers of parameters by the group that the optimizer and the scaling rules treat alike."""

    embedding: int
    value_embeddings: int
    unembedding: int
    matrices: int  # every weight inside the layers, the value gates included
    scalars: int  # residual, x0, smear and backout scalars, and the smear gate

    @property
    def total(self) -> int:
        return self.embedding + self.value_embeddings + self.unembedding + self.matrices + self.scalars

    @property
    def scaling(self) -> int:
        """P, the count that predicts the best horizon: the weights that multiply activations, no look-up tables."""
        return self.matrices + self.unembedding


@dataclass(frozen=True)
class ModelShape:
    """What the network is built from; `GPTConfig` has the same fields.

    Attributes:
        window_pattern: letters S and L, tiled over the layers; see `windows`.
        rotary_base: of the rotary positions' angles.
        query_key_scale: factor on queries and on keys after their norm; above 1, attention is sharper.
        layer_scalars: before each layer the residual becomes a learned mixture of itself and the embedding.
        smear: a learned, gated part of the previous token's embedding is added to each embedding.
        backout: a learned part of the residual after the middle layer is subtracted at the end.
        value_embeddings: every other layer adds an embedding of the token to its values.
    """

    sequence_len: int
    vocab_size: int
    n_layer: int
    n_head: int
    n_kv_head: int
    n_embd: int
    window_pattern: str
    rotary_base: float = STANDARD_ROTARY_BASE
    query_key_scale: float = STANDARD_QUERY_KEY_SCALE
    layer_scalars: bool = True
    smear: bool = True
    backout: bool = True
    value_embeddings: bool = True

    @property
    def head_size(self) -> int:
        return self.n_embd // self.n_head

    @property
    def kv_width(self) -> int:
        return self.n_kv_head * self.head_size

    @property
    def padded_vocab_size(self) -> int:
        return round_up(self.vocab_size, VOCAB_MULTIPLE)

    @property
    def value_embedding_layers(self) -> tuple[int, ...]:
        """Every other layer, counted so that the last one always has a value embedding; none where they are off."""
        if not self.value_embeddings:
            return ()
        return tuple(layer for layer in range(self.n_layer) if layer % 2 == (self.n_layer - 1) % 2)

    @property
    def windows(self) -> tuple[int, ...]:
        """Attention window of each layer in tokens: position i sees the keys i-w … i. The last layer sees all."""
        long = self.sequence_len
        short = min(round_up(-(-long // 4), WINDOW_MULTIPLE), long)
        letters = [self.window_pattern[layer % len(self.window_pattern)] for layer in range(self.n_layer - 1)]
        return (*(long if letter == "L" else short for letter in letters), long)

    def count_parameters(self) -> ParameterCounts:
        width, kv_width, vocab = self.n_embd, self.kv_width, self.padded_vocab_size
        attention = width * width + 2 * width * kv_width + width * width  # q, k and v, output
        mlp = 2 * (4 * width * width)
        value_layers = len(self.value_embedding_layers)
        return ParameterCounts(
            embedding=vocab * width,
            value_embeddings=value_layers * vocab * kv_width,
            unembedding=vocab * width,
            matrices=self.n_layer * (attention + mlp) + value_layers * VALUE_GATE_CHANNELS * self.n_kv_head,
            scalars=self.layer_scalars * 2 * self.n_layer + self.smear * (SMEAR_GATE_CHANNELS + 1) + self.backout,
        )

    def flops_per_token(self) -> int:
        """FLOPs of one training token, forward and backward.

        6 per weight in a matrix multiplication (2 forward, 4 backward), plus 12 · width · window for attention scores
        and sums in each layer (the convention of PaLM, arXiv:2204.02311, with windows: as if every query saw a full
        one). Look-ups count nothing. It is for MFU only; what attention computes is `attended_pairs`.
        """
        attention = sum(12 * self.n_embd * min(window, self.sequence_len) for window in self.windows)
        return 6 * self.count_parameters().scaling + attention

    def weight_bytes(self) -> int:
        """Weights are kept in fp32 (4 bytes); their gradients take the same again."""
        return 4 * self.count_parameters().total

    def optimizer_bytes(self, workers: int = 1) -> int:
        """One worker's share: one fp32 momentum per Muon weight, two fp32 moments per AdamW weight."""
        counts = self.count_parameters()
        return -(-(4 * counts.matrices + 8 * (counts.total - counts.matrices)) // workers)

    def worker_bytes(self, rows: int, workers: int = 1) -> int:
        """What one of `workers` needs: weights, gradients, its share of the optimizer, activations of `rows` rows."""
        return 2 * self.weight_bytes() + self.optimizer_bytes(workers) + self.activation_bytes(rows)

    def activation_bytes(self, rows: int, element_bytes: int = 2) -> int:
        """What one micro-batch keeps for its backward pass, and one chunk of logits with two of scratch in fp32.

        Kept per token and layer: residual, its norm, queries before and after rotation, attention output, second
        residual and its norm (7 widths); the MLP before and after its activation (8 widths); keys before and after
        rotation, values before and after the value embedding (4 key/value widths). An estimate; compiled, it is less.
        """
        tokens = rows * self.sequence_len
        per_token = self.n_layer * (15 * self.n_embd + 4 * self.kv_width) * element_bytes
        logits = min(tokens * self.padded_vocab_size * element_bytes, LOGITS_CHUNK_BYTES)
        return tokens * per_token + logits + logits // element_bytes * 8


SHAPE_RULES = {
    "depth": "given",
    "head_size": "standard",
    "width": "64 · depth, rounded up to a multiple of the head size {head_size}",
    "heads": "width / head size",
    "kv_heads": "as many as heads",
    "vocab_size": "standard, 2^15",
    "sequence_len": "standard",
    "window_pattern": "standard; S = quarter of the context, L = all; the last layer is always L",
}


def derive_shape(chosen: dict[str, Any], rules: dict[str, str]) -> ModelShape:
    """The shape of `chosen["depth"]` with what else was chosen; adds to `rules` where each dimension came from.

    Raises:
        UsageError: a dimension is impossible; says which flag and what would work.
    """
    depth = chosen["depth"]
    head_size = chosen.get("head_size", STANDARD_HEAD_SIZE)
    width = round_up(64 * depth, head_size)
    heads = width // head_size
    kv_heads = chosen.get("kv_heads", heads)
    vocab_size = chosen.get("vocab_size", STANDARD_VOCAB_SIZE)
    sequence_len = chosen.get("sequence_len", STANDARD_SEQUENCE_LEN)
    pattern = chosen.get("window_pattern", STANDARD_WINDOW_PATTERN).upper()
    if head_size % 2:
        raise UsageError(f"--head-size {head_size} must be even: rotary positions turn pairs of channels")
    if heads % kv_heads:
        divisors = ", ".join(str(n) for n in range(1, heads + 1) if heads % n == 0)
        raise UsageError(f"--kv-heads {kv_heads} does not divide {heads} heads; these do: {divisors}")
    if vocab_size < MIN_VOCAB_SIZE:
        raise UsageError(f"--vocab-size {vocab_size} must be at least {MIN_VOCAB_SIZE}: 256 bytes and 9 special tokens")
    if not is_power_of_two(sequence_len) or sequence_len < 16:
        raise UsageError(f"--sequence-len {sequence_len} must be a power of two, 16 or more: 256, 512, 1024, 2048 …")
    if not pattern or set(pattern) - set("SL"):
        raise UsageError(f"--window-pattern {pattern!r} must be made of S (quarter window) and L (full), as SSSL")
    for name, rule in SHAPE_RULES.items():
        rules.setdefault(name, rule.format(head_size=head_size))
    return ModelShape(sequence_len, vocab_size, depth, heads, kv_heads, width, pattern)
