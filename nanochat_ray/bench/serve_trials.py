"""What a chat server goes through without an error: more and fewer replicas, a replica that dies, minutes of misuse."""

import asyncio
import os
import random
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

from nanochat_ray.bench.load import Ask, Load, Mix, Record, Trace, at_once, closed_loop, script_of
from nanochat_ray.bench.load_report import (
    differing,
    errors_by_kind,
    first_tokens,
    growth_per_minute,
    longest_gap_s,
    percentiles_ms,
    report,
)
from nanochat_ray.bench.measurement import Line
from nanochat_ray.bench.serve_options import ServeSettings
from nanochat_ray.bench.serve_speed import SEED, Prompts, mix_of
from nanochat_ray.bench.served import ChatServer, Stats, Usage
from nanochat_ray.errors import UserError

Figures = dict[str, Any]
LOOK_EVERY_S, LOOK_CLOSELY_EVERY_S = 0.25, 0.005
SCALE_GOAL_S, SCALE_WITHIN_S, SHRINK_WITHIN_S = 15.0, 120.0, 300.0
USERS_PER_REPLICA = 32  # as many replies as one writes at the same time; the autoscaler wants fewer on each
KILL_AT = 0.35  # of the bytes of all replies
LONG_REPLY_TOKENS = 256  # so that there is a middle to kill in, even with a tiny model
BACK_WITHIN_S = 120.0
SAMPLE_EVERY_S = 1.0
LEAVING, BAD = 0.15, 0.1  # of the soak's requests
LEAVE_WITHIN_S = 3.0
IDLE_WITHIN_S = 15.0
BAD_BODIES: tuple[tuple[dict[str, Any], int], ...] = (
    ({"messages": []}, 400),
    ({"messages": [{"role": "robot", "content": "x"}]}, 400),
    ({"messages": [{"role": "user", "content": "x"}], "temperature": -1}, 400),
    ({"messages": [{"role": "user", "content": "x"}], "max_tokens": "many"}, 400),
    ({"messages": [{"role": "user", "content": "x " * 40_000}]}, 400),
    ({"messages": [{"role": "user", "content": "x"}], "model": "no such model"}, 404),
)


def _until(wanted: Callable[[], bool], within_s: float) -> float | None:
    """Seconds until it was so; None if it was not in time."""
    began = time.monotonic()
    while time.monotonic() < began + within_s:
        if wanted():
            return time.monotonic() - began
        time.sleep(LOOK_EVERY_S)
    return None


def _at_work(replicas: list[Stats]) -> int:
    """How many have written something."""
    return sum(replica.get("generated_tokens", 0) > 0 for replica in replicas)


# --- scale -----------------------------------------------------------------------------------------------------------


def measure_scale(server: ChatServer, settings: ServeSettings) -> Figures:
    """One user, then many until all replicas write, then one until there are as few as before."""
    low, high = settings.replicas
    prompts = Prompts.of(server.address, SEED)
    return asyncio.run(_scale(server, prompts, settings, low, high))


async def _scale(server: ChatServer, prompts: Prompts, settings: ServeSettings, low: int, high: int) -> Figures:
    over, crowd_over = threading.Event(), threading.Event()

    def asks(until: threading.Event) -> Iterator[Ask]:
        while not until.is_set():
            yield prompts.ask(settings.prompt_tokens, settings.new_tokens)

    def users(count: int, until: threading.Event) -> asyncio.Task[Load]:
        scripts = [script_of(asks(until)) for _ in range(count)]
        return asyncio.create_task(closed_loop(server.address, scripts))

    one = users(1, over)
    await asyncio.sleep(LOOK_EVERY_S)
    crowd = users(high * USERS_PER_REPLICA, crowd_over)
    grown = await asyncio.to_thread(_until, lambda: _at_work(server.replicas()) >= high, SCALE_WITHIN_S)
    crowd_over.set()
    loads = [await crowd]
    shrunk = await asyncio.to_thread(_until, lambda: 0 < len(server.replicas()) <= low, SHRINK_WITHIN_S)
    over.set()
    loads.append(await one)
    records = [record for load in loads for record in load.records()]
    return {
        "replicas": [low, high],
        "users": high * USERS_PER_REPLICA,
        "grown_s": grown and round(grown, 2),
        "shrunk_s": shrunk and round(shrunk, 2),
        "requests": len(records),
        "errors": errors_by_kind(records),
        "first_token_ms": percentiles_ms(first_tokens(records)),
        "longest_gap_s": round(longest_gap_s(records), 3),
    }


