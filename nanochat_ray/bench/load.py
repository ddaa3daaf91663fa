"""The load generator: requests to any OpenAI-compatible server, at a rate or from so many users, and what came back.

    asks = Mix(prompt_words=(20, 200), turns=(1, 3), max_tokens=(16, 64)).asks(seed=1)
    load = asyncio.run(open_loop(Address.of(url), asks, poisson(rate=2.0, seconds=30.0, seed=1)))
    records = load.records()

It sends only fields that OpenAI's API has. The client is our own (`http_exchange` says why, with figures); a reply is
taken apart only when its record is asked for, so that the generator takes little from the server it measures.
"""

import asyncio
import json
import random
import time
from collections.abc import Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, Literal

from nanochat_ray.bench.http_exchange import Address, Exchange, Portions, run_exchange

CHAT = "/v1/chat/completions"
Body = dict[str, Any]
Script = Generator["Ask", "Trace", None]  # what one user asks, who is told what came of it
WORDS = (
    "time year people way day man thing woman life child world school state family student group country problem hand "
    "part place case week company system program question work government number night point home water room mother"
).split()


@dataclass(frozen=True)
class Ask:
    """One request.

    body            of the POST; `stream` and the wish for usage are added
    leave_after_s   the client breaks the connection so long after it was made
    expects         the status that is right
    """

    body: Body
    leave_after_s: float | None = None
    expects: int = 200

    def encoded(self) -> bytes:
        return json.dumps({**self.body, "stream": True, "stream_options": {"include_usage": True}}).encode()


def words(count: int, draw: random.Random) -> str:
    """So many words in random order: no two texts share a beginning that a cache could know."""
    return " ".join(draw.choices(WORDS, k=count))


def user(text: str) -> Body:
    return {"role": "user", "content": text}


def assistant(text: str) -> Body:
    return {"role": "assistant", "content": text}


