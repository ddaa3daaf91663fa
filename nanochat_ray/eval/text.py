"""What a base model makes of the text of its corpus: bits per byte, and how it goes on after openings."""

from collections.abc import Sequence
from itertools import islice
from typing import Any

import torch

from nanochat_ray.data.corpus import Corpus, Unit
from nanochat_ray.device import activations_of
from nanochat_ray.eval.bpb import evaluate_bpb
from nanochat_ray.eval.step_text import StepText
from nanochat_ray.storage import Folder
from nanochat_ray.stream.rows import PretrainingRows, one_epoch
from nanochat_ray.tokenizer import Tokenizer
from nanochat_ray.train.checkpoint import load_model

EVAL_TOKENS = 2**16  # of each split
SAMPLES, OPENING_TOKENS, SAMPLE_TOKENS = 4, 16, 48


def text_figures(
    run: Folder, step: int, corpus: Corpus, device: torch.device, dtype: torch.dtype, tokens: int = EVAL_TOKENS
) -> dict[str, Any]:
    """Bits per byte of training and validation text, and greedy continuations of held-out openings.

    Args:
        dtype: of the matrices; with torch.int8 the engine's step reads and writes.
        tokens: of each split, rounded down to whole micro-batches, at least one.

    Returns:
        train_bpb, val_bpb, tokens_per_split, and samples: [{prompt, text}].

    Raises:
        UserError: the checkpoint of this step is missing or damaged, or the corpus cannot be read.
    """
    from kernels import dispatch

    tokenizer = Tokenizer.load(run / "tokenizer")
    model, plan, _ = load_model(run / "base", tokenizer.fingerprint, device, activations_of(dtype), at_step=step)
    text = StepText(dispatch.step_model(model, dtype)[0]) if dtype == torch.int8 else None
    source = PretrainingRows(tokenizer, plan.model.sequence_len)
    row_tokens = plan.micro_batch_rows * plan.model.sequence_len
    count = max(1, tokens // row_tokens)

    def bits_per_byte(units: Sequence[Unit]) -> float:
        once = one_epoch(source, units, plan.micro_batch_rows, plan.seed)
        losses = lambda inputs, targets: model(inputs, targets, reduction="none")  # noqa: E731
        return evaluate_bpb(text.losses if text else losses, islice(once, count), tokenizer.token_bytes(), device)

    samples = []
    for batch in islice(one_epoch(source, corpus.validation, 1, plan.seed), SAMPLES):
        opening = batch.tokens_MT[0, :OPENING_TOKENS].tolist()
        if text:
            continuation = text.continued(opening, SAMPLE_TOKENS)
        else:
            continuation = list(model.generate(opening, SAMPLE_TOKENS, temperature=0.0))
        samples.append({"prompt": tokenizer.decode(opening[1:]), "text": tokenizer.decode(continuation)})
    return {
        "train_bpb": bits_per_byte(corpus.train),
        "val_bpb": bits_per_byte(corpus.validation),
        "tokens_per_split": count * row_tokens,
        "samples": samples,
    }
