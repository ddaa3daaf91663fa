"""From the records of a load to figures: percentiles, tokens per second, errors, growth. Pure."""

from collections import Counter
from collections.abc import Iterable, Sequence
from itertools import groupby, pairwise
from statistics import linear_regression
from typing import Any

from nanochat_ray.bench.load import Record
from nanochat_ray.bench.measurement import Line

PERCENTS = (50, 95, 99)
Weighted = tuple[float, float]  # value, how often it counts


def percentile(values: Iterable[Weighted], percent: float) -> float | None:
    """The smallest value that, with all below it, has at least so many percent of the weight; None without any."""
    ordered = sorted(value for value in values if value[1] > 0)
    wanted, seen = sum(weight for _, weight in ordered) * percent / 100, 0.0
    for value, weight in ordered:
        seen += weight
        if seen >= wanted * (1 - 1e-12):  # sums of fractions are a little off
            return value
    return None


def percentiles_ms(seconds: Iterable[Weighted]) -> dict[str, float | None]:
    """{"p50": …, "p95": …, "p99": …} in milliseconds."""
    values = list(seconds)
    found = {percent: percentile(values, percent) for percent in PERCENTS}
    return {f"p{percent}": None if value is None else round(value * 1e3, 2) for percent, value in found.items()}


def first_tokens(records: Iterable[Record]) -> list[Weighted]:
    """Seconds from when each request should have been sent to its first text."""
    return [(seconds, 1.0) for record in records if (seconds := record.first_token_s) is not None]


def chunk_gaps(records: Iterable[Record]) -> list[Weighted]:
    """Seconds between the arrivals of a reply's text, as a reader sees them."""
    return [(gap, 1.0) for record in records for gap, _ in _gaps(record)]


def token_gaps(records: Iterable[Record]) -> list[Weighted]:
    """Seconds between tokens: k tokens that arrive together count as k gaps of a k-th of the time since the last."""
    return [(gap / tokens, tokens) for record in records for gap, tokens in _gaps(record) if tokens > 0]


def _gaps(record: Record) -> Iterable[Weighted]:
    """Seconds between arrivals and the tokens that arrived; chunks that came in one portion are one arrival."""
    arrivals = [(at, sum(chunk.tokens for chunk in group)) for at, group in groupby(record.chunks, lambda c: c.at)]
    for (before, _), (at, tokens) in pairwise(arrivals):
        yield at - before, tokens


def longest_gap_s(records: Iterable[Record]) -> float:
    """The longest time that any reply stood still after it had begun; 0 if none has two chunks."""
    return max((gap for gap, _ in chunk_gaps(records)), default=0.0)


def steady_window(records: Sequence[Record]) -> tuple[float, float] | None:
    """The time in which every user had a reply: from when all have had their first token until the first is done.

    None if there is no such time.
    """
    users: dict[int, list[Record]] = {}
    for record in records:
        users.setdefault(record.user, []).append(record)
    begun = [min((chunk.at for r in own for chunk in r.chunks[:1]), default=None) for own in users.values()]
    if not begun or None in begun:
        return None
    begin = max(at for at in begun if at is not None)
    end = min(max(chunk.at for r in own for chunk in r.chunks[-1:]) for own in users.values())
    return (begin, end) if end > begin else None


def tokens_within(records: Iterable[Record], begin: float, end: float) -> float:
    """Tokens that arrived after `begin` and not after `end`."""
    return sum(chunk.tokens for record in records for chunk in record.chunks if begin < chunk.at <= end)


def steady_tok_per_s(waves: Iterable[Sequence[Record]]) -> float | None:
    """Tokens per second of all users together, over the steady windows of several loads; None without such a window."""
    tokens = seconds = 0.0
    for records in waves:
        window = steady_window(records)
        if window is not None:
            tokens += tokens_within(records, *window)
            seconds += window[1] - window[0]
    return tokens / seconds if seconds else None


def errors_by_kind(records: Iterable[Record]) -> dict[str, int]:
    return dict(Counter(record.error for record in records if record.error is not None).most_common())


