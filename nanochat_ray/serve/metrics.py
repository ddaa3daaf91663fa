"""Counts and times of the HTTP side, and the replicas' own figures, as Prometheus text. One registry per application.

Labels are routes, statuses and replicas that run now: no label grows with what clients send.
"""

import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, fields
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from nanochat_ray.engine.reply import Piece
from nanochat_ray.serve.backend import Update, Waiting
from nanochat_ray.serve.http import Application, Message, Receive, Scope, Send

_FIRST_TOKEN_S = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)
_TOKEN_S = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 5)

# Per replica, from the backend's own statistics: name, what it says, and whether it only grows.
_REPLICA = {
    "running": ("replies being written", False),
    "waiting": ("replies in the queue", False),
    "kv_blocks": ("blocks of the KV cache", False),
    "kv_used": ("blocks of the KV cache in use", False),
    "prefix_hit_tokens": ("prompt tokens found in the KV cache", True),
    "prompt_tokens": ("prompt tokens read", True),
    "generated_tokens": ("tokens written", True),
    "completed": ("replies completed", True),
    "cancelled": ("replies whose client left", True),
    "failed": ("replies that failed", True),
    "preempted": ("times a reply gave its blocks back", True),
    "busy_s": ("seconds of work", True),
}


@dataclass
class Requests:
    """Requests for replies, by what became of them; `moved` counts the moves of their choices."""

    active: int = 0
    completed: int = 0
    cancelled: int = 0
    failed: int = 0
    refused: int = 0
    moved: int = 0


class Metrics:
    """The figures of one application."""

    def __init__(self) -> None:
        self.requests = Requests()
        self._registry = CollectorRegistry()
        self._replicas: list[dict[str, Any]] = []

        def counter(name: str, text: str, labels: Iterable[str] = ()) -> Counter:
            return Counter(f"nanochat_{name}", text, labels, registry=self._registry)

        def histogram(name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
            return Histogram(f"nanochat_{name}", text, buckets=buckets, registry=self._registry)

        self._http = counter("http_requests", "HTTP requests by route and status", ("route", "status"))
        self.prompt_tokens = counter("prompt_tokens", "tokens of the prompts of accepted requests")
        self.generated_tokens = counter("generated_tokens", "tokens received from replicas")
        self.first_token_s = histogram("time_to_first_token_seconds", "from request to first token", _FIRST_TOKEN_S)
        self.token_s = histogram("inter_token_seconds", "between the tokens of a reply", _TOKEN_S)
        self._registry.register(self)  # type: ignore[arg-type]

    def collect(self) -> Iterator[Metric]:
        """What is not counted by a Prometheus object of its own; called by the registry."""
        for field in fields(self.requests):
            name, value = f"nanochat_requests_{field.name}", getattr(self.requests, field.name)
            kind = GaugeMetricFamily if field.name == "active" else CounterMetricFamily
            text = "moves of replies to another replica" if field.name == "moved" else f"requests {field.name}"
            yield kind(name, text, value)
        for name, (text, grows) in _REPLICA.items():
            family = (CounterMetricFamily if grows else GaugeMetricFamily)(
                f"nanochat_replica_{name}", f"{text}, per replica", labels=["replica"]
            )
            for replica in self._replicas:
                if isinstance(replica.get(name), (int, float)):
                    family.add_metric([str(replica.get("replica", ""))], replica[name])
            yield family

    def text(self, replicas: list[dict[str, Any]]) -> bytes:
        """All of it in Prometheus' text format.

        Args:
            replicas: as `Backend.stats` gives them.
        """
        self._replicas = replicas
        return generate_latest(self._registry)

    def counted(self, app: Application, route_of: Callable[[Scope], str]) -> Application:
        """The application, with its answers counted."""

        async def counting(scope: Scope, receive: Receive, send: Send) -> None:
            async def count(message: Message) -> None:
                if message["type"] == "http.response.start":
                    self._http.labels(route_of(scope), str(message["status"])).inc()
                await send(message)

            await app(scope, receive, count if scope["type"] == "http" else send)

        return counting


class RequestMeter:
    """The times of one request's tokens."""

    def __init__(self, metrics: Metrics, clock: Callable[[], float] = time.monotonic) -> None:
        self._metrics = metrics
        self._clock = clock
        self._began = clock()
        self._last: dict[int, float] = {}

    def update(self, index: int, update: Update) -> None:
        """A choice's news from the backend, as it arrives."""
        if isinstance(update, Waiting):
            self._metrics.requests.moved += update.state == "moved"
            self._last.pop(index, None)  # a pause for a reason is not the time of a token
        elif isinstance(update, Piece) and update.tokens:
            self._count(index, len(update.tokens))

    def _count(self, index: int, tokens: int) -> None:
        now = self._clock()
        self._metrics.generated_tokens.inc(tokens)
        if index in self._last:
            for _ in range(tokens):  # several that arrive together took the time between them
                self._metrics.token_s.observe((now - self._last[index]) / tokens)
        elif not self._last:
            self._metrics.first_token_s.observe(now - self._began)
        self._last[index] = now
