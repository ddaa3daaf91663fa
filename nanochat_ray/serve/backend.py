"""What the HTTP side asks of whatever generates: one engine in this process, or replicas all over a cluster. No Ray.

A reply is determined by its prompt and parameters alone: sampling is keyed by (seed, position). So a reply that is
asked for again with the tokens it has (`said`) goes on with the tokens that it would have had anyway, wherever that is.
"""

from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

from nanochat_ray.engine.load import ChatModel
from nanochat_ray.engine.reply import ChatTokenizer, Piece
from nanochat_ray.engine.sampler import SamplingParams


class Busy(Exception):
    """No room for another reply; nothing was begun. `retry_after_s`: when to try again."""

    def __init__(self, message: str, retry_after_s: int = 2) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class GenerationFailed(Exception):
    """This reply cannot be finished anywhere: the model failed on it, or no replica could take it in time."""


class EngineDied(GenerationFailed):
    """Not the reply failed but the engine, which writes no other one either; elsewhere the reply may go on."""


@dataclass(frozen=True)
class ReplyRequest:
    """One reply to generate.

    prompt    token ids, for a chat up to and with assistant_start
    said      tokens of the reply that exist already, `max_tokens` counts them; the reply goes on behind them
    session   requests with the same session go to the same replica, if it has room: it may hold their beginning
    model     the fingerprint of the model that shall write it
    """

    prompt: tuple[int, ...]
    params: SamplingParams
    said: tuple[int, ...] = ()
    session: str = ""
    model: str = ""


@dataclass(frozen=True)
class Waiting:
    """Why a reply does not go on just now.

    starting   no replica runs; one is being started
    queued     admitted, `ahead` others are before it
    moved      its replica was lost or is being drained; another one goes on with it
    """

    state: Literal["starting", "queued", "moved"]
    ahead: int | None = None


Update = Piece | Waiting


@dataclass(frozen=True)
class ServedModel:
    """Facts about the model, known without loading its weights.

    name          its id in the API
    context       tokens of prompt and reply together
    fingerprint   changes whenever the same request could get another reply
    about         facts for people and /stats, JSON-able
    """

    name: str
    tokenizer: ChatTokenizer
    context: int
    fingerprint: str
    about: dict[str, Any] = field(default_factory=dict)

    @staticmethod
    def of(chat: ChatModel) -> "ServedModel":
        """The facts of a model that is loaded."""
        return ServedModel(chat.name, chat.engine.tokenizer, chat.engine.context, chat.fingerprint, chat.about)


class Backend(Protocol):
    """Generates replies."""

    model: ServedModel

    def generate(self, request: ReplyRequest) -> AsyncIterator[Update]:
        """The rest of a reply; the last piece has `finish`. Closing the iterator stops the work within a decode step.

        Raises, before any work is done, or where the reply would have to go on on another replica:
            UserError: the prompt does not fit the context.
            Busy: as described.
        Raises later:
            GenerationFailed: as described.
        """
        ...

    async def ready(self) -> tuple[bool, str]:
        """Whether a reply could begin now, and the state in words ("ok", "starting a replica", …)."""
        ...

    async def stats(self) -> list[dict[str, Any]]:
        """Per replica, JSON-able: replica, running, waiting, kv_blocks, kv_used, prefix_hit_tokens, prompt_tokens,
        generated_tokens, completed, cancelled, failed, preempted, busy_s."""
        ...
