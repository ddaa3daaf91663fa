"""Serve a run's chat model: an OpenAI-shaped API and a chat page on this machine. Ctrl-C or SIGTERM stops it.

    python -m jobs.serve --run demo --port 8000
    curl localhost:8000/v1/chat/completions -H 'Content-Type: application/json' \
         -d '{"messages": [{"role": "user", "content": "What is 17 * 23?"}]}'
"""

import argparse
import json
from typing import Any

from nanochat_ray import cli


def build_parser() -> argparse.ArgumentParser:
    parser = cli.build_parser("jobs.serve", __doc__, ["run", "storage", "port", "address"])
    parser.add_argument("--stage", choices=("sft", "base"), default="sft", help="which of the run's models to serve")
    devices = ("cuda", "mps", "cpu")
    parser.add_argument("--device", choices=devices, default=None, help="default: the best that there is")
    parser.add_argument("--dtype", choices=("bf16", "fp32"), default=None, help="default: what suits the device")
    return parser


def main(args: argparse.Namespace) -> dict[str, Any]:
    from nanochat_ray.serve.app import serve_until_interrupted

    served: dict[str, Any] = {}

    def on_ready(url: str) -> None:
        served["url"] = url
        print(json.dumps(served) if args.json else f"chat page: {url}", flush=True)

    serve_until_interrupted(
        args.storage,
        args.run,
        args.stage,
        args.port,
        args.address,
        device=args.device,
        dtype=args.dtype,
        on_ready=on_ready,
    )
    return served


if __name__ == "__main__":
    raise SystemExit(cli.run(main, build_parser()))