def scale_lines(figures: Figures) -> list[Line]:
    low, high = figures["replicas"]
    grow = f"goal ≤ {SCALE_GOAL_S:g} s; {figures['users']} users who never pause"
    return [
        Line(f"{low} → {high} replicas that write", _seconds(figures["grown_s"], SCALE_WITHIN_S), grow),
        Line(f"{high} → {low} after the load", _seconds(figures["shrunk_s"], SHRINK_WITHIN_S), "one user goes on"),
        _failed_line(figures),
        Line("longest pause within a reply", f"{figures['longest_gap_s']:.2f} s"),
    ]


def _seconds(seconds: float | None, within_s: float) -> str:
    return f"not in {within_s:g} s" if seconds is None else f"{seconds:.1f} s"


def _failed_line(figures: Figures) -> Line:
    kinds = ", ".join(f"{count} × {kind}" for kind, count in figures["errors"].items())
    return Line(
        "requests that failed", f"{sum(figures['errors'].values())} of {figures['requests']}", kinds or "goal 0"
    )


# --- failover --------------------------------------------------------------------------------------------------------


def measure_failover(server: ChatServer, settings: ServeSettings) -> Figures:
    """The same replies twice; the second time the process that wrote most of them is killed while it writes.

    Raises:
        UserError: there are not as many replicas, or /stats does not say which processes they are.
    """
    count = max(settings.streams)
    prompts = Prompts.of(server.address, SEED)
    if _until(lambda: len(server.replicas()) >= settings.replicas[0], BACK_WITHIN_S) is None:
        raise UserError(f"the server has not got the {settings.replicas[0]} replicas that were asked for")
    asyncio.run(at_once(server.address, prompts.asks(count, settings)))  # warms all of them up
    asks = [prompts.ask(settings.prompt_tokens, LONG_REPLY_TOKENS) for _ in range(count)]
    before = {replica["pid"]: replica["generated_tokens"] for replica in server.replicas() if "pid" in replica}
    calm = asyncio.run(at_once(server.address, asks))
    written = {r["pid"]: r["generated_tokens"] - before[r["pid"]] for r in server.replicas() if r.get("pid") in before}
    if len(written) < settings.replicas[0]:
        raise UserError(f"{server.url}/stats does not say which processes the replicas are")
    victim = max(written, key=written.__getitem__)  # known beforehand: asking takes longer than a tiny model's reply
    disturbed, killed, back_s = asyncio.run(_kill_in_the_middle(server, asks, victim, _bytes(calm.traces)))
    return {
        "replies": count,
        "requests": count,
        "going_on_when_killed": sum(record.ended > killed for record in disturbed),
        "moved": sum(any(state == "moved" for state, _ in record.states) for record in disturbed),
        "errors": errors_by_kind(disturbed),
        "differing": differing(calm.records(), disturbed),
        "longest_gap_s": round(longest_gap_s(disturbed), 3),
        "longest_gap_undisturbed_s": round(longest_gap_s(calm.records()), 3),
        "replica_back_s": back_s and round(back_s, 2),
    }


def _bytes(traces: list[Trace]) -> int:
    return sum(len(portion) for trace in traces for _, portion in trace.exchange.portions)


async def _kill_in_the_middle(
    server: ChatServer, asks: list[Ask], victim: int, expected_bytes: int
) -> tuple[list[Record], float, float | None]:
    """The replies; when the replica was killed; seconds until there were as many replicas again."""
    assert victim in {process.pid for process in server.processes()}, "that is a process of somebody else"
    replicas = len(server.replicas())
    going: list[Trace] = []
    load = asyncio.create_task(at_once(server.address, asks, going))
    while _bytes(going) < KILL_AT * expected_bytes and not load.done():
        await asyncio.sleep(LOOK_CLOSELY_EVERY_S)
    os.kill(victim, signal.SIGKILL)
    killed = time.monotonic()

    def back() -> bool:
        now = server.replicas()
        return len(now) >= replicas and victim not in {replica["pid"] for replica in now}

    back_s = await asyncio.to_thread(_until, back, BACK_WITHIN_S)
    return (await load).records(), killed, back_s


def failover_lines(figures: Figures) -> list[Line]:
    differ, replies = len(figures["differing"]), figures["replies"]
    going_on = f"{figures['going_on_when_killed']} were being written, {figures['moved']} said that they moved"
    calm = f"undisturbed {figures['longest_gap_undisturbed_s']:.2f} s"
    return [
        Line("replies equal to the undisturbed ones", f"{replies - differ} of {replies}", going_on),
        _failed_line(figures),
        Line("longest pause within a reply", f"{figures['longest_gap_s']:.2f} s", calm),
        Line("killed → as many replicas again", _seconds(figures["replica_back_s"], BACK_WITHIN_S)),
    ]


# --- soak ------------------------------------------------------------------------------------------------------------


