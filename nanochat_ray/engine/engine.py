"""Generates replies: a prefill in chunks, then one token per step, over the model's KV cache. No threads, no Ray.

    engine = Engine(model, tokenizer)
    for piece in engine.stream(render_prompt(tokenizer, messages), SamplingParams(seed=7)):
        print(piece.text, end="")

A prompt may hold the beginning of a reply (tokens after its last assistant_start): the reply is then continued, with
the tokens it would have had anyway, because sampling is keyed by (seed, position in the sequence).
"""

from collections.abc import Iterator, Sequence
from typing import Any

import torch

from nanochat_ray.engine.reply import ChatTokenizer, Piece, Reply
from nanochat_ray.engine.sampler import SamplingParams, sample
from nanochat_ray.errors import UserError

PREFILL_CHUNK = 256  # tokens; so that a long prompt does not hold up the streams that are being decoded


class Engine:
    """A model and its tokenizer, ready to generate. Stateless between replies; not safe for two threads at once.

    Args:
        model: a `GPT`, or whatever has its `config.sequence_len`, `device`, `new_cache` and `extend`.
    """

    def __init__(self, model: Any, tokenizer: ChatTokenizer) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.context: int = model.config.sequence_len

    def start(self, prompt_ids: Sequence[int], params: SamplingParams) -> "Generation":
        """A reply that advances when its `step` is called; until then the model and its memory are not touched.

        Raises:
            UserError: the prompt is empty or leaves no room in the context.
        """
        if not prompt_ids:
            raise UserError("the prompt is empty")
        if len(prompt_ids) >= self.context:
            raise UserError(
                f"the conversation has {len(prompt_ids)} tokens, but the model's context is {self.context}; "
                "shorten it or start a new chat"
            )
        return Generation(self, prompt_ids, params)

    def stream(self, prompt_ids: Sequence[int], params: SamplingParams) -> Iterator[Piece]:
        """The pieces of a reply; the last one has `finish` set. Closing the iterator frees the cache.

        Raises:
            UserError: as `start`.
        """
        generation = self.start(prompt_ids, params)
        while not generation.finished:
            yield from generation.step()


class Generation:
    """One reply in progress: its tokens, its cache, and how much of it the model has read.

    ids             the whole sequence so far, prompt included
    prompt_tokens   how many of them were given
    finished        no further step is allowed
    """

    def __init__(self, engine: Engine, prompt_ids: Sequence[int], params: SamplingParams) -> None:
        self._engine = engine
        self._params = params
        self.ids = list(prompt_ids)
        self.prompt_tokens = len(self.ids)
        # The sequence ends here: after max_tokens, or when the context is full.
        self._limit = min(self.prompt_tokens + params.max_tokens, engine.context)
        self._cache: Any = None
        self._read = 0  # tokens of `ids` that are in the cache
        self._reply = Reply(engine.tokenizer, params.stop)
        self._reply.replay(_reply_so_far(self.ids, engine.tokenizer.special("assistant_start")))
        self.finished = False

    def step(self) -> list[Piece]:
        """One call of the model: a chunk of prefill (no pieces), or the next token and the ones that it forces."""
        if self._reply.forced:  # a continued reply may begin in the middle of a tool result
            return self._append_forced()
        if self._cache is None:
            self._cache = self._engine.model.new_cache(1, self._limit)
        chunk = self.ids[self._read : self._read + PREFILL_CHUNK]
        ids_BT = torch.tensor([chunk], dtype=torch.long, device=self._engine.model.device)
        with torch.inference_mode():
            logits_BV = self._engine.model.extend(ids_BT, self._cache)
        self._read += len(chunk)
        if self._read < len(self.ids):
            return []
        pieces = [self._append(sample(logits_BV[0].cpu().numpy(), self._params, position=len(self.ids)))]
        return pieces + self._append_forced()

    def close(self) -> None:
        """Give the cache back; the reply ends as it is."""
        self.finished = True
        self._cache = None

    def _append(self, token: int) -> Piece:
        self.ids.append(token)
        piece = self._reply.push(token)
        if piece.finish is None and len(self.ids) >= self._limit:
            piece = self._reply.cut(piece)
        if piece.finish is not None:
            self.close()
        return piece

    def _append_forced(self) -> list[Piece]:
        """Add a pending tool result; the model will read it in one chunk together with the end of its call."""
        pieces = []
        while self._reply.forced and not self.finished:
            pieces.append(self._append(self._reply.forced[0]))
        return pieces


def _reply_so_far(ids: Sequence[int], assistant_start: int) -> Sequence[int]:
    """What follows the last assistant_start: empty for a fresh prompt, and for a prompt without any."""
    for index in range(len(ids) - 1, -1, -1):
        if ids[index] == assistant_start:
            return ids[index + 1 :]
    return []
