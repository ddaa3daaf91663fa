"""Print the plan of a depth or preset: shapes, batch, rates, memory, time and money. Needs neither Ray nor a GPU.

python -m jobs.plan --depth 26 --hardware 8xH100
python -m jobs.plan --depth 26 --hardware 8xH100 --workers 2:16 --trace spot.json     # on machines that come and go
"""

import argparse
from typing import Any

from nanochat_ray import cli
from nanochat_ray.errors import UsageError
from nanochat_ray.plan import Hardware, Plan, duration, find_hardware, make_plan, table
from nanochat_ray.plan.hardware import NAMES
from nanochat_ray.plan.spot import CHECKPOINT_STALL_S, NOTICED_SHARE, costs_of, read_trace
from nanochat_ray.plan.spot_printout import spot_figures, spot_table
from nanochat_ray.train.cadence import checkpoint_interval_s

SHARED = ("depth", "preset", "steps", "seed", "plan-only", "workers", "spot-price", "on-demand-price")
OVERRIDES: dict[str, dict[str, Any]] = {
    "vocab-size": {"type": int, "help": "tokens in the vocabulary, special tokens included"},
    "sequence-len": {"type": int, "help": "context length T in tokens"},
    "head-size": {"type": int, "help": "channels per attention head"},
    "kv-heads": {"type": int, "help": "key/value heads; a divisor of the heads"},
    "window-pattern": {"help": "attention windows tiled over layers: S quarter, L full"},
    "micro-batch-rows": {"type": int, "help": "rows m that one worker runs at once"},
    "batch-tokens": {"type": int, "help": "tokens B per optimizer step"},
    "tokens": {"type": int, "help": "horizon in tokens"},
    "flops": {"type": float, "help": "horizon in training FLOPs"},
    "ratio": {"type": float, "help": "horizon in tokens per scaling parameter"},
}


def build_parser() -> argparse.ArgumentParser:
    parser = cli.build_parser("jobs.plan", __doc__, SHARED)
    parser.add_argument("--hardware", help=f"adds memory, time and money there: {NAMES}")
    parser.add_argument(
        "--trace", help='spot machines to foretell: {"metadata": {"gap_seconds": 300}, "data": [4, 3, …]}'
    )
    for flag, options in OVERRIDES.items():
        parser.add_argument(f"--{flag}", **options)
    return parser


def main(args: argparse.Namespace) -> dict[str, Any]:
    hardware = find_hardware(args.hardware) if args.hardware else None
    overrides = {name: getattr(args, name) for name in ("steps", *(flag.replace("-", "_") for flag in OVERRIDES))}
    plan = make_plan(args.depth, args.preset, seed=args.seed, hardware=hardware, **overrides)
    print(table(plan, hardware))
    spot = {"spot": _spot(args, plan, hardware)} if args.trace else {}
    return {"artifacts": {}, "plan": {**plan.to_dict(), **spot}}


def _spot(args: argparse.Namespace, plan: Plan, hardware: Hardware | None) -> dict[str, Any]:
    """Print how the plan would go on the machines of a trace, and return the figures."""
    if hardware is None:
        raise UsageError("--trace needs --hardware: what one of its machines is, for example 8xH100")
    trace, workers = read_trace(args.trace).with_workers(hardware.workers), cli.parse_workers(args.workers)
    between_losses_s = trace.at_most(workers[1]).mean_time_between_losses_s(workers[0])
    interval_s = checkpoint_interval_s(CHECKPOINT_STALL_S, between_losses_s / (1 - NOTICED_SHARE))
    costs = costs_of(plan.model.weight_bytes() + plan.model.optimizer_bytes(), interval_s)
    figures = spot_figures(plan, hardware, trace, workers, costs, args.spot_price, args.on_demand_price)
    source = f"a number every {trace.gap_s:g} s for {duration(trace.seconds)}, then from the beginning"
    print(spot_table(f"\non spot machines as in {args.trace} ({source})", figures))
    return figures


if __name__ == "__main__":
    raise SystemExit(cli.run(main, build_parser()))