def measure_soak(server: ChatServer, settings: ServeSettings) -> Figures:
    """As many users as the most chats of the settings, who never pause; some leave, some ask what is refused."""
    prompts = Prompts.of(server.address, SEED)
    users = max(settings.streams)
    scripts = [script_of(misuse(mix_of(prompts, settings), SEED + number)) for number in range(users)]
    with _Sampler(server) as sampler:
        load = asyncio.run(closed_loop(server.address, scripts, seconds=60 * settings.minutes))
    idle_s = _until(lambda: _is_idle(server.replicas()), IDLE_WITHIN_S) if server.replicas() else None
    replicas = server.replicas()
    records = load.records()
    return {
        "minutes": settings.minutes,
        "users": users,
        **report([records], load.cpu_s),
        "refused_as_expected": sum(record.ask.expects != 200 and record.error is None for record in records),
        "idle_after_s": idle_s and round(idle_s, 2),
        "replicas": len(replicas),
        "blocks_held_when_idle": sum(replica.get("kv_used", 0) for replica in replicas),
        "samples": len(sampler.usages),
        **sampler.growth(),
        "busiest": sampler.busiest(),
    }


def misuse(mix: Mix, seed: int) -> Iterator[Ask]:
    """Requests of a mix; some are broken off at a random moment, some are replaced by ones that must be refused."""
    draw = random.Random(seed)
    for ask in mix.asks(seed):
        kind = draw.random()
        if kind < BAD:
            body, status = draw.choice(BAD_BODIES)
            yield Ask(body, expects=status)
        elif kind < BAD + LEAVING:
            yield replace(ask, leave_after_s=draw.uniform(0.0, LEAVE_WITHIN_S))
        else:
            yield ask


def _is_idle(replicas: list[Stats]) -> bool:
    return bool(replicas) and not any(r.get("running", 0) or r.get("waiting", 0) for r in replicas)


class _Sampler:
    """Looks at a server's processes and /stats again and again while a block runs."""

    def __init__(self, server: ChatServer) -> None:
        self._server = server
        self.usages: list[Usage] = []
        self.replicas: list[list[Stats]] = []
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._follow, daemon=True)

    def __enter__(self) -> "_Sampler":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _follow(self) -> None:
        while not self._stop.wait(SAMPLE_EVERY_S):
            self.usages.append(self._server.usage())
            self.replicas.append(self._server.replicas())

    def growth(self) -> Figures:
        """By role, per minute after the warm-up: resident megabytes and open file descriptors; and the last of each."""
        times = [usage.at for usage in self.usages]
        memory, files = [u.memory() for u in self.usages], [u.files() for u in self.usages]

        def slopes(samples: list[dict[str, int]], unit: float) -> dict[str, float]:
            roles = samples[-1] if samples else {}
            return {
                role: round(growth_per_minute(times, [sample.get(role, 0) / unit for sample in samples]), 3)
                for role in roles
            }

        return {
            "memory_mb": {role: round(size / 1e6) for role, size in (memory[-1] if memory else {}).items()},
            "memory_mb_per_minute": slopes(memory, 1e6),
            "files": files[-1] if files else {},
            "files_per_minute": slopes(files, 1.0),
        }

    def busiest(self) -> dict[str, int]:
        """The most of what /stats counted at any moment, over all replicas."""
        most: Counter[str] = Counter()
        for replicas in self.replicas:
            for name in ("running", "waiting", "kv_used"):
                most[name] = max(most[name], sum(replica.get(name, 0) for replica in replicas))
        return dict(most)


def soak_lines(figures: Figures) -> list[Line]:
    idle = figures["idle_after_s"]
    left = f"{figures['left']} left by their client, {figures['refused_as_expected']} refused as they should be"
    lines = [
        Line(f"requests in {figures['minutes']:g} minutes", f"{figures['requests']}", left),
        _failed_line(figures),
        Line("tokens", f"{figures['tokens'] / figures['seconds']:,.0f} tok/s", f"{figures['users']} users"),
        Line(
            "nothing running or waiting after", _seconds(idle, IDLE_WITHIN_S), f"at most {_words(figures['busiest'])}"
        ),
        Line("blocks held then", f"{figures['blocks_held_when_idle']}", "goal 0: those kept for reuse are nobody's"),
    ]
    for role, per_minute in sorted(figures["memory_mb_per_minute"].items(), key=lambda item: -abs(item[1]))[:4]:
        files = f"{figures['files'][role]} files, {figures['files_per_minute'][role]:+.1f} per minute"
        beside = f"{figures['memory_mb'][role]:,} MB in the end; {files}"
        lines.append(Line(f"  memory of {role}", f"{per_minute:+.1f} MB/min", beside))
    return lines


def _words(counts: dict[str, int]) -> str:
    return ", ".join(f"{count} {name.replace('_', ' ')}" for name, count in counts.items())
