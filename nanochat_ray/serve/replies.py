"""From a request to the answer being written: prompts, seeds, and the reply that the request may be the rest of.

seed      of choice i: the request's plus i, as signed 64 bits; a request that names none gets the one that follows
          from its Idempotency-Key, so that any server gives it the same reply, or else a random one
session   what a conversation begins with, so that its later turns come to the replica that holds its beginning
"""

import asyncio
import hashlib
import json
import re
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

from nanochat_ray import chat
from nanochat_ray.engine.reply import ChatTokenizer
from nanochat_ray.engine.sampler import SamplingParams
from nanochat_ray.errors import UserError
from nanochat_ray.serve.answers import ChatShape, CompletionShape
from nanochat_ray.serve.backend import Backend, Busy, ReplyRequest
from nanochat_ray.serve.journal import Conflict, Entry, Journal, Written
from nanochat_ray.serve.metrics import Metrics, RequestMeter
from nanochat_ray.serve.position import Position, Sent, digest
from nanochat_ray.serve.refusals import Refusal
from nanochat_ray.serve.schema import ChatRequest, CompletionRequest
from nanochat_ray.serve.streaming import Answer
from nanochat_ray.serve.writing import Closed, Superseded, Writing

_KEY = re.compile(r"[A-Za-z0-9_-]{1,128}", re.ASCII)
_LONG_CHARS = 20_000  # encoding so much takes milliseconds, in which the event loop would stand still
_SESSION_TOKENS = 256


@dataclass(frozen=True)
class Caller:
    """What the headers say. `owner`: the name of the API key, or ""."""

    owner: str = ""
    idempotency_key: str | None = None
    last_event_id: str | None = None


class Replies:
    """Answers requests with a backend; remembers replies that have a key.

    closing   nothing new is begun

    Args:
        clock: seconds, never going back.
    """

    def __init__(self, backend: Backend, metrics: Metrics, clock: Callable[[], float]) -> None:
        self._backend = backend
        self._metrics = metrics
        self.journal = Journal(clock)
        self.closing = False

    async def chat(self, body: ChatRequest, caller: Caller) -> Answer:
        """Begin to answer.

        Raises:
            UserError, Refusal: the request cannot be answered.
        """
        require_model(body.model, self._backend.model.name)
        params = body.sampling(_seed(caller))
        conversation = body.conversation()
        chars = sum(len(str(message["content"])) for message in conversation)
        prompt = await _encoded(chars, lambda: chat.render_prompt(self._tokenizer, conversation))  # type: ignore[arg-type]
        self._check_length(prompt, "messages")
        start = next(i for i, message in enumerate(conversation, start=1) if message["role"] == "user")
        session = _hash(json.dumps(conversation[:start]))
        request = ReplyRequest(tuple(prompt), params, session=session, model=self._backend.model.fingerprint)
        return self._begin(body, caller, [request], ChatShape)

    async def completion(self, body: CompletionRequest, caller: Caller) -> Answer:
        """Begin to answer.

        Raises:
            UserError, Refusal: the request cannot be answered.
        """
        require_model(body.model, self._backend.model.name)
        params = body.sampling(_seed(caller))
        requests = []
        for text_or_ids in body.prompts():
            prompt = await _encoded(len(text_or_ids), partial(self._raw_prompt, text_or_ids))
            self._check_length(prompt, "prompt")
            session = _hash(json.dumps(prompt[:_SESSION_TOKENS]))
            fingerprint = self._backend.model.fingerprint
            requests.append(ReplyRequest(tuple(prompt), params, session=session, model=fingerprint))
        return self._begin(body, caller, requests, CompletionShape)

    @property
    def active(self) -> int:
        """Requests that are being answered."""
        return self._metrics.requests.active

    @property
    def _tokenizer(self) -> ChatTokenizer:
        return self._backend.model.tokenizer

    def _raw_prompt(self, given: str | list[int]) -> list[int]:
        if isinstance(given, str):
            return [self._tokenizer.special("bos"), *self._tokenizer.encode(given)]
        try:
            self._tokenizer.decode_bytes(given)
        except (KeyError, OverflowError, ValueError):
            raise Refusal(400, "prompt: a token id is not in the model's vocabulary", param="prompt") from None
        return given

    def _check_length(self, prompt: list[int], param: str) -> None:
        context = self._backend.model.context
        if len(prompt) >= context:
            message = (
                f"the {'conversation' if param == 'messages' else 'prompt'} has {len(prompt)} tokens, but the model's "
                f"context is {context}; shorten it"
            )
            raise Refusal(400, message, code="context_length_exceeded", param=param)

    def _begin(
        self,
        body: ChatRequest | CompletionRequest,
        caller: Caller,
        prompts: Sequence[ReplyRequest],
        shape: type[ChatShape | CompletionShape],
    ) -> Answer:
        if self.closing:
            raise Busy("the server is being stopped")
        requests = _choices(prompts, body.n or 1)
        model = self._backend.model
        written = tuple(Written() for _ in requests)
        fresh = Entry(_hash(shape.kind + repr(requests)), digest(model.fingerprint), int(time.time()), written)
        position = _position(body, caller, fresh, requests[0].params.max_tokens)
        entry, reply_id = fresh, uuid.uuid4().hex
        if caller.idempotency_key is not None:
            entry = self._remembered(caller, fresh)
            reply_id = _hash(caller.idempotency_key + entry.request)
        writing = Writing(self._backend, requests, entry.choices, position.choices, RequestMeter(self._metrics))
        entry.live = writing
        self._metrics.requests.active += 1
        return Answer(
            writing=writing,
            shape=shape(reply_id, entry.created, model.name, model.tokenizer, body.include_usage),
            written=entry.choices,
            prompt_tokens=sum(len(prompt.prompt) for prompt in prompts),
            position=position,
            begun=caller.last_event_id is not None,
            include_usage=body.include_usage,
            on_over=partial(self._over, entry, writing),
        )

    def _remembered(self, caller: Caller, fresh: Entry) -> Entry:
        """The entry of the caller's key; whoever writes it now stops."""
        assert caller.idempotency_key is not None
        try:
            entry = self.journal.open((caller.owner, caller.idempotency_key), fresh)
        except Conflict:
            message = "this Idempotency-Key belongs to another request; use a fresh one for each reply"
            raise Refusal(409, message, code="idempotency_conflict") from None
        if entry.live is not None:
            entry.live.supersede()
        return entry

    def _over(self, entry: Entry, writing: Writing, error: BaseException | None) -> None:
        if entry.live is writing:
            entry.live = None
        self.journal.trim()
        requests = self._metrics.requests
        requests.active -= 1
        match error:
            case None:
                requests.completed += 1
            case Closed() | Superseded() | asyncio.CancelledError():
                requests.cancelled += 1
            case Busy():
                requests.refused += 1
            case UserError():
                pass  # the request's own fault
            case _:
                requests.failed += 1


