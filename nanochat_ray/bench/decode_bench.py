"""Reading prompts and writing replies with the engine, beside the memory's limit and the same network in plain torch.

Every new token needs every weight once, whatever the number of rows: tokens/s ≤ rows · bandwidth / bytes of weights.
Keys and values are left out of the limit; at these lengths they are a few percent.
"""

import os
import random
import tempfile
import time
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch

from nanochat_ray.bench.measurement import Line, Watch, in_fresh_process
from nanochat_ray.device import activations_of, gemm_peak, memory_bandwidth, pick_device, pick_used_dtype
from nanochat_ray.engine.engine import Engine
from nanochat_ray.engine.load import engine_of
from nanochat_ray.engine.sampler import SamplingParams
from nanochat_ray.model.gpt import GPT
from nanochat_ray.plan import Plan
from nanochat_ray.storage import Folder
from nanochat_ray.stream.cursor import Cursor, StreamIdentity
from nanochat_ray.tokenizer import Tokenizer
from nanochat_ray.train.checkpoint import Checkpoints, TrainState, build_model, load_model

BATCHES = (1, 8, 16, 32)


@dataclass(frozen=True)
class DecodeSettings:
    """How much to measure: lengths in tokens."""

    prompt: int
    new_tokens: int
    repeats: int


def measure_decoding(plan: Plan, tokenizer: Tokenizer, dtype: str | None, settings: DecodeSettings) -> dict[str, Any]:
    """Figures of an untrained model of the plan, loaded from a checkpoint as the server loads it; JSON-able."""
    with Watch() as watch:
        figures = in_fresh_process(decode_figures, plan, tokenizer, dtype, settings)
    return {**figures, "machine": watch.to_dict()}


def decode_figures(
    plan: Plan, tokenizer: Tokenizer, dtype_name: str | None, settings: DecodeSettings
) -> dict[str, Any]:
    """All figures, measured in turn in this process; medians over the repeats."""
    device, _ = pick_device()
    dtype, _ = pick_used_dtype(device, dtype_name)
    if device.type == "cpu":
        torch.set_num_threads(os.cpu_count() or 1)
    model = _as_served(plan, device, activations_of(dtype))
    engine, how = engine_of(model, tokenizer, dtype, max_running=max(BATCHES))
    draw = random.Random(0)
    weight_bytes = plan.parameters.scaling * dtype.itemsize
    prompt = [tokenizer.bos, *(n % 200 for n in range(settings.prompt - 1))]

    samples: dict[str, list[float]] = {}

    def note(name: str, value: float) -> None:
        samples.setdefault(name, []).append(value)

    _bare(model, prompt, 1, 2)  # allocates and warms up
    for _ in range(settings.repeats):
        memory_bandwidth.cache_clear()
        gemm_peak.cache_clear()
        note("bandwidth", memory_bandwidth(device))
        note("gemm", gemm_peak(device, model.dtype))
        for batch in BATCHES:
            first_s, tokens_per_s = _through_engine(engine, batch, len(prompt), settings.new_tokens, draw)
            note(f"decode_{batch}", tokens_per_s)
            note(f"first_{batch}", first_s)
            first_s, tokens_per_s = _bare(model, prompt, batch, settings.new_tokens)
            note(f"torch_{batch}", tokens_per_s)
            note(f"torch_first_{batch}", first_s)
    middle = {name: median(values) for name, values in samples.items()}
    limit = middle["bandwidth"] / weight_bytes
    prefill = len(prompt) / middle["first_1"]
    # A third of training's; and of a prompt's logits only the last are computed.
    reading = plan.flops_per_token / 3 - 2 * plan.model.n_embd * plan.model.padded_vocab_size
    return {
        "depth": plan.depth,
        "width": plan.model.n_embd,
        "vocab_size": plan.model.vocab_size,
        "prompt_tokens": len(prompt),
        "new_tokens": settings.new_tokens,
        "device": str(device),
        "dtype": str(dtype),
        "activations_dtype": str(model.dtype),
        "threads": torch.get_num_threads(),
        "model_step": how,
        "weight_bytes_per_token": weight_bytes,
        "bandwidth_bytes_per_s": round(middle["bandwidth"]),
        "gemm_peak_flops": round(middle["gemm"]),
        "prefill_tok_per_s": round(prefill, 1),
        "prefill_of_peak": round(reading * prefill / middle["gemm"], 4),
        "decode": {
            str(batch): {
                "tok_per_s": round(middle[f"decode_{batch}"], 1),
                "limit_tok_per_s": round(limit * batch, 1),
                "of_limit": round(middle[f"decode_{batch}"] / (limit * batch), 4),
                "torch_tok_per_s": round(middle[f"torch_{batch}"], 1),
            }
            for batch in BATCHES
        },
        "first_token_s": round(middle["first_1"], 5),
        "torch_first_token_s": round(middle["torch_first_1"], 5),
    }


