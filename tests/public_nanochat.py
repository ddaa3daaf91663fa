"""Checkpoints as the public nanochat writes them, and what its models compute, in two generations.

Written from SPEC.md §4 and issue 5, whole rows at once in fp64, with no code shared with nanochat_ray or with
tests/reference_model.py.
"""

import json
import math
import pickle
from dataclasses import dataclass

import tiktoken
import torch

JULY, OCTOBER = "July 2026", "October 2025"
SPECIAL_TOKENS = [
    "<|bos|>", "<|user_start|>", "<|user_end|>", "<|assistant_start|>", "<|assistant_end|>", "<|python_start|>",
    "<|python_end|>", "<|output_start|>", "<|output_end|>",
]  # fmt: skip
PATTERN = (
    r"""'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}{1,2}| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+"""
)


@dataclass
class PublicModel:
    """A state dict under public names, its model_config and its generation."""

    weights: dict[str, torch.Tensor]
    config: dict
    generation: str


def make_model(generation=JULY, seed=0, **changes) -> PublicModel:
    """Small random weights in which nothing is zero."""
    config = {"sequence_len": 256, "vocab_size": 300, "n_layer": 3, "n_head": 4, "n_kv_head": 2, "n_embd": 64}
    config = {**config, "window_pattern": "SSL" if generation == JULY else "L", **changes}
    generator = torch.Generator().manual_seed(seed)
    weights = {
        name: torch.randn(shape, generator=generator) * (0.5 if len(shape) == 1 else shape[-1] ** -0.5)
        for name, shape in shapes(config, generation).items()
    }
    return PublicModel(weights, config, generation)


def shapes(config, generation) -> dict[str, tuple[int, ...]]:
    """By public name. Only the newer generation pads the vocabulary, to a multiple of 64."""
    width, layers = config["n_embd"], config["n_layer"]
    kv_width = width // config["n_head"] * config["n_kv_head"]
    vocab = config["vocab_size"]
    if generation == JULY:
        vocab = math.ceil(vocab / 64) * 64
    found = {"transformer.wte.weight": (vocab, width), "lm_head.weight": (vocab, width)}
    for layer in range(layers):
        prefix = f"transformer.h.{layer}."
        found[prefix + "attn.c_q.weight"] = found[prefix + "attn.c_proj.weight"] = (width, width)
        found[prefix + "attn.c_k.weight"] = found[prefix + "attn.c_v.weight"] = (kv_width, width)
        found[prefix + "mlp.c_fc.weight"], found[prefix + "mlp.c_proj.weight"] = (4 * width, width), (width, 4 * width)
        if generation == JULY and layer % 2 == (layers - 1) % 2:
            found[prefix + "attn.ve_gate.weight"] = (config["n_kv_head"], 12)
            found[f"value_embeds.{layer}.weight"] = (vocab, kv_width)
    if generation == JULY:
        found["resid_lambdas"] = found["x0_lambdas"] = (layers,)
        found["smear_gate.weight"] = (1, 24)
        found["smear_lambda"] = found["backout_lambda"] = (1,)
    return found


def logits(model: PublicModel, ids: torch.Tensor) -> torch.Tensor:
    """Soft-capped logits (T, vocab_size) in fp64."""
    w = {name: tensor.double() for name, tensor in model.weights.items()}
    config, july = model.config, model.generation == JULY
    length, layers, heads = len(ids), config["n_layer"], config["n_head"]
    size = config["n_embd"] // heads
    x = embedded = _norm(w["transformer.wte.weight"][ids])
    if july:
        gate = w["smear_lambda"] * torch.sigmoid(embedded[1:, :24] @ w["smear_gate.weight"].T)
        x = torch.cat((embedded[:1], embedded[1:] + gate * embedded[:-1]))
    x0, middle = x, None
    for layer in range(layers):
        at = f"transformer.h.{layer}."
        if july:
            x = w["resid_lambdas"][layer] * x + w["x0_lambdas"][layer] * x0
        normed = _norm(x)
        q, k, v = ((normed @ w[f"{at}attn.c_{name}.weight"].T).view(length, -1, size) for name in "qkv")
        if july and f"value_embeds.{layer}.weight" in w:
            gates = 3 * torch.sigmoid(normed[:, :12] @ w[f"{at}attn.ve_gate.weight"].T)
            v = v + gates.unsqueeze(-1) * w[f"value_embeds.{layer}.weight"][ids].view(length, -1, size)
        base, sharpness = (100_000, 1.2) if july else (10_000, 1.0)
        q, k = (sharpness * _norm(_turn(z, base)) for z in (q, k))
        y = _attention(q, k, v, _window(config, layer) if july else length)
        x = x + y.reshape(length, -1) @ w[f"{at}attn.c_proj.weight"].T
        x = x + _norm(x).matmul(w[f"{at}mlp.c_fc.weight"].T).clamp(min=0).square() @ w[f"{at}mlp.c_proj.weight"].T
        if layer == layers // 2:
            middle = x
    if july:
        x = x - w["backout_lambda"] * middle
    z = _norm(x) @ w["lm_head.weight"][: config["vocab_size"]].T
    return 15 * torch.tanh(z / 15)


