"""Reading a prompt and writing a reply, beside the limit that the machine's memory sets; the bare model and the engine.

Every new token needs every weight once, whatever the number of rows: tokens/s ≤ rows · bandwidth / bytes of weights.
Keys and values are left out of the limit; at these lengths they are a few percent.
"""

import os
import tempfile
import time
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch

from nanochat_ray.bench.measurement import Line, Watch, in_fresh_process
from nanochat_ray.device import gemm_peak, memory_bandwidth, pick_device, pick_dtype
from nanochat_ray.engine.engine import Engine
from nanochat_ray.engine.sampler import SamplingParams
from nanochat_ray.model.gpt import GPT
from nanochat_ray.plan import Plan
from nanochat_ray.storage import Folder
from nanochat_ray.stream.cursor import Cursor, StreamIdentity
from nanochat_ray.tokenizer import Tokenizer
from nanochat_ray.train.checkpoint import Checkpoints, TrainState, build_model, load_model

BATCHES = (1, 4, 16)


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
    dtype, _ = pick_dtype(device, dtype_name)
    if device.type == "cpu":
        torch.set_num_threads(os.cpu_count() or 1)
    model = _as_served(plan, device, dtype)
    engine = Engine(model, tokenizer)
    weight_bytes = plan.parameters.scaling * model.lm_head.weight.element_size()
    prompt = [tokenizer.bos, *(n % 200 for n in range(settings.prompt - 1))]

    samples: dict[str, list[float]] = {}

    def note(name: str, value: float) -> None:
        samples.setdefault(name, []).append(value)

    _bare(model, prompt, 1, 2)  # allocates and warms up
    for _ in range(settings.repeats):
        memory_bandwidth.cache_clear()
        gemm_peak.cache_clear()
        note("bandwidth", memory_bandwidth(device))
        note("gemm", gemm_peak(device, dtype))
        for batch in BATCHES:
            first_s, tokens_per_s = _bare(model, prompt, batch, settings.new_tokens)
            note(f"decode_{batch}", tokens_per_s)
            note(f"first_{batch}", first_s)
        first_s, tokens_per_s = _through_engine(engine, prompt, settings.new_tokens)
        note("engine_first", first_s)
        note("engine_decode", tokens_per_s)
    middle = {name: median(values) for name, values in samples.items()}
    limit = middle["bandwidth"] / weight_bytes
    prefill = len(prompt) / middle["first_1"]
    return {
        "depth": plan.depth,
        "width": plan.model.n_embd,
        "vocab_size": plan.model.vocab_size,
        "prompt_tokens": len(prompt),
        "new_tokens": settings.new_tokens,
        "device": str(device),
        "dtype": str(dtype),
        "stored_dtype": str(model.lm_head.weight.dtype),
        "threads": torch.get_num_threads(),
        "weight_bytes_per_token": weight_bytes,
        "bandwidth_bytes_per_s": round(middle["bandwidth"]),
        "gemm_peak_flops": round(middle["gemm"]),
        "prefill_tok_per_s": round(prefill, 1),
        "prefill_of_peak": round(plan.flops_per_token / 3 * prefill / middle["gemm"], 4),
        "decode": {
            str(batch): {
                "tok_per_s": round(middle[f"decode_{batch}"], 1),
                "limit_tok_per_s": round(limit * batch, 1),
                "of_limit": round(middle[f"decode_{batch}"] / (limit * batch), 4),
            }
            for batch in BATCHES
        },
        "first_token_s": round(middle["first_1"], 5),
        "engine_tok_per_s": round(middle["engine_decode"], 1),
        "engine_overhead": round(1 - middle["engine_decode"] / middle["decode_1"], 4),
        "engine_first_token_s": round(middle["engine_first"], 5),
    }


def decode_lines(figures: dict[str, Any]) -> list[Line]:
    """The figures as a table for people."""
    stored = figures["stored_dtype"].removeprefix("torch.")
    weights = f"{figures['weight_bytes_per_token'] / 1e6:.0f} MB"
    lines = [
        Line(
            "memory read",
            f"{figures['bandwidth_bytes_per_s'] / 1e9:.1f} GB/s",
            f"{weights} of {stored} weights a step, {figures['threads']} threads",
        ),
        Line(
            f"read a prompt of {figures['prompt_tokens']}",
            f"{figures['prefill_tok_per_s']:,.0f} tok/s",
            f"{figures['prefill_of_peak']:.1%} of the GEMM peak, {figures['gemm_peak_flops'] / 1e9:,.0f} GFLOP/s",
        ),
    ]
    for batch, decode in figures["decode"].items():
        beside = f"{decode['of_limit']:.0%} of the memory's limit, {decode['limit_tok_per_s']:,.0f}"
        lines.append(Line(f"write, batch {batch}", f"{decode['tok_per_s']:,.0f} tok/s", beside))
    lines += [
        Line(
            "write through the engine, batch 1",
            f"{figures['engine_tok_per_s']:,.0f} tok/s",
            f"sampling, text and tools cost {figures['engine_overhead']:.1%} of the bare model's tokens/s",
        ),
        Line(
            "first token, engine",
            f"{figures['engine_first_token_s'] * 1e3:.0f} ms",
            f"bare model, greedy {figures['first_token_s'] * 1e3:.0f} ms",
        ),
    ]
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


def _through_engine(engine: Engine, prompt: list[int], new_tokens: int) -> tuple[float, float]:
    """As `_bare` for one row, sampled and with its text. An untrained model hardly ever ends its reply early."""
    began = time.perf_counter()
    generation = engine.start(prompt, SamplingParams(seed=1, max_tokens=new_tokens))
    while len(generation.ids) == len(prompt):
        generation.step()
    first, ids_then = time.perf_counter(), len(generation.ids)
    while not generation.finished:
        generation.step()
    return first - began, (len(generation.ids) - ids_then) / (time.perf_counter() - first)
