"""What rounding costs: held-out text read by a trained model in each dtype, beside plain torch in fp32.

Every dtype reads the same tokens, whatever it would have written itself, so one difference does not lead to others.
"""

import os
from collections.abc import Callable
from itertools import islice
from typing import Any

import numpy as np
import torch

from nanochat_ray.bench.measurement import Line, Watch, in_fresh_process
from nanochat_ray.data.corpus import Corpus
from nanochat_ray.device import DTYPES, USED_DTYPES, activations_of, pick_device
from nanochat_ray.engine.load import require_trained
from nanochat_ray.errors import UserError
from nanochat_ray.eval.step_text import StepText
from nanochat_ray.model.gpt import GPT
from nanochat_ray.storage import run_folder
from nanochat_ray.stream.rows import PretrainingRows, one_epoch
from nanochat_ray.tokenizer import Tokenizer
from nanochat_ray.train.checkpoint import load_model

TOKENS, QUICK_TOKENS = 2**15, 2**12
REFERENCE = "torch fp32"

Read = Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]]  # as `StepText.read`


def measure_quality(storage: str, run: str, corpus: Corpus, tokens: int = TOKENS) -> dict[str, Any]:
    """Figures of a run's base model on the corpus's held-out text; JSON-able.

    Raises:
        UserError: nothing is trained there.
    """
    require_trained(storage, run, "base")
    with Watch() as watch:
        figures = in_fresh_process(quality_figures, storage, run, corpus, tokens)
    return {**figures, "machine": watch.to_dict()}


def quality_figures(storage: str, run: str, corpus: Corpus, tokens: int) -> dict[str, Any]:
    """Bits per byte of each dtype, and for how many of the tokens it finds the same one likeliest as the reference."""
    device, _ = pick_device()
    if device.type == "cpu":
        torch.set_num_threads(os.cpu_count() or 1)
    folder = run_folder(storage, run)
    tokenizer = Tokenizer.load(folder / "tokenizer")

    def load(dtype: torch.dtype) -> GPT:
        return load_model(folder / "base", tokenizer.fingerprint, device, activations_of(dtype))[0]

    model, plan, step = load_model(folder / "base", tokenizer.fingerprint, device, torch.float32)
    length = plan.model.sequence_len
    once = one_epoch(PretrainingRows(tokenizer, length), corpus.validation, 1, plan.seed)
    rows = [batch.tokens_MT for batch in islice(once, max(1, tokens // length))]
    bytes_V = tokenizer.token_bytes()
    results: dict[str, dict[str, Any]] = {}

    def measure(name: str, how: str, read: Read) -> np.ndarray:
        nats, text_bytes, likeliest = 0.0, 0, []
        for row_MT in rows:
            nats_MT, likeliest_MT = read(row_MT)
            target_bytes_MT = bytes_V[row_MT[:, 1:]]
            nats += float(nats_MT[target_bytes_MT > 0].sum(dtype=np.float64))
            text_bytes += int(target_bytes_MT.sum())
            likeliest.append(likeliest_MT)
        results[name] = {"bpb": nats / np.log(2) / text_bytes, "model_step": how}
        return np.concatenate(likeliest)

    from kernels import dispatch

    expected = measure(REFERENCE, "torch", lambda row_MT: _torch_read(model, row_MT))
    for name, dtype in (USED_DTYPES if device.type == "cpu" else DTYPES).items():
        try:
            step_model, how = dispatch.step_model(load(dtype), dtype)
        except UserError as error:
            results[name] = {"model_step": str(error)}
            continue
        found = measure(name, how, StepText(step_model).read)
        results[name]["same_likeliest"] = float((found == expected).mean())
        results[name]["bpb_cost"] = results[name]["bpb"] / results[REFERENCE]["bpb"] - 1
    return {
        "run": run,
        "step": step,
        "corpus": corpus.name,
        "tokens": sum(row_MT.shape[1] - 1 for row_MT in rows),
        "dtypes": results,
    }


def quality_lines(figures: dict[str, Any]) -> list[Line]:
    """The figures as a table for people."""
    lines = []
    for name, found in figures["dtypes"].items():
        beside = found["model_step"]
        if "bpb" not in found:
            lines.append(Line(name, "cannot be had", beside))
            continue
        if name != REFERENCE:
            beside = (
                f"{found['bpb_cost']:+.3%}, the same likeliest token at {found['same_likeliest']:.2%} of "
                f"{figures['tokens']:,} positions; {beside}"
            )
        lines.append(Line(name, f"{found['bpb']:.4f} bits per byte", beside))
    return lines


@torch.inference_mode()
def _torch_read(model: GPT, tokens_MT: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    tokens = torch.from_numpy(tokens_MT.astype(np.int64)).to(model.device)
    logits_MTV = model(tokens[:, :-1])
    nats = torch.nn.functional.cross_entropy(logits_MTV.transpose(1, 2), tokens[:, 1:], reduction="none")
    return nats.cpu().numpy(), logits_MTV.argmax(dim=-1).cpu().numpy()
