"""The chat server as its users meet it, over HTTP, each figure beside the bare engine's or its goal.

What is done to it is in `serve_speed` (speed, mixed, check) and `serve_trials` (scale, failover, soak); this module
makes the model, starts the server, and measures the engine without one before and after.
"""

import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from nanochat_ray.bench.bare_engine import BareSpeed, bare_speeds
from nanochat_ray.bench.load_report import report_lines
from nanochat_ray.bench.measurement import Line, Watch, in_fresh_process
from nanochat_ray.bench.serve_options import ServeSettings
from nanochat_ray.bench.serve_speed import (
    beside_bare,
    check_lines,
    measure_check,
    measure_mixed,
    measure_speed,
    speed_lines,
)
from nanochat_ray.bench.serve_trials import (
    failover_lines,
    measure_failover,
    measure_scale,
    measure_soak,
    scale_lines,
    soak_lines,
)
from nanochat_ray.bench.served import ChatServer, save_untrained, started
from nanochat_ray.bench.sizes import FULL, QUICK, Sizes
from nanochat_ray.plan import Plan
from nanochat_ray.tokenizer import Tokenizer

Figures = dict[str, Any]
BENCH_RUN = "bench"
BARE_REPEATS = 2  # before and again after
SERVED: Sizes = FULL | {"depth": 12, "sequence_len": 2048}
SERVED_QUICK: Sizes = QUICK | {"sequence_len": 512}
MEASURE: dict[str, Callable[[ChatServer, ServeSettings], Figures]] = {
    "speed": measure_speed,
    "mixed": measure_mixed,
    "check": measure_check,
    "scale": measure_scale,
    "failover": measure_failover,
    "soak": measure_soak,
}
LINES: dict[str, Callable[[Figures], list[Line]]] = {
    "speed": speed_lines,
    "mixed": report_lines,
    "check": check_lines,
    "scale": scale_lines,
    "failover": failover_lines,
    "soak": soak_lines,
}


def measure_serving(settings: ServeSettings, model: tuple[Plan, Tokenizer] | None) -> Figures:
    """Figures of one scenario; JSON-able.

    Args:
        model: what to serve with its initial weights; None where the settings name a run or a URL.

    Raises:
        UserError: the server does not start, or does not answer a plain request.
    """
    with Watch() as watch, _run_to_serve(settings, model) as place:
        bare = _bare(settings, place)
        with _server(settings, place) as server:
            figures = MEASURE[settings.scenario](server, settings)
        if settings.scenario == "speed":
            bare += _bare(settings, place)  # again: a machine that changes its speed is noticed
            figures = beside_bare(figures, bare)
    return {"scenario": settings.scenario, "url": settings.url, **figures, "machine": watch.to_dict()}


def serving_lines(figures: Figures) -> list[Line]:
    """The figures of `measure_serving` for people."""
    return LINES[figures["scenario"]](figures)


@contextmanager
def _run_to_serve(settings: ServeSettings, model: tuple[Plan, Tokenizer] | None) -> Iterator[tuple[str, str] | None]:
    """Storage and run of the chat model; None where a server has it already."""
    if model is None:
        yield None if settings.url or settings.run is None else (settings.storage, settings.run)
        return
    with tempfile.TemporaryDirectory() as storage:
        save_untrained(storage, BENCH_RUN, *model)
        yield storage, BENCH_RUN


def _bare(settings: ServeSettings, place: tuple[str, str] | None) -> list[dict[int, BareSpeed]]:
    if place is None or settings.scenario != "speed":
        return []
    streams = sorted({1, *settings.streams})
    lengths = (settings.prompt_tokens, settings.new_tokens)
    return [in_fresh_process(bare_speeds, *place, settings.dtype, streams, *lengths, BARE_REPEATS)]


@contextmanager
def _server(settings: ServeSettings, place: tuple[str, str] | None) -> Iterator[ChatServer]:
    if place is None:
        assert settings.url is not None
        yield ChatServer(settings.url)
        return
    low, high = settings.replicas
    flags = ["--replicas", f"{low}:{high}"] if high > 1 else []
    flags += ["--dtype", settings.dtype] if settings.dtype else []
    with started(*place, flags) as server:
        yield server
