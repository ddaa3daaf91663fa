"""Runs with tiny random models, whose distributions are far from flat."""

from collections.abc import Sequence
from dataclasses import replace
from functools import cache

import torch

from nanochat_ray.model.gpt import GPT, GPTConfig
from nanochat_ray.plan import SFT, make_plan
from nanochat_ray.plan.shape import OCTOBER_2025, ModelShape
from nanochat_ray.storage import Folder
from nanochat_ray.stream.cursor import Cursor, StreamIdentity
from nanochat_ray.tokenizer import Tokenizer, train_tokenizer
from nanochat_ray.tokenizer_samples import SAMPLES
from nanochat_ray.train.checkpoint import Checkpoints, TrainState

VOCAB_SIZE = 500  # no multiple of 64, so that tables are padded
JULY = ModelShape(
    sequence_len=512, vocab_size=VOCAB_SIZE, n_layer=3, n_head=4, n_kv_head=2, n_embd=64, window_pattern="SL"
)
OCTOBER = replace(JULY, **OCTOBER_2025)


@cache
def tiny_tokenizer(vocab_size: int = VOCAB_SIZE) -> Tokenizer:
    return train_tokenizer(SAMPLES.values(), vocab_size)


def random_model(shape: ModelShape, seed: int = 0) -> GPT:
    """Every parameter matters: matrices are wide, learned scalars away from their first values."""
    model = GPT(GPTConfig.from_shape(shape))
    model.init_weights(seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            noise = torch.randn(weight.shape, generator=generator)
            if weight.dim() == 1:
                weight += 0.3 * noise
            elif "wte" not in name:
                weight.copy_(0.15 * noise)
    return model.eval()


def make_run(
    run: Folder, shape: ModelShape = JULY, stages: Sequence[str] = ("sft",), seed: int = 0, step: int = 7
) -> GPT:
    """A run whose stages all hold one random model, at a step of 7; returns the model."""
    tokenizer, model = tiny_tokenizer(shape.vocab_size), random_model(shape, seed)
    tokenizer.save(run / "tokenizer")
    plan = make_plan(depth=2, head_size=64, vocab_size=shape.vocab_size, steps=7)
    for stage in stages:
        plan = replace(plan, model=shape, depth=shape.n_layer, stage=SFT if stage == "sft" else plan.stage)
        cursor = Cursor(
            StreamIdentity("c0ffee", tokenizer.fingerprint, shape.sequence_len, 4, 4, 42), step, step * 512 * 16
        )
        Checkpoints.of(run / stage).save(TrainState(plan, cursor), dict(model.state_dict()), {})
    return model
