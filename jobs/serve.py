"""Serve a run's chat model: an OpenAI-shaped API and a chat page on this machine. Ctrl-C or SIGTERM stops it.

    python -m jobs.serve --run demo --port 8000
    python -m jobs.serve --run d20 --address auto --replicas 0:8      # replicas follow the load, down to none
    python -m jobs.serve --run demo --new-key alice --api-keys keys   # a key for alice is added to the file, and shown
    curl localhost:8000/v1/chat/completions -H 'Content-Type: application/json' \\
         -d '{"messages": [{"role": "user", "content": "What is 17 * 23?"}]}'
"""

import argparse
import json
import os
from pathlib import Path
from typing import Any

from nanochat_ray import cli
from nanochat_ray.errors import UsageError


def build_parser() -> argparse.ArgumentParser:
    parser = cli.build_parser("jobs.serve", __doc__, ["run", "storage", "port", "address", "used-dtype", "kernels"])
    parser.add_argument("--stage", choices=("sft", "base"), default="sft", help="which of the run's models to serve")
    parser.add_argument("--replicas", default="1", help="copies of the model: N, or MIN:MAX to follow the load")
    parser.add_argument("--max-running", type=int, default=None, help="replies that a replica writes at the same time")
    devices = ("cuda", "mps", "cpu")
    parser.add_argument("--device", choices=devices, default=None, help="default: the best that there is")
    parser.add_argument(
        "--host", default="127.0.0.1", help="address to listen on; others than loopback need --api-keys"
    )
    parser.add_argument(
        "--allowed-hosts", nargs="+", default=[], help="names under which others than this machine reach the server"
    )
    parser.add_argument("--api-keys", default=None, help="file of hashed keys; without one nobody needs a key")
    parser.add_argument("--new-key", metavar="NAME", default=None, help="add a key to the file, print it, and exit")
    parser.add_argument("--rate", type=int, default=None, help="requests per minute of the new key")
    return parser


def main(args: argparse.Namespace) -> dict[str, Any]:
    if args.new_key is not None:
        return _add_key(args)
    if args.host not in ("127.0.0.1", "localhost") and not args.api_keys:
        raise UsageError(f"--host {args.host} lets others in; say with --api-keys who may come (see --new-key)")
    if args.max_running is not None and args.max_running < 1:
        raise UsageError(f"--max-running is {args.max_running}; it must be 1 or more")
    if not 1 <= args.port <= 65535:
        raise UsageError(f"--port is {args.port}; it must be 1 to 65535")
    low, high = cli.parse_range(args.replicas, "--replicas", least=0)
    from nanochat_ray.serve.app import Served, serve_until_interrupted

    threads = os.environ.get("OMP_NUM_THREADS", "")  # the user's; in other processes Ray sets it
    served = Served(
        storage=args.storage,
        run=args.run,
        stage=args.stage,
        device=args.device,
        dtype=args.dtype,
        kernels=args.kernels,
        threads=int(threads) if threads.isdigit() else None,
        min_replicas=low,
        max_replicas=high,
        api_keys=args.api_keys and str(Path(args.api_keys).absolute()),
        allowed_hosts=args.allowed_hosts,
        **({} if args.max_running is None else {"max_running": args.max_running}),
    )
    ready: dict[str, Any] = {}

    def on_ready(url: str) -> None:
        ready["url"] = url
        print(json.dumps(ready) if args.json else f"chat page: {url}", flush=True)

    serve_until_interrupted(served, args.host, args.port, args.address, on_ready)
    return ready


def _add_key(args: argparse.Namespace) -> dict[str, Any]:
    from nanochat_ray.serve.keys import add_key

    if not args.api_keys:
        raise UsageError("--new-key needs --api-keys FILE, the file to add it to")
    key = add_key(Path(args.api_keys), args.new_key, args.rate)
    print(f"the key of {args.new_key}, shown this once: {key}")
    return {"key": key}


if __name__ == "__main__":
    raise SystemExit(cli.run(main, build_parser()))
