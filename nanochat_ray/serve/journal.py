"""What replies have said so far, so that a client that lost its connection gets the rest. In memory, bounded.

Only tokens are kept (and log-probabilities, if asked for): text, calculator calls and the end follow from them.
"""

from array import array
from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Protocol

from nanochat_ray.engine.reply import ChatTokenizer, FinishReason, Piece, Reply
from nanochat_ray.engine.sampler import TokenLogprob
from nanochat_ray.serve.position import Sent

MAX_ENTRIES = 1024
MAX_COST = 1_000_000  # tokens; one with log-probabilities counts for as many as it has numbers
MAX_AGE_S = 900.0


@dataclass
class Written:
    """A choice as far as it is written. `logprobs`: of the sampled tokens, in order, if they were asked for."""

    tokens: array = field(default_factory=lambda: array("i"))
    logprobs: list[TokenLogprob] = field(default_factory=list)
    finish: FinishReason | None = None
    cost: int = 0  # see MAX_COST

    def add(self, piece: Piece) -> None:
        """Append what the model wrote next."""
        self.tokens.extend(piece.tokens)
        self.logprobs += piece.logprobs
        self.finish = piece.finish
        self.cost += len(piece.tokens) + sum(2 + len(one.top) for one in piece.logprobs)


@dataclass(frozen=True)
class Skipped:
    """Sampled tokens of a choice that were sent earlier."""

    sampled: tuple[int, ...]


def replay(tokenizer: ChatTokenizer, stops: tuple[str, ...], written: Written, sent: Sent) -> Iterator[Piece | Skipped]:
    """What of a choice was sent, then the rest of it, token by token as it was when it was new."""
    reply = Reply(tokenizer, stops)
    logprobs = iter(written.logprobs)
    skipped: list[int] = []
    for count, token in enumerate(written.tokens, start=1):
        own = [] if reply.forced else [one for one in [next(logprobs, None)] if one is not None]
        skipped += [token] if own and count <= sent.tokens else []
        piece = reply.push(token, tuple(own))
        if count == sent.tokens and sent.step != "e":
            yield Skipped(tuple(skipped))
            rest = Piece(tool=piece.tool if sent.step == "t" else None, finish=piece.finish)
            if rest != Piece():
                yield rest
        elif count > sent.tokens:
            yield piece
    if written.finish == "length" and sent.step != "e":
        # The text that was held back came with the end, so a position before the end was passed without it.
        all_text_sent = (sent.tokens, sent.step) == (len(written.tokens), "t")
        yield Piece(finish="length") if all_text_sent else reply.cut(Piece())


class Live(Protocol):
    """A request that is writing a reply now."""

    def supersede(self) -> None:
        """End it: a newer request for the same reply goes on."""
        ...


@dataclass
class Entry:
    """A reply that was asked for under a key.

    request     the hash of what was asked
    created     seconds since 1970
    """

    request: str
    model: str
    created: int
    choices: tuple[Written, ...]
    used_at: float = 0.0
    live: Live | None = None

    @property
    def cost(self) -> int:
        return sum(choice.cost for choice in self.choices)


class Conflict(Exception):
    """The key belongs to a reply to another request."""


class Journal:
    """Entries by key; the least recently used go first, those that are being written never.

    Args:
        clock: seconds, never going back.
    """

    def __init__(
        self,
        clock: Callable[[], float],
        max_entries: int = MAX_ENTRIES,
        max_cost: int = MAX_COST,
        max_age_s: float = MAX_AGE_S,
    ) -> None:
        self._clock = clock
        self._max_entries = max_entries
        self._max_cost = max_cost
        self._max_age_s = max_age_s
        self._entries: OrderedDict[tuple[str, str], Entry] = OrderedDict()

    def __len__(self) -> int:
        return len(self._entries)

    def open(self, key: tuple[str, str], fresh: Entry) -> Entry:
        """The entry of a key, `fresh` if there is none or the model was replaced since.

        Args:
            key: whose it is, and the Idempotency-Key.

        Raises:
            Conflict: as described.
        """
        self.trim()
        entry = self._entries.get(key)
        if entry is None or entry.model != fresh.model:
            entry = self._entries[key] = fresh
        elif entry.request != fresh.request:
            raise Conflict
        entry.used_at = self._clock()
        self._entries.move_to_end(key)
        return entry

    def trim(self) -> None:
        """Forget what is too old or too much."""
        oldest = self._clock() - self._max_age_s
        cost = sum(entry.cost for entry in self._entries.values())
        for key, entry in list(self._entries.items()):
            over = len(self._entries) > self._max_entries or cost > self._max_cost
            if entry.live is None and (over or entry.used_at < oldest):
                cost -= entry.cost
                del self._entries[key]