def _window(config, layer):
    pattern = config["window_pattern"]
    if layer == config["n_layer"] - 1 or pattern[layer % len(pattern)] == "L":
        return config["sequence_len"]
    return math.ceil(config["sequence_len"] / 4 / 128) * 128


def _norm(x):
    return x * (x.square().mean(-1, keepdim=True) + torch.finfo(torch.float32).eps) ** -0.5


def _turn(x_THK, base):
    """Each pair (c, c + K/2) as a complex number, turned by minus position · base^(−2c/K)."""
    length, _, size = x_THK.shape
    rates = base ** (-torch.arange(0, size, 2, dtype=torch.float64) / size)
    angles = torch.outer(torch.arange(length, dtype=torch.float64), rates).unsqueeze(1)
    turned = torch.complex(*x_THK.chunk(2, -1)) * torch.polar(torch.ones_like(angles), -angles)
    return torch.cat((turned.real, turned.imag), -1)


def _attention(q_THK, k_TGK, v_TGK, window):
    length, heads, size = q_THK.shape
    k, v = (z.repeat_interleave(heads // z.shape[1], 1) for z in (k_TGK, v_TGK))
    scores = torch.einsum("ihk,jhk->hij", q_THK, k) / math.sqrt(size)
    back = torch.arange(length).unsqueeze(1) - torch.arange(length)
    scores = scores.masked_fill((back < 0) | (back > window), -torch.inf)
    return torch.einsum("hij,jhk->ihk", scores.softmax(-1), v)


def write_checkpoint(folder, model: PublicModel, step=700, prefix="", **meta) -> None:
    """`model_000700.pt` and `meta_000700.json`; the older generation does not write a window pattern."""
    folder.mkdir(parents=True, exist_ok=True)
    torch.save({prefix + name: tensor for name, tensor in model.weights.items()}, folder / f"model_{step:06d}.pt")
    config = {
        name: value for name, value in model.config.items() if model.generation == JULY or name != "window_pattern"
    }
    (folder / f"meta_{step:06d}.json").write_text(json.dumps({"step": step, "model_config": config, **meta}))


def make_encoding(vocab_size=300, specials=SPECIAL_TOKENS) -> tiktoken.Encoding:
    """All bytes and merges of common pairs."""
    ranks = {bytes([byte]): byte for byte in range(256)}
    letters = b"etaoinshrdlu"
    pairs = (bytes((a, b)) for a in letters for b in letters)
    while len(ranks) < vocab_size - len(specials):
        ranks[next(pairs)] = len(ranks)
    special = {name: len(ranks) + index for index, name in enumerate(specials)}
    return tiktoken.Encoding("rustbpe", pat_str=PATTERN, mergeable_ranks=ranks, special_tokens=special)


def write_tokenizer(folder, encoding: tiktoken.Encoding, protocol=None) -> None:
    """`tokenizer.pkl`, and `token_bytes.pt` with how many bytes each id stands for."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer.pkl").write_bytes(pickle.dumps(encoding, protocol))
    specials = encoding._special_tokens.values()
    lengths = [0 if id in specials else len(encoding.decode_single_token_bytes(id)) for id in range(encoding.n_vocab)]
    torch.save(torch.tensor(lengths, dtype=torch.int32), folder / "token_bytes.pt")


def with_pattern(encoding: tiktoken.Encoding, pattern: str) -> tiktoken.Encoding:
    ranks, special = encoding._mergeable_ranks, encoding._special_tokens
    return tiktoken.Encoding("rustbpe", pat_str=pattern, mergeable_ranks=ranks, special_tokens=special)