@dataclass(frozen=True)
class Mix:
    """Requests of many kinds: each takes one of the values of every field, all values equally often.

    prompt_words   words of all messages together
    turns          questions, the last of which is to be answered
    max_tokens     of the reply
    """

    prompt_words: tuple[int, ...]
    turns: tuple[int, ...]
    max_tokens: tuple[int, ...]
    temperature: float = 1.0

    def asks(self, seed: int) -> Iterator[Ask]:
        """An endless stream, the same for the same seed."""
        draw = random.Random(seed)
        while True:
            turns = draw.choice(self.turns)
            messages = 2 * turns - 1
            each = max(1, draw.choice(self.prompt_words) // messages)
            texts = [words(each, draw) for _ in range(messages)]
            body = {
                "messages": [assistant(text) if number % 2 else user(text) for number, text in enumerate(texts)],
                "max_tokens": draw.choice(self.max_tokens),
                "temperature": self.temperature,
                "seed": draw.randrange(2**31),
            }
            yield Ask(body)


def poisson(rate: float, seconds: float, seed: int) -> list[float]:
    """Arrival times within so many seconds, on average `rate` per second, independent of each other."""
    draw, at, arrivals = random.Random(seed), 0.0, []
    while (at := at + draw.expovariate(rate)) < seconds:
        arrivals.append(at)
    return arrivals


@dataclass(frozen=True)
class Chunk:
    """A part of a reply's text. `tokens` may be a fraction: see `tokens_of_chunks`."""

    at: float
    text: str
    tokens: float


@dataclass(frozen=True)
class Record:
    """One request and its reply; times in seconds of time.monotonic.

    scheduled   when it should have been sent: what a user waits is counted from here
    first_byte  of the answer; None: there was none
    error       None for a complete reply, for a client that left as asked, and for an expected refusal
    counted     where `tokens` comes from: the server's usage, or one for each chunk if it gives none
    states      what the server said about itself meanwhile, for example ("moved", when)
    """

    ask: Ask
    user: int
    scheduled: float
    sent: float | None
    first_byte: float | None
    ended: float
    status: int | None
    error: str | None
    left: bool
    chunks: tuple[Chunk, ...]
    tokens: int
    counted: Literal["usage", "chunks"]
    prompt_tokens: int | None
    finish: str | None
    states: tuple[tuple[str, float], ...]

    @property
    def text(self) -> str:
        return "".join(chunk.text for chunk in self.chunks)

    @property
    def complete(self) -> bool:
        return self.error is None and not self.left and self.status == 200

    @property
    def first_token_s(self) -> float | None:
        """Seconds from when it should have been sent to the first text."""
        return self.chunks[0].at - self.scheduled if self.chunks else None


@dataclass
class _Reply:
    """What the events of one streamed answer say."""

    texts: list[tuple[float, str]] = field(default_factory=list)
    states: list[tuple[str, float]] = field(default_factory=list)
    usage: dict[str, Any] = field(default_factory=dict)
    finish: str | None = None
    error: str | None = None
    done: bool = False

    def data(self, at: float, data: bytes) -> None:
        if data == b"[DONE]":
            self.done = True
            return
        value = json.loads(data)
        if "error" in value:
            self.error = f"error event {value['error'].get('code') or value['error'].get('type')}"
        self.usage = value.get("usage") or self.usage
        for choice in value.get("choices", ()):
            self.finish = choice.get("finish_reason") or self.finish
            text = _text(choice.get("delta") or {})
            if text:
                self.texts.append((at, text))


def _text(delta: Body) -> str:
    tool = delta.get("tool")  # ours: a calculator call
    called = f"{tool['expression']}={tool['result']}" if tool and tool["result"] is not None else ""
    return (delta.get("reasoning_content") or "") + (delta.get("content") or "") + called


def _read(body: Portions) -> _Reply:
    """Every server sends one `data:` line per event, so a line is an event here."""
    reply, rest = _Reply(), b""
    for at, portion in body:
        *lines, rest = (rest + portion).split(b"\n")
        for line in lines:
            if line.startswith(b"data:"):
                reply.data(at, line[5:].strip())
            elif line.startswith(b": state "):
                reply.states.append((json.loads(line[8:])["state"], at))
    return reply


@dataclass(frozen=True)
class Trace:
    """A request with its bytes, not yet taken apart. `user`: whose it was in a closed loop, else 0."""

    ask: Ask
    user: int
    scheduled: float
    exchange: Exchange

    def record(self) -> Record:
        """Never raises: what cannot be understood is the record's error."""
        kept, response = self.exchange, self.exchange.response()
        reply, error = _Reply(), None
        try:
            if response is not None and response.status == 200:
                reply = _read(response.body)
        except (ValueError, KeyError, TypeError, AttributeError, UnicodeDecodeError):
            error = "not OpenAI's protocol"
        left = kept.end == "left"
        if response is None:
            error = kept.end if kept.end != "closed" else "connection lost"
        elif response.status != self.ask.expects:
            error = f"HTTP {response.status}"
        elif response.status == 200 and error is None:
            cut = None if reply.done else ("silence" if kept.end == "silence" else "broken off")
            error = reply.error or cut
        told = reply.usage.get("completion_tokens")
        tokens = len(reply.texts) if told is None else told
        shares = tokens_of_chunks([len(text) for _, text in reply.texts], tokens)
        return Record(
            ask=self.ask,
            user=self.user,
            scheduled=self.scheduled,
            sent=kept.sent,
            first_byte=response.first_byte if response else None,
            ended=kept.ended,
            status=response.status if response else None,
            error=None if left else error,
            left=left,
            chunks=tuple(Chunk(at, text, share) for (at, text), share in zip(reply.texts, shares, strict=True)),
            tokens=tokens,
            counted="chunks" if told is None else "usage",
            prompt_tokens=reply.usage.get("prompt_tokens"),
            finish=reply.finish,
            states=tuple(reply.states),
        )


def tokens_of_chunks(lengths: Sequence[int], tokens: int) -> list[float]:
    """How the tokens of a reply are shared among its chunks, of which only the characters are known.

    One each where there are enough; what is left over in proportion to the characters. Sums to `tokens`.
    """
    if not lengths:
        return []
    each = min(1.0, tokens / len(lengths))
    over, characters = tokens - each * len(lengths), sum(lengths)
    return [each + over * length / characters for length in lengths]


@dataclass(frozen=True)
class Load:
    """All requests of a run, with the CPU seconds that this thread spent on them."""

    traces: list[Trace]
    cpu_s: float

    def records(self) -> list[Record]:
        return [trace.record() for trace in self.traces]


async def open_loop(address: Address, asks: Iterable[Ask], arrivals: Sequence[float]) -> Load:
    """Each request at its arrival (seconds from now), whether the earlier ones are answered or not."""
    cpu, began = time.thread_time(), time.monotonic()

    async def arrive(ask: Ask, at: float) -> Trace:
        await asyncio.sleep(began + at - time.monotonic())
        return await send(address, ask, scheduled=began + at)

    waiting = [arrive(ask, at) for ask, at in zip(islice(asks, len(arrivals)), arrivals, strict=True)]
    return Load(list(await asyncio.gather(*waiting)), time.thread_time() - cpu)


async def closed_loop(
    address: Address,
    scripts: Sequence[Script],
    seconds: float = float("inf"),
    think_s: float = 0.0,
    going: list[Trace] | None = None,
) -> Load:
    """One user for each script, who asks again `think_s` after the reply; nobody begins anything after `seconds`.

    Args:
        going: gets every request when it is sent, for who wants to look while the replies come.
    """
    cpu, deadline = time.thread_time(), time.monotonic() + seconds

    async def go_on(number: int, script: Script) -> list[Trace]:
        traces: list[Trace] = []
        ask = next(script, None)
        while ask is not None:
            traces.append(await send(address, ask, time.monotonic(), number, going))
            await asyncio.sleep(think_s)
            if time.monotonic() >= deadline:
                break
            try:
                ask = script.send(traces[-1])
            except StopIteration:
                break
        return traces

    users = await asyncio.gather(*(go_on(number, script) for number, script in enumerate(scripts)))
    return Load([trace for traces in users for trace in traces], time.thread_time() - cpu)


async def at_once(address: Address, asks: Sequence[Ask], going: list[Trace] | None = None) -> Load:
    """All requests together, each by a user of its own; `going` as in `closed_loop`."""
    return await closed_loop(address, [script_of([ask]) for ask in asks], going=going)


async def one_by_one(address: Address, asks: Iterable[Ask]) -> Load:
    """Each request when the one before is answered."""
    return await closed_loop(address, [script_of(asks)])


def script_of(asks: Iterable[Ask]) -> Script:
    """A user who asks what is given, whatever the replies are."""
    for ask in asks:  # noqa: UP028 — `yield from` would send the replies on to an iterable that does not take them
        yield ask


async def send(address: Address, ask: Ask, scheduled: float, user: int = 0, going: list[Trace] | None = None) -> Trace:
    """One request, now, until its connection is closed."""
    trace = Trace(ask, user, scheduled, Exchange())
    if going is not None:
        going.append(trace)
    request = address.post(CHAT, ask.encoded())
    await run_exchange(trace.exchange, address, request, leave_after_s=ask.leave_after_s)
    return trace
