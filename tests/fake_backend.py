"""A backend for tests: what it says is a function of the prompt, the seed and the tokens before, as with a real one.

It keeps account of every iterator that was opened and how it ended, and its hooks script waits, refusals and failures.
"""

import asyncio
import hashlib
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from nanochat_ray.engine.reply import Piece, Reply
from nanochat_ray.engine.sampler import TokenLogprob
from nanochat_ray.errors import UserError
from nanochat_ray.serve.backend import Busy, GenerationFailed, ReplyRequest, ServedModel, Waiting
from tests.fakes import ByteTokenizer, script

TOKENIZER = ByteTokenizer()
END = TOKENIZER.special("assistant_end")
SCRIPTS = {
    "sum": script("Let me see: ", "=17*23", " It is 391."),
    "emoji": script("Grüße 🙂 日本"),
    "slow": script("tick " * 200),
    "": script("Hello from the script."),
}


def scripted(request: ReplyRequest) -> Sequence[int]:
    """The script whose key is in the prompt's last turn."""
    question = TOKENIZER.decode(request.prompt[-40:])
    return next((said for key, said in SCRIPTS.items() if key in question), SCRIPTS[""])


def seeded(request: ReplyRequest) -> Sequence[int]:
    """Different words and calls for every prompt and seed."""
    digest = hashlib.sha256(repr((request.prompt, request.params.seed)).encode()).digest()
    words = ["one ", "zwölf ", "🙂", "日本", "=12*7", "=1/0", "stop here ", "…"]
    return script(*(words[byte % len(words)] for byte in digest[: 1 + digest[-1] % 12]))


def fake_logprob(token: int, at: int, count: int) -> TokenLogprob:
    """Any numbers, as long as they depend on nothing but the token and its place."""
    top = tuple(((token + i) % 256, -0.5 - i - at / 1000) for i in range(count))
    return TokenLogprob(token, -0.25 - at / 1000, top)


@dataclass
class FakeBackend:
    """Says what `says` returns, then assistant_end.

    waits        yielded before a reply's first piece
    refusal      raised instead of beginning
    fail_at      tokens after which a reply fails
    pause        awaited before every piece
    together     pieces that arrive without a pause between them
    """

    says: Callable[[ReplyRequest], Sequence[int]] = scripted
    context: int = 4096
    fingerprint: str = "model-1"
    waits: tuple[Waiting, ...] = ()
    refusal: Exception | None = None
    fail_at: int | None = None
    pause: Callable[[], Awaitable[Any]] = lambda: asyncio.sleep(0)
    together: int = 1
    ready_state: tuple[bool, str] = (True, "ok")
    requests: list[ReplyRequest] = field(default_factory=list)
    opened: int = 0
    closed: int = 0
    finished: int = 0
    new_tokens: int = 0

    @property
    def model(self) -> ServedModel:
        return ServedModel("scripted", TOKENIZER, self.context, self.fingerprint, {"depth": 0})

    @property
    def active(self) -> int:
        return self.opened - self.closed

    async def generate(self, request: ReplyRequest) -> AsyncIterator[Piece | Waiting]:
        self.requests.append(request)
        if len(request.prompt) >= self.context:
            raise UserError(f"the prompt has {len(request.prompt)} tokens; the context is {self.context}")
        if self.refusal is not None:
            raise self.refusal
        self.opened += 1
        try:
            for wait in self.waits:
                yield wait
                await self.pause()
            async for piece in self._pieces(request):
                yield piece
            self.finished += 1
        finally:
            self.closed += 1

    async def _pieces(self, request: ReplyRequest) -> AsyncIterator[Piece]:
        params, said = request.params, list(request.said)
        reply = Reply(TOKENIZER, params.stop)
        reply.replay(said)
        script_ids = [*self.says(request), END]
        room = min(params.max_tokens, self.context - len(request.prompt))
        assert len(said) < room, "asked for a reply that has no room left"
        piece = Piece()
        while piece.finish is None:
            if self.fail_at is not None and len(said) >= self.fail_at:
                raise GenerationFailed("the model failed while it wrote this reply")
            if len(said) % self.together == 0:
                await self.pause()
            token, forced = script_ids[len(said)], bool(reply.forced)
            logprobs = () if forced or params.logprobs is None else (fake_logprob(token, len(said), params.logprobs),)
            piece = reply.push(token, logprobs)
            said.append(token)
            self.new_tokens += 1
            if piece.finish is None and len(said) == room:
                piece = reply.cut(piece)
            yield piece

    async def ready(self) -> tuple[bool, str]:
        return self.ready_state

    async def stats(self) -> list[dict[str, Any]]:
        return [{"replica": "a", "running": self.active, "waiting": 0, "kv_blocks": 8, "kv_used": 2, "busy_s": 0.5}]


BUSY = Busy("all places are taken", retry_after_s=3)
