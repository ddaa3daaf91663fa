"""How fast a chat server is, seen from its clients: tokens/s, waiting, second turns, overhead, equal replies."""

import asyncio
import hashlib
import random
import time
from dataclasses import asdict, dataclass
from statistics import mean, median
from typing import Any

from nanochat_ray.bench.bare_engine import BareSpeed
from nanochat_ray.bench.http_exchange import Address
from nanochat_ray.bench.load import (
    Ask,
    Mix,
    Record,
    Script,
    assistant,
    at_once,
    closed_loop,
    one_by_one,
    open_loop,
    poisson,
    user,
    words,
)
from nanochat_ray.bench.load_report import differing, report
from nanochat_ray.bench.measurement import Line
from nanochat_ray.bench.serve_options import ServeSettings
from nanochat_ray.bench.served import ChatServer
from nanochat_ray.errors import UserError

Figures = dict[str, Any]
OF_BARE_GOAL, OF_SEQUENTIAL_GOAL, SEQUENTIAL_AT = 0.85, 5.0, 16
FIRST_TOKEN_GOAL, FIRST_TOKEN_AT = 1.5, 16
SECOND_TURN_GOAL = 0.15
OVERHEAD_GOAL_MS, OVERHEAD_AT = 1.0, 32
REPLICA_GOAL_S = 6.0  # with a model of 100 MB
REPORTED_WITHIN_S = 15.0
SECOND_QUESTION_WORDS = 12
FIRST_REPLY_TOKENS = 16
SEED = 1


@dataclass(frozen=True)
class Prompts:
    """Chats of about so many tokens, by what the server itself counted for two texts."""

    draw: random.Random
    tokens_per_word: float
    tokens_around: float  # of the chat format

    @staticmethod
    def of(address: Address, seed: int) -> "Prompts":
        """Raises:
        UserError: the server refuses a plain request; with what it answered.
        """
        draw, counts = random.Random(seed), (5, 45)
        load = asyncio.run(one_by_one(address, [_ask(words(count, draw), 1, draw) for count in counts]))
        first, second = load.records()
        for record in (first, second):
            if not record.complete:
                raise UserError(f"{address.host}:{address.port} does not answer a chat request: {record.error}")
        if first.prompt_tokens is None or second.prompt_tokens is None:
            return Prompts(draw, 1.0, 0.0)  # what it does not count cannot be met exactly
        per_word = (second.prompt_tokens - first.prompt_tokens) / (counts[1] - counts[0])
        return Prompts(draw, per_word, first.prompt_tokens - per_word * counts[0])

    def text(self, tokens: int) -> str:
        return words(max(1, round((tokens - self.tokens_around) / self.tokens_per_word)), self.draw)

    def ask(self, tokens: int, max_tokens: int) -> Ask:
        """A question that no other begins like."""
        return _ask(self.text(tokens), max_tokens, self.draw)

    def asks(self, count: int, settings: ServeSettings) -> list[Ask]:
        """So many, all of the lengths that the settings say."""
        return [self.ask(settings.prompt_tokens, settings.new_tokens) for _ in range(count)]


def _ask(text: str, max_tokens: int, draw: random.Random) -> Ask:
    return Ask({"messages": [user(text)], "max_tokens": max_tokens, "temperature": 1.0, "seed": draw.randrange(2**31)})


def measure_speed(server: ChatServer, settings: ServeSettings) -> Figures:
    """All that needs no second server and no engine beside it."""
    prompts = Prompts.of(server.address, SEED)
    asyncio.run(at_once(server.address, prompts.asks(max(settings.streams), settings)))  # warms up
    counts = sorted({1, *settings.streams})
    replicas = server.replicas(REPORTED_WITHIN_S if server.pid else 0.0)
    return {
        "ready_s": server.ready_s,
        "startup": [replica["startup"] for replica in replicas if "startup" in replica],
        "printed_until_ready": [line for line in server.printed if line[0] <= (server.ready_s or 0.0)],
        "streams": {str(count): _level(server, prompts, count, settings) for count in counts},
        "second_turn": _second_turns(server, prompts, settings),
    }


def _level(server: ChatServer, prompts: Prompts, count: int, settings: ServeSettings) -> Figures:
    """Rounds of `count` chats that begin together, as in the bare engine, until the time is over."""
    waves: list[list[Record]] = []
    cpu_s, before, began = 0.0, server.usage(), time.monotonic()
    while not waves or time.monotonic() < began + settings.seconds:
        users = [_user(prompts, settings) for _ in range(count)]
        load = asyncio.run(closed_loop(server.address, users))
        waves.append(load.records())
        cpu_s += load.cpu_s
    usage = server.usage()
    figures = report(waves, cpu_s)
    engines = {r["pid"] for r in server.replicas(REPORTED_WITHIN_S if server.pid else 0.0) if "pid" in r}
    used = usage.cpu_since(before, without=engines) if engines else {}  # else nobody knows whose CPU is the model's
    overhead = sum(used.values()) / figures["tokens"] * 1e3 if used and figures["tokens"] else None
    return {
        **figures,
        "prompt_tokens": median(record.prompt_tokens or settings.prompt_tokens for record in waves[0]),
        "overhead_ms_per_token": None if overhead is None else round(overhead, 4),
        "cpu_s_without_engine": {role: round(seconds, 3) for role, seconds in used.items()},
    }