def require_model(wished: str | None, served: str) -> None:
    """Raises:
    Refusal: 404, it is another one than the one that is served.
    """
    if wished not in (None, served):
        message = f"there is no model {(wished or '')[:64]!r} here, only {served!r}"
        raise Refusal(404, message, code="model_not_found", param="model")


def caller_of(headers: Mapping[str, str], owner: str) -> Caller:
    """Raises:
    Refusal: the Idempotency-Key is malformed, or a Last-Event-ID comes without one.
    """
    key, last = headers.get("idempotency-key"), headers.get("last-event-id") or None
    if key is not None and not _KEY.fullmatch(key):
        raise Refusal(400, "Idempotency-Key has 1 to 128 letters, digits, dashes or underscores")
    if last is not None and key is None:
        raise Refusal(400, "Last-Event-ID needs the Idempotency-Key of the reply that it belongs to")
    return Caller(owner, key, last)


def _position(body: ChatRequest | CompletionRequest, caller: Caller, fresh: Entry, max_tokens: int) -> Position:
    """What the client has of its reply."""
    request, count = fresh.request[:8], len(fresh.choices)
    if caller.last_event_id is None:
        return Position(fresh.model, request, (Sent(),) * count)
    if not body.stream:
        raise Refusal(400, "Last-Event-ID has a meaning only with stream: true")
    position = Position.parse(caller.last_event_id)
    if position is None:
        raise Refusal(400, "Last-Event-ID is not the id of an event of this server")
    if position.model != fresh.model:
        raise Refusal(409, "the reply cannot be continued: the model has changed", code="model_changed")
    if position.request != request:
        message = "Last-Event-ID belongs to a reply to another request; send the same body again"
        raise Refusal(409, message, code="idempotency_conflict")
    if len(position.choices) != count or any(sent.tokens > max_tokens for sent in position.choices):
        raise Refusal(400, "Last-Event-ID is not the id of an event of this reply")
    return position


def _choices(prompts: Sequence[ReplyRequest], n: int) -> list[ReplyRequest]:
    """n of each prompt, each with a seed of its own."""
    each = [prompt for prompt in prompts for _ in range(n)]
    return [replace(one, params=_with_seed(one.params, index)) for index, one in enumerate(each)]


def _with_seed(params: SamplingParams, index: int) -> SamplingParams:
    seed = (params.seed + index + (1 << 63)) % (1 << 64) - (1 << 63)
    return replace(params, seed=seed)


def _seed(caller: Caller) -> int | None:
    """The seed of a request that names none, if it has a key."""
    if caller.idempotency_key is None:
        return None
    return int.from_bytes(hashlib.sha256(caller.idempotency_key.encode()).digest()[:8], "big") >> 1


async def _encoded(chars: int, encode: Callable[[], list[int]]) -> list[int]:
    return await asyncio.to_thread(encode) if chars > _LONG_CHARS else encode()


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:32]
