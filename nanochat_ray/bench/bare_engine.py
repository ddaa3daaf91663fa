"""The engine without a server around it: what HTTP, Ray and streaming are measured against."""

import os
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median

import torch

from nanochat_ray.engine.engine import RunningReply
from nanochat_ray.engine.load import load_chat_model
from nanochat_ray.engine.sampler import SamplingParams


@dataclass(frozen=True)
class BareSpeed:
    """Of replies that begin together.

    first_token_s   until all of them have their first token
    tok_per_s       of all together, from then until the first has all its tokens; 0 if that was before
    """

    first_token_s: float
    tok_per_s: float


def bare_speeds(
    storage: str,
    run: str,
    dtype: str | None,
    streams: Sequence[int],
    prompt_tokens: int,
    new_tokens: int,
    repeats: int,
) -> dict[int, BareSpeed]:
    """Medians for each number of replies at once, of a run's chat model in this process.

    Prompts are all different, so that none has its beginning in the cache. A reply that the model ends early is
    followed by another for the rest of its tokens, so that there are always as many.
    """
    threads = os.environ.get("OMP_NUM_THREADS", "")  # as `jobs.serve` chooses them
    torch.set_num_threads(int(threads) if threads.isdigit() else os.cpu_count() or 1)
    engine = load_chat_model(storage, run, dtype=dtype).engine
    draw = random.Random(0)
    ids = range(engine.tokenizer.special("bos"))  # the special tokens are the last

    def begin(tokens: int) -> RunningReply:
        params = SamplingParams(seed=draw.randrange(2**31), max_tokens=tokens)
        return engine.add(draw.choices(ids, k=prompt_tokens), params)

    def measured(count: int) -> BareSpeed:
        began = time.perf_counter()
        owed = [new_tokens] * count  # when its present reply began
        replies = [begin(new_tokens) for _ in range(count)]

        def step_until(over: Callable[[], bool]) -> tuple[float, int]:
            """The time then, and how many tokens there are."""
            while not over():
                engine.step()
                for number, reply in enumerate(replies):
                    if reply.finished and reply.new_tokens < owed[number]:
                        owed[number] -= reply.new_tokens
                        replies[number] = begin(owed[number])
            written = new_tokens * count - sum(owed) + sum(reply.new_tokens for reply in replies)
            return time.perf_counter(), written

        first, some = step_until(
            lambda: all(o < new_tokens or r.new_tokens for o, r in zip(owed, replies, strict=True))
        )
        last, most = step_until(lambda: any(reply.finished for reply in replies))
        for reply in replies:
            engine.cancel(reply)
        return BareSpeed(first - began, (most - some) / (last - first) if last > first else 0.0)

    measured(1)  # warms up
    speeds = {}
    for count in streams:
        samples = [measured(count) for _ in range(repeats)]
        speeds[count] = BareSpeed(median(s.first_token_s for s in samples), median(s.tok_per_s for s in samples))
    return speeds
