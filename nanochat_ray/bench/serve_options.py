"""The flags of `jobs.bench serve`: what to measure."""

import argparse
from dataclasses import dataclass

from nanochat_ray import cli
from nanochat_ray.errors import UsageError

SCENARIOS = {
    "speed": "tokens/s, waiting, second turns and overhead at several numbers of chats",
    "mixed": "requests of all kinds at random times, --rate a second",
    "check": "the same requests one by one and at once: the replies must be equal",
    "scale": "load that brings replicas (--replicas MIN:MAX), and its end",
    "failover": "a replica is killed while it writes",
    "soak": "--minutes of requests of all kinds, broken off and bad ones, too: what grows, leaks or fails",
}
ON_OUR_OWN = ("scale", "failover")  # they start the server their own way, and kill its processes


@dataclass(frozen=True)
class ServeSettings:
    """What to measure.

    url               of a server that runs already; None: one is started
    run               whose chat model to serve; None: an untrained one
    streams           numbers of chats at once, ascending
    seconds           per number of chats, at least one round
    prompt_tokens     of a chat's question; about so many, the server counts
    new_tokens        of a reply
    history_tokens    of the first turn whose second one is measured, where the context has room for it
    repeats           of what has no duration
    """

    scenario: str
    url: str | None
    storage: str
    run: str | None
    dtype: str | None
    streams: tuple[int, ...]
    seconds: float
    minutes: float
    rate: float
    replicas: tuple[int, int]
    prompt_tokens: int
    new_tokens: int
    history_tokens: int
    repeats: int

    @staticmethod
    def of(args: argparse.Namespace) -> "ServeSettings":
        """Raises:
        UsageError: flags that contradict each other or are out of range.
        """
        if args.url and (args.run or args.scenario in ON_OUR_OWN):
            other = "--run" if args.run else f"--scenario {args.scenario}"
            raise UsageError(f"--url measures a server that runs already; it does not go with {other}")
        if args.seconds <= 0 or args.rate <= 0 or args.minutes <= 0:
            raise UsageError("--seconds, --minutes and --rate must be more than 0")
        replicas = args.replicas or {"scale": "1:3", "failover": "2"}.get(args.scenario, "1")
        quick = args.quick
        return ServeSettings(
            scenario=args.scenario,
            url=args.url,
            storage=args.storage,
            run=args.run,
            dtype=args.dtype,
            streams=_streams(args.streams or ("1,4" if quick else "1,4,16,32")) + ((64,) if args.full else ()),
            seconds=min(args.seconds, 1.0) if quick else args.seconds,
            minutes=args.minutes,
            rate=args.rate,
            replicas=_replicas(replicas),
            prompt_tokens=32 if quick else 64,
            new_tokens=16 if quick else 128,
            history_tokens=200 if quick else 1000,
            repeats=2 if quick else 5,
        )


def _streams(text: str) -> tuple[int, ...]:
    try:
        streams = tuple(sorted({int(number) for number in text.split(",")}))
    except ValueError:
        streams = (0,)
    if streams[0] < 1:
        raise UsageError(f"--streams {text!r} must be numbers of chats, for example 1,4,16")
    return streams


def _replicas(text: str) -> tuple[int, int]:
    try:
        return cli.parse_workers(text)
    except UsageError as error:
        raise UsageError(str(error).replace("--workers", "--replicas")) from None


def add_serve_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("serve", "; ".join(f"{name}: {what}" for name, what in SCENARIOS.items()))
    group.add_argument("--scenario", choices=SCENARIOS, default="speed", help="what to do to the server")
    group.add_argument("--url", default=None, help="an OpenAI-compatible server that runs already")
    group.add_argument(
        "--run", default=None, help="serve this run's chat model; with `decode`: what rounding costs its base model"
    )
    group.add_argument("--streams", default=None, help="numbers of chats at once, for example 1,4,16,32")
    group.add_argument("--full", action="store_true", help="64 chats at once, too")
    group.add_argument("--seconds", type=float, default=10.0, help="per number of chats; length of `mixed`")
    group.add_argument("--rate", type=float, default=1.0, help="requests per second of `mixed`")
    group.add_argument("--replicas", default=None, help="of the server: N or MIN:MAX")
