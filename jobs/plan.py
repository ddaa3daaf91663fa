"""Print the plan of a depth or preset: shapes, batch, rates, memory, time and money. Needs neither Ray nor a GPU.

python -m jobs.plan --depth 26 --hardware 8xH100
"""

import argparse
from typing import Any

from nanochat_ray import cli
from nanochat_ray.plan import find_hardware, make_plan, table
from nanochat_ray.plan.hardware import NAMES

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
    parser = cli.build_parser("jobs.plan", __doc__, ["depth", "preset", "steps", "seed", "plan-only"])
    parser.add_argument("--hardware", help=f"adds memory, time and money there: {NAMES}")
    for flag, options in OVERRIDES.items():
        parser.add_argument(f"--{flag}", **options)
    return parser


def main(args: argparse.Namespace) -> dict[str, Any]:
    hardware = find_hardware(args.hardware) if args.hardware else None
    overrides = {name: getattr(args, name) for name in ("steps", *(flag.replace("-", "_") for flag in OVERRIDES))}
    plan = make_plan(args.depth, args.preset, seed=args.seed, hardware=hardware, **overrides)
    print(table(plan, hardware))
    return {"artifacts": {}, "plan": plan.to_dict()}


if __name__ == "__main__":
    raise SystemExit(cli.run(main, build_parser()))