def differing(some: Sequence[Record], others: Sequence[Record]) -> list[int]:
    """Which replies of two runs of the same requests are not the same, byte for byte, or not complete."""
    pairs = enumerate(zip(some, others, strict=True))
    return [n for n, (a, b) in pairs if not (a.complete and b.complete and (a.text, a.finish) == (b.text, b.finish))]


def growth_per_minute(seconds: Sequence[float], values: Sequence[float], warm_up: float = 1 / 3) -> float:
    """Slope of the line through the samples after the warm-up (a share of the time); 0 with fewer than three."""
    if not seconds:
        return 0.0
    warm = seconds[0] + warm_up * (seconds[-1] - seconds[0])
    late = [(at, value) for at, value in zip(seconds, values, strict=True) if at >= warm]
    if len(late) < 3 or late[0][0] == late[-1][0]:
        return 0.0
    return 60 * linear_regression([at for at, _ in late], [value for _, value in late]).slope


def report(waves: Sequence[Sequence[Record]], cpu_s: float) -> dict[str, Any]:
    """All figures of a load, or of several like it; JSON-able.

    Args:
        cpu_s: CPU seconds of the generator.
    """
    records = [record for wave in waves for record in wave]
    seconds = sum(max(r.ended for r in wave) - min(r.scheduled for r in wave) for wave in waves if wave)
    complete = [record for record in records if record.complete]
    tokens, chunks = sum(record.tokens for record in records), sum(len(record.chunks) for record in records)
    speed = steady_tok_per_s(waves)
    return {
        "requests": len(records),
        "completed": len(complete),
        "left": sum(record.left for record in records),
        "errors": errors_by_kind(records),
        "seconds": round(seconds, 2),
        "requests_per_s": round(len(complete) / seconds, 3) if seconds else 0.0,
        "tokens": tokens,
        "tokens_counted_by": sorted({record.counted for record in complete}),
        "tokens_per_chunk": round(tokens / chunks, 2) if chunks else None,
        "tok_per_s": None if speed is None else round(speed, 1),
        "first_token_ms": percentiles_ms(first_tokens(records)),
        "between_tokens_ms": percentiles_ms(token_gaps(records)),
        "between_chunks_ms": percentiles_ms(chunk_gaps(records)),
        "longest_gap_s": round(longest_gap_s(records), 3),
        "states": dict(Counter(state for record in records for state, _ in record.states)),
        "generator_cpu_s": round(cpu_s, 3),
        "generator_us_per_chunk": round(cpu_s / chunks * 1e6, 1) if chunks else None,
    }


def report_lines(figures: dict[str, Any]) -> list[Line]:
    """The figures of `report` for people."""
    counted = " and ".join(figures["tokens_counted_by"]) or "nothing"
    failed = ", ".join(f"{count} × {kind}" for kind, count in figures["errors"].items()) or "no errors"
    beside = f"{figures['requests']} sent, {figures['left']} left by their client, {failed}"
    return [
        Line("requests completed", f"{figures['requests_per_s']:.2f} /s", beside),
        Line("tokens, while all are busy", _speed(figures["tok_per_s"]), f"counted by {counted}"),
        Line("to the first token", *_spread(figures["first_token_ms"])),
        Line("between tokens", *_spread(figures["between_tokens_ms"])),
        Line("between chunks", *_spread(figures["between_chunks_ms"])),
        Line(
            "CPU of the generator",
            f"{figures['generator_cpu_s']:.2f} s",
            f"{figures['generator_us_per_chunk'] or 0:.0f} µs per chunk",
        ),
    ]


def _speed(tok_per_s: float | None) -> str:
    return "—" if tok_per_s is None else f"{tok_per_s:,.0f} tok/s"


def _spread(ms: dict[str, float | None]) -> tuple[str, str]:
    if ms["p50"] is None:
        return "—", ""
    return f"{ms['p50']:,.1f} ms", f"median; p95 {ms['p95']:,.1f}, p99 {ms['p99']:,.1f}"
