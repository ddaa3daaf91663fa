"""Measure a part of the system on this machine, each figure beside its limit or its peer.

python -m jobs.bench train --corpus fineweb-edu --json
python -m jobs.bench kernels --json                                       # each of our kernels beside torch's
python -m jobs.bench decode --dtype int8                                  # writing replies, beside plain torch
python -m jobs.bench decode --run demo                                    # what bf16 and int8 cost a trained model
python -m jobs.bench recovery                                             # machines that go and come, simulated here
python -m jobs.bench spot --trace trace.json --speedup 10 --minutes 10    # a real spot trace on simulated machines
python -m jobs.bench serve --streams 1,4,16,32                            # the chat server over HTTP
python -m jobs.bench eval --bundle public                                 # questions of CORE per second
"""

import argparse
from typing import Any

from nanochat_ray import cli
from nanochat_ray.bench.catalogue import BENCHMARKS
from nanochat_ray.bench.serve_options import add_serve_options

SIZES = {
    "sequence-len": "tokens of a row", "vocab-size": "token ids", "micro-batch-rows": "rows of a micro-batch",
    "steps": "training steps per run", "megabytes": "text to load",
}  # fmt: skip
SHARED = ("corpus", "shards", "storage", "bench-dtype", "kernels", "compile", "depth", "bundle", "max-per-task")


def build_parser() -> argparse.ArgumentParser:
    parser = cli.build_parser("jobs.bench", __doc__, SHARED)
    parser.add_argument("what", choices=sorted(BENCHMARKS), help="what to measure")
    parser.add_argument("--quick", action="store_true", help="small sizes: shows that it works, its figures say little")
    for name, what in SIZES.items():
        parser.add_argument(f"--{name}", type=int, help=f"{what} (default: by what is measured)")
    parser.add_argument("--trace", default=None, help="of `spot`: JSON file of how many machines there were")
    parser.add_argument("--speedup", type=float, default=10.0, help="seconds of the trace per second of `spot`")
    parser.add_argument("--minutes", type=float, default=10.0, help="length of `spot` and of serving's soak")
    add_serve_options(parser)
    return parser


def main(args: argparse.Namespace) -> dict[str, Any]:
    from nanochat_ray.bench.measurement import print_table

    title, figures, lines = BENCHMARKS[args.what](args)
    print_table(title, lines(figures), figures["machine"])
    return {"benchmark": args.what, "quick": args.quick, **figures, "artifacts": {}}


if __name__ == "__main__":
    raise SystemExit(cli.run(main, build_parser()))