def _user(prompts: Prompts, settings: ServeSettings) -> Script:
    """One question; where the model ends its reply early, others for the rest of the tokens, so that nobody idles."""
    left = settings.new_tokens
    while left > 0:
        record = (yield prompts.ask(settings.prompt_tokens, left)).record()
        if not record.complete:
            break
        left -= max(1, record.tokens)


def _second_turns(server: ChatServer, prompts: Prompts, settings: ServeSettings) -> Figures:
    """Conversations, one after the other, whose first turns have nothing in common."""
    context = server.stats().get("model", {}).get("context")
    tokens = settings.history_tokens if context is None else min(settings.history_tokens, context // 2)
    firsts, seconds = [], []
    for _ in range(settings.repeats):
        conversation = _conversation(prompts, tokens)
        first, second = asyncio.run(closed_loop(server.address, [conversation])).records()
        if first.first_token_s is not None and second.first_token_s is not None:
            firsts.append(first)
            seconds.append(second)
    if not firsts:
        return {"first_ms": None, "second_ms": None, "ratio": None, "prompt_tokens": None}
    first_s, second_s = (median(r.first_token_s or 0.0 for r in records) for records in (firsts, seconds))
    return {
        "first_ms": round(first_s * 1e3, 2),
        "second_ms": round(second_s * 1e3, 2),
        "ratio": round(second_s / first_s, 4),
        "prompt_tokens": [median(r.prompt_tokens or tokens for r in records) for records in (firsts, seconds)],
    }


def _conversation(prompts: Prompts, tokens: int) -> Script:
    first = prompts.ask(tokens, FIRST_REPLY_TOKENS)
    answered = (yield first).record()
    question = user(words(SECOND_QUESTION_WORDS, prompts.draw))
    messages = [*first.body["messages"], assistant(answered.text or "yes"), question]
    yield Ask({**first.body, "messages": messages})


def beside_bare(figures: Figures, bare: list[dict[int, BareSpeed]]) -> Figures:
    """The figures of `measure_speed` with what the engine alone did before and after, and the ratios.

    Args:
        bare: one for each time the engine was measured; empty where it could not be.
    """
    sequential = figures["streams"]["1"]["tok_per_s"]
    streams = {}
    for name, level in figures["streams"].items():
        peers = [speeds[int(name)] for speeds in bare if int(name) in speeds]
        speed, first_ms = level["tok_per_s"], level["first_token_ms"]["p95"]
        more: Figures = {"of_sequential": speed and sequential and round(speed / sequential, 3)}
        if peers:
            bare_speed, bare_first = (
                mean(peer.tok_per_s for peer in peers),
                mean(peer.first_token_s for peer in peers),
            )
            more |= {
                "bare": [asdict(peer) for peer in peers],
                "bare_tok_per_s": round(bare_speed, 1),
                "bare_first_token_ms": round(bare_first * 1e3, 2),
                "of_bare": speed and round(speed / bare_speed, 4),
                "first_token_of_bare": first_ms and round(first_ms / 1e3 / bare_first, 3),
                "wall_ms_per_token": speed and round(1e3 / speed - 1e3 / bare_speed, 4),
            }
        streams[name] = level | more
    return {**figures, "streams": streams}


def speed_lines(figures: Figures) -> list[Line]:
    """The figures of `beside_bare` for people, each beside its goal."""
    lines = [*_start_lines(figures)]
    for name, level in figures["streams"].items():
        lines += _level_lines(int(name), level)
    turn = figures["second_turn"]
    if turn["ratio"] is not None:
        first, second = turn["prompt_tokens"]
        beside = f"{turn['ratio']:.0%} of the first turn's {turn['first_ms']:,.0f} ms (goal ≤ {SECOND_TURN_GOAL:.0%})"
        lines.append(
            Line(f"first token of a second turn, {first:,.0f} → {second:,.0f}", _ms(turn["second_ms"]), beside)
        )
    return lines


def _start_lines(figures: Figures) -> list[Line]:
    if figures["ready_s"] is None:
        return []
    beside = ""
    if figures["startup"]:
        parts = {part: max(startup[part] for startup in figures["startup"]) for part in figures["startup"][0]}
        told = " + ".join(f"{part.removesuffix('_s').replace('_', ' ')} {s:.1f}" for part, s in parts.items())
        goal = f"(goal ≤ {REPLICA_GOAL_S:g} s with 100 MB)"
        beside = f"of it the replica's {told} = {sum(parts.values()):.1f} s {goal}"
    return [Line("from its start to ready", f"{figures['ready_s']:.1f} s", beside)]


def _level_lines(count: int, level: Figures) -> list[Line]:
    chats = "1 chat" if count == 1 else f"{count} chats at once"
    beside = []
    if level.get("of_bare"):
        beside.append(f"{level['of_bare']:.0%} of the bare engine's {level['bare_tok_per_s']:,.0f}")
        beside[-1] += f" (goal ≥ {OF_BARE_GOAL:.0%})"
    if count > 1 and level["of_sequential"]:
        goal = f" (goal ≥ {OF_SEQUENTIAL_GOAL:g} ×)" if count == SEQUENTIAL_AT else ""
        beside.append(f"{level['of_sequential']:.1f} × one at a time{goal}")
    tokens, chunks, first = (level[name] for name in ("between_tokens_ms", "between_chunks_ms", "first_token_ms"))
    speed = level["tok_per_s"]
    lines = [
        Line(chats, "—" if speed is None else f"{speed:,.0f} tok/s", "; ".join(beside)),
        Line("  first token, p95", _ms(first["p95"]), _beside_first(count, level)),
        Line(
            "  between tokens, p50",
            _ms(tokens["p50"]),
            f"p95 {_ms(tokens['p95'])}, p99 {_ms(tokens['p99'])}; between chunks p99 {_ms(chunks['p99'])}",
        ),
    ]
    if level["overhead_ms_per_token"] is not None:
        goal = f" (goal ≤ {OVERHEAD_GOAL_MS:g} ms)" if count == OVERHEAD_AT else ""
        wall = f"; on the clock {level['wall_ms_per_token']:+.2f} ms" if level.get("wall_ms_per_token") else ""
        busiest = max(level["cpu_s_without_engine"].items(), key=lambda used: used[1])[0]
        beside_cpu = f"all processes but the engine's, most of it {busiest}{goal}{wall}"
        lines.append(Line("  CPU per token around it", f"{level['overhead_ms_per_token']:.2f} ms", beside_cpu))
    if level["errors"]:
        failed = ", ".join(f"{number} × {kind}" for kind, number in level["errors"].items())
        lines.append(Line("  failed", f"{sum(level['errors'].values())}", failed))
    return lines


def _beside_first(count: int, level: Figures) -> str:
    spread = f"median {_ms(level['first_token_ms']['p50'])}, p99 {_ms(level['first_token_ms']['p99'])}"
    if not level.get("first_token_of_bare"):
        return spread
    goal = f" (goal ≤ {FIRST_TOKEN_GOAL:g} ×)" if count == FIRST_TOKEN_AT else ""
    return f"{level['first_token_of_bare']:.2f} × the bare engine's{goal}; {spread}"


def _ms(value: float | None) -> str:
    return "—" if value is None else f"{value:,.1f} ms"


def measure_mixed(server: ChatServer, settings: ServeSettings) -> Figures:
    """An open loop: requests come when they come, and wait where the server is behind."""
    asks = mix_of(Prompts.of(server.address, SEED), settings).asks(SEED)
    load = asyncio.run(open_loop(server.address, asks, poisson(settings.rate, settings.seconds, SEED)))
    return {"rate": settings.rate, **report([load.records()], load.cpu_s)}


def mix_of(prompts: Prompts, settings: ServeSettings) -> Mix:
    """Chats of several lengths around those of the settings."""
    per_token = 1 / prompts.tokens_per_word
    prompt_words = tuple(max(5, round(settings.prompt_tokens * part * per_token)) for part in (0.25, 1, 3))
    return Mix(prompt_words, turns=(1, 1, 3), max_tokens=tuple(settings.new_tokens // part for part in (8, 2, 1)))


def measure_check(server: ChatServer, settings: ServeSettings) -> Figures:
    """Whether a reply depends on who else is there: the same requests, greedy and sampled, alone and all at once."""
    prompts, count = Prompts.of(server.address, SEED), max(settings.streams)
    sampled = prompts.asks(count, settings)
    asks = [*sampled[::2], *(Ask({**ask.body, "temperature": 0.0}) for ask in sampled[1::2])]
    alone = asyncio.run(one_by_one(server.address, asks)).records()
    together = asyncio.run(at_once(server.address, asks)).records()
    digest = hashlib.sha256("\0".join(record.text for record in alone).encode())
    return {"replies": count, "differing": differing(alone, together), "sha256": digest.hexdigest()}


def check_lines(figures: Figures) -> list[Line]:
    differ, replies = len(figures["differing"]), figures["replies"]
    beside = f"one by one and at once; sha256 of all {figures['sha256'][:16]}…"
    return [Line("replies that are the same in both runs", f"{replies - differ} of {replies}", beside)]