def decode_lines(figures: dict[str, Any]) -> list[Line]:
    """The figures as a table for people."""
    stored, activations = (figures[name].removeprefix("torch.") for name in ("dtype", "activations_dtype"))
    weights = f"{figures['weight_bytes_per_token'] / 1e6:.0f} MB"
    peak = f"{activations} GEMM peak, {figures['gemm_peak_flops'] / 1e9:,.0f} GFLOP/s"
    lines = [
        Line(
            "memory read",
            f"{figures['bandwidth_bytes_per_s'] / 1e9:.1f} GB/s",
            f"{weights} of {stored} weights a step, {figures['threads']} threads",
        ),
        Line(
            f"read a prompt of {figures['prompt_tokens']}",
            f"{figures['prefill_tok_per_s']:,.0f} tok/s",
            f"{figures['prefill_of_peak']:.1%} of the {peak}",
        ),
    ]
    for batch, decode in figures["decode"].items():
        times = decode["tok_per_s"] / decode["torch_tok_per_s"]
        beside = (
            f"{decode['of_limit']:.0%} of the memory's limit, {decode['limit_tok_per_s']:,.0f}; "
            f"plain torch in {activations} {decode['torch_tok_per_s']:,.0f} ({times:.1f} x)"
        )
        lines.append(Line(f"write, batch {batch}", f"{decode['tok_per_s']:,.0f} tok/s", beside))
    first, torch_first = figures["first_token_s"], figures["torch_first_token_s"]
    lines.append(Line("first token", f"{first * 1e3:.0f} ms", f"plain torch {torch_first * 1e3:.0f} ms"))
    lines.append(Line("the model's step", figures["model_step"], "sampled, with text; torch greedy and without"))
    return lines


def _as_served(plan: Plan, device: torch.device, dtype: torch.dtype) -> GPT:
    """The plan's initial model after a save and a load, so that weights are stored as they are when it answers."""
    identity = StreamIdentity("none", "none", plan.model.sequence_len, plan.micro_batch_rows, plan.micro_batches, 0)
    with tempfile.TemporaryDirectory() as folder:
        stage = Folder.at(folder)
        Checkpoints.of(stage).save(TrainState(plan, Cursor(identity)), build_model(plan).state_dict(), {})
        return load_model(stage, identity.tokenizer, device, dtype)[0]


@torch.inference_mode()
def _bare(model: GPT, prompt: list[int], batch: int, new_tokens: int) -> tuple[float, float]:
    """Seconds until the first token is known, and tokens per second of all rows after it; greedy, equal rows."""
    began = time.perf_counter()
    cache = model.new_cache(batch, len(prompt) + new_tokens)
    ids_BT = torch.tensor([prompt] * batch, device=model.device)
    ids_B = model.extend(ids_BT, cache).argmax(dim=-1).cpu()
    first = time.perf_counter()
    for _ in range(new_tokens - 1):
        ids_B = model.extend(ids_B.unsqueeze(1).to(model.device), cache).argmax(dim=-1).cpu()
    return first - began, batch * (new_tokens - 1) / (time.perf_counter() - first)


def _through_engine(
    engine: Engine, batch: int, prompt_tokens: int, new_tokens: int, draw: random.Random
) -> tuple[float, float]:
    """As `_bare`, sampled and with text, for different prompts. Untrained models hardly ever end a reply early."""
    ids = range(engine.tokenizer.special("bos"))  # the special tokens are the last
    # Those that are read first write while the others are read, and must not be over before the last one begins.
    most = new_tokens + batch + batch * prompt_tokens // engine.scheduler.step_tokens
    began = time.perf_counter()
    replies = [
        engine.add(draw.choices(ids, k=prompt_tokens), SamplingParams(seed=seed, max_tokens=most))
        for seed in range(batch)
    ]
    while any(reply.new_tokens == 0 for reply in replies):
        engine.step()
    first, tokens = time.perf_counter(), sum(reply.new_tokens for reply in replies)
    for _ in range(new_tokens - 1):
        engine.step()
    ended, written = time.perf_counter(), sum(reply.new_tokens for reply in replies) - tokens
    for reply in replies:
        engine.cancel(reply)
    return first - began, written / (ended - first)
