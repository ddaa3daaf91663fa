"""What a model in training says to a few fixed prompts, for people to read over the steps; it measures nothing.

The prompts are continued greedily in one batch of equal lengths: all are read up to the end of the shortest, and from
there on position by position, where a row takes its next prompt token as long as it has one, and then its likeliest
token. So there is no padding, and the passes of a whole set of samples are little more than those of one sample.
"""

from collections.abc import Collection, Sequence
from typing import NamedTuple

import torch

from nanochat_ray.chat import render_prompt
from nanochat_ray.model.gpt import GPT
from nanochat_ray.plan.record import SFT
from nanochat_ray.tokenizer import Tokenizer

OPENINGS = (
    "The capital of Italy is",
    "Water is made of hydrogen and",
    "The opposite of large is",
    "Two days after Monday comes",
    "The first three planets from the Sun are",
    "If x + 3 = 10, then x is",
    "One winter evening, an old sailor",
)
QUESTIONS = (
    "What is the capital of Italy?",
    "Who are you?",
    "What is 17 + 25?",
    "Which day comes after Monday?",
    "Name three colours.",
    "How do you spell ocean?",
    "Write a sentence about the sea.",
)


class Sample(NamedTuple):
    """A prompt as people read it, and how the model went on."""

    prompt: str
    text: str


def write_samples(model: GPT, tokenizer: Tokenizer, stage: str, tokens: int) -> list[Sample]:
    """Greedy continuations of OPENINGS, or in finetuning of QUESTIONS asked as chats; at most `tokens` long.

    They end where the text or turn does, and where the model calls the calculator, which does not run here. What does
    not fit the model's context is left out.
    """
    if stage == SFT:
        rendered = [(text, render_prompt(tokenizer, [{"role": "user", "content": text}])) for text in QUESTIONS]
        stops = {tokenizer.bos, tokenizer.special("assistant_end"), tokenizer.special("python_end")}
    else:
        rendered = [(text, [tokenizer.bos, *tokenizer.encode(text)]) for text in OPENINGS]
        stops = {tokenizer.bos}
    fitting = [(text, ids) for text, ids in rendered if len(ids) < model.config.sequence_len]
    said = continue_greedily(model, [ids for _, ids in fitting], tokens, stops)
    return [Sample(text, tokenizer.decode(ids)) for (text, _), ids in zip(fitting, said, strict=True)]


@torch.no_grad()  # not inference mode: the model may keep tables it builds here for training
def continue_greedily(
    model: GPT, prompts: Sequence[Sequence[int]], tokens: int, stops: Collection[int] = ()
) -> list[list[int]]:
    """The likeliest next ids after each prompt: at most `tokens`, within the context, up to the first of `stops`.

    The same for each prompt as if it were alone, but for rounding. Weights and random numbers are left as they are.

    Args:
        prompts: ids, at least one and fewer than the context of each.
    """
    if not prompts:
        return []
    rows = [list(prompt) for prompt in prompts]
    position = min(map(len, rows))
    end = min(max(map(len, rows)) + tokens, model.config.sequence_len)
    cache = model.new_cache(len(rows), end)
    ids_BT = torch.tensor([row[:position] for row in rows], device=model.device)
    while position < end:
        likeliest = model.extend(ids_BT, cache).argmax(dim=-1).tolist()
        for row, token in zip(rows, likeliest, strict=True):
            if len(row) == position:
                row.append(token)
        ids_BT = torch.tensor([[row[position]] for row in rows], device=model.device)
        position += 1
    continuations = [row[len(prompt) : len(prompt) + tokens] for row, prompt in zip(rows, prompts, strict=True)]
    return [_until(ids, stops) for ids in continuations]


def _until(ids: list[int], stops: Collection[int]) -> list[int]:
    return ids[: next((place for place, token in enumerate(ids) if token in stops), len(ids))]
