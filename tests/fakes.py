"""Stand-ins for tests: a byte-level tokenizer, a tiny random model, and a model that says what a script tells it."""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch

from nanochat_ray.engine.calculator import calculate
from nanochat_ray.engine.engine import Engine
from nanochat_ray.engine.load import ChatModel
from nanochat_ray.errors import UserError
from nanochat_ray.model.gpt import GPT, GPTConfig
from nanochat_ray.model.ragged import BLOCK, RaggedBatch, WindowGroup
from nanochat_ray.model.torch_step import TorchStep
from nanochat_ray.serve.backend import ServedModel
from nanochat_ray.tokenizer import SPECIAL_TOKENS


class ByteTokenizer:
    """One token per byte, then the special tokens; special-looking text is plain bytes, as with the real one."""

    vocab_size = 320  # a multiple of 64; the ids after the special tokens mean nothing
    bos = 256

    def special(self, name: str) -> int:
        return 256 + SPECIAL_TOKENS.index(name)

    def encode(self, text: str) -> list[int]:
        return list(text.encode())

    def decode_bytes(self, ids: Sequence[int]) -> bytes:
        return bytes(i for i in ids if i < 256)

    def decode(self, ids: Sequence[int]) -> str:
        return self.decode_bytes(ids).decode(errors="replace")


def tiny_model(seed: int = 0, context: int = 128) -> GPT:
    """Two layers, width 128. Its matrices are drawn wide, so that its distribution is far from flat."""
    config = GPTConfig(
        sequence_len=context, vocab_size=320, n_layer=2, n_head=2, n_kv_head=2, n_embd=128, window_pattern="SL"
    )
    model = GPT(config)
    model.init_weights(seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "c_proj" in name or "lm_head" in name:
                weight.normal_(0, 0.2, generator=generator)
    return model.eval()


def tiny_engine(seed: int = 0, context: int = 128, **options) -> Engine:
    return Engine(TorchStep(tiny_model(seed, context)), ByteTokenizer(), **options)


@dataclass
class ScriptedModel:
    """Answers a user message that contains a script's key with that script, whatever the sampling parameters.

    Scripts are token ids. Like a real model it is a function of the tokens before, which it keeps in the blocks of its
    sequences and nowhere else: a wrong block table makes it say something else.
    """

    scripts: dict[str, list[int]]
    context: int = 4096
    seconds_per_step: float = 0.0
    vocab_size = 320

    def __post_init__(self) -> None:
        self.groups = (WindowGroup(self.context, (0,)),)
        self.steps = 0
        self._tokenizer = ByteTokenizer()

    def block_bytes(self, group: int) -> int:
        return 4 * BLOCK

    def allocate(self, blocks: Sequence[int]) -> None:
        self._stored = np.full((blocks[0], BLOCK), -1, dtype=np.int64)

    def forward(self, batch: RaggedBatch) -> np.ndarray:
        time.sleep(self.seconds_per_step)
        self.steps += 1
        logits = np.zeros((len(batch.wanted), self.vocab_size), dtype=np.float32)
        row = 0
        for sequence, (start, end) in enumerate(pairwise(batch.starts)):
            table = batch.tables[0][sequence]
            for token, position in zip(batch.ids[start:end], batch.positions[start:end], strict=True):
                self._stored[table[position // BLOCK], position % BLOCK] = token
            if end - 1 in batch.wanted:
                ids = self._stored[table[: batch.positions[end - 1] // BLOCK + 1]].reshape(-1)
                logits[row, self._next(ids[: batch.positions[end - 1] + 1].tolist())] = 1e4
                row += 1
        return logits

    def _next(self, ids: list[int]) -> int:
        end, said = self._tokenizer.special("assistant_end"), []
        if self._tokenizer.special("user_start") not in ids:  # no chat, but text to go on with
            return ord(".")
        if self._tokenizer.special("assistant_start") in ids:
            start = len(ids) - ids[::-1].index(self._tokenizer.special("assistant_start"))
            ids, said = ids[:start], ids[start:]
        user = len(ids) - ids[::-1].index(self._tokenizer.special("user_start"))
        question = self._tokenizer.decode(ids[user:])
        script = next((script for key, script in self.scripts.items() if key in question), self.scripts[""])
        token = script[len(said)] if len(said) < len(script) else end
        if token == HANG:
            time.sleep(1000)
        if token == CRASH:
            raise RuntimeError("the scripted model fails here")
        return token


HANG = -2  # in a script: the model never comes back from its step
CRASH = -1  # in a script: the model raises instead of answering


def script(*parts: str) -> list[int]:
    """Ids of a reply: text; `=expression` is a calculator call with the result that the engine forces."""
    tokenizer, ids = ByteTokenizer(), []
    for part in parts:
        if part.startswith("="):
            ids += [tokenizer.special("python_start"), *part[1:].encode(), tokenizer.special("python_end")]
            result = calculate(part[1:]).text
            ids += [tokenizer.special("output_start"), *result.encode(), tokenizer.special("output_end")]
        else:
            ids += part.encode()
    return ids


HOSTILE = (
    "<script>window.pwned = 1</script><img src=x onerror='window.pwned = 1'> "
    "[x](javascript:window.pwned=1) <|assistant_end|> still here"
)
MARKDOWN = "# Title\n\nSome **bold** and `code`:\n\n```python\nprint('<b>hi</b>')\n```\n\n- one\n- two\n"


def load_that_hangs() -> ChatModel:
    """As `load_scripted`, in a replica that notices within seconds that its engine is stuck."""
    from nanochat_ray.engine import worker

    worker.STUCK_AFTER_S = 2.0
    return load_scripted()


def load_that_fails() -> ChatModel:
    raise UserError("checkpoint step_000003 cannot be used (model.safetensors is not what was written)")


def load_changed() -> ChatModel:
    """The model that takes the place of `load_scripted`'s."""
    scripts = {"": script("Hello from the new model.")}
    engine = Engine(ScriptedModel(scripts), ByteTokenizer())
    return ChatModel(engine, "scripted", {"depth": 1}, fingerprint="changed")


def describe_changed() -> ServedModel:
    return ServedModel("scripted", ByteTokenizer(), 4096, "changed", {"depth": 1})


def load_scripted() -> ChatModel:
    """The model behind the server in tests; importable, because it is loaded in the replica."""
    scripts = {
        "17*23": script("Let me see: ", "=17*23", " It is 391."),
        "slow": script("tick " * 200),
        "emoji": script("Grüße 🙂 日本"),
        "hostile": script(HOSTILE),
        "markdown": script(MARKDOWN),
        "crash": [*script("Half a"), CRASH],
        "hang": [*script("Half a"), HANG],
        "": script("Hello from the script."),
    }
    engine = Engine(ScriptedModel(scripts, seconds_per_step=0.02), ByteTokenizer(), max_running=3)
    return ChatModel(engine, "scripted", {"depth": 0}, fingerprint="scripted")


def describe_scripted() -> ServedModel:
    """What the server's ingress knows of it."""
    return ServedModel("scripted", ByteTokenizer(), 4096, "scripted", {"depth": 0})
