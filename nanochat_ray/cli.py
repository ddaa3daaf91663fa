"""What every job has in common: flags that are named alike, exit codes, one-line errors, `--json`.

def main(args) -> dict: ...                       # returns the figures and artifacts worth reporting
if __name__ == "__main__":
    raise SystemExit(cli.run(main, build_parser()))
"""

import argparse
import json
import os
import sys
import traceback
from collections.abc import Callable, Sequence
from typing import Any

from nanochat_ray.errors import UsageError, UserError

DEFAULT_STORAGE = "out"

TRAINING_FLAGS = (
    "run", "storage", "workers", "steps", "seed", "address", "dtype", "kernels", "compile", "eval-every",
    "eval-tokens", "sample-tokens", "checkpoint-every", "keep-checkpoints", "fresh", "plan-only",
)  # fmt: skip


def at_least(least: int) -> Callable[[str], int]:
    """The type of a flag that is a whole number with a lower bound."""

    def integer(text: str) -> int:
        value = int(text)
        if value < least:
            raise argparse.ArgumentTypeError(f"{value} must be at least {least}")
        return value

    return integer


def _seconds(text: str) -> float:
    value = float(text)
    if not 0 <= value < float("inf"):
        raise argparse.ArgumentTypeError(f"{value:g} must be 0 or more seconds")
    return value


def _price(text: str) -> float:
    value = float(text)
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"{value:g} must be more than 0 dollars")
    return value


def _seed(text: str) -> int:
    value = int(text)
    if not 0 <= value < 2**31:  # it is mixed with epoch and unit numbers into one 64-bit seed
        raise argparse.ArgumentTypeError(f"{value} must be in [0, 2^31)")
    return value


def _trained_dtype(text: str) -> str:
    if text == "int8":
        raise argparse.ArgumentTypeError("int8 is for models that are used; train with bf16 or fp32")
    return text


_SHARED_FLAGS: dict[str, dict[str, Any]] = {
    "run": dict(default="demo", help="name of the run; re-running the same name continues it"),
    "storage": dict(default=DEFAULT_STORAGE, help="local path or pyarrow URI (s3://, gs://) that holds all artifacts"),
    "corpus": dict(default="demo", help="demo | fineweb-edu | climbmix | a folder or URI of parquet shards"),
    "shards": dict(type=at_least(1), default=None, help="take the first N training shards (plus the validation shard)"),
    "sft": dict(default="demo", help="demo | hub | a folder or file of chats with a `messages` column"),
    "tasks": dict(default=None, help="folder of GSM8K, MMLU and ARC as parquet (default: beside --sft, else none)"),
    "bundle": dict(
        default=None,
        help="CORE's questions: public (downloaded once) | none | a folder or URI that has them (default: public for a "
        "public corpus, else none)",
    ),
    "max-per-task": dict(type=at_least(1), default=None, help="questions of each task (default: all)"),
    "eval-workers": dict(
        type=at_least(1),
        default=1,
        metavar="N",
        help="processes that evaluate at most; as many work as the cluster has room for",
    ),
    "compare": dict(default=None, metavar="RUN", help="also the difference to a run that was evaluated before"),
    "watch": dict(
        action="store_true", help="evaluate each new checkpoint while the run is trained, giving way to the training"
    ),
    "depth": dict(type=int, default=None, help="the one dial: number of layers, from which all else follows"),
    "preset": dict(default=None, help="tiny | d12 | d20 | d24 | d26 | d32"),
    "workers": dict(default="1", help="training workers: N, or MIN:MAX for an elastic group"),
    "steps": dict(type=at_least(1), default=None, help="number of optimizer steps (default: from the plan)"),
    "seed": dict(type=_seed, default=42, help="seed of initialisation, data order and sampling"),
    "address": dict(default=None, help="Ray cluster to join (default: start a local one)"),
    "port": dict(type=int, default=8000, help="port of the chat page on 127.0.0.1"),
    "fresh": dict(action="store_true", help="discard what this stage of the run has done and start anew"),
    "dtype": dict(
        type=_trained_dtype,
        default=None,
        choices=["fp32", "bf16", "fp8"],
        help="activations (default: what the hardware multiplies best); fp8: the layers' products, on GPUs that can",
    ),
    "used-dtype": dict(
        name="--dtype",
        default=None,
        choices=["fp32", "bf16", "int8"],
        help="activations (default: what the hardware multiplies best); int8: matrices of eight bits, on CPUs",
    ),
    "bench-dtype": dict(
        name="--dtype",
        default=None,
        choices=["fp32", "bf16", "int8", "fp8"],
        help="activations (default: what the hardware multiplies best); int8 where a model is used, fp8 to train",
    ),
    "kernels": dict(
        default="auto", choices=["auto", "on", "off"], help="our own kernels; auto: where they are known to be faster"
    ),
    "compile": dict(
        default="auto", choices=["auto", "on", "off"], help="torch.compile; auto: when it pays within the run"
    ),
    "eval-every": dict(type=at_least(1), default=None, help="steps between evaluations (default: four per run)"),
    "eval-tokens": dict(type=at_least(1), default=None, help="tokens of one evaluation (default: 2 %% of training)"),
    "sample-tokens": dict(
        type=at_least(0), default=24, help="length of the samples written at each evaluation, 0 for none"
    ),
    "checkpoint-every": dict(
        type=_seconds,
        default=None,
        help="seconds between checkpoints, 0 for one at every step (default: from their cost and the failures seen)",
    ),
    "keep-checkpoints": dict(type=at_least(1), default=2, help="newest checkpoints to keep, besides the best one"),
    "spot-price": dict(type=_price, default=None, help="dollars per worker and hour on spot machines"),
    "on-demand-price": dict(type=_price, default=None, help="dollars per worker and hour on machines that stay"),
    "plan-only": dict(action="store_true", help="print the plan and exit; needs neither Ray nor a GPU"),
}


def build_parser(module: str, description: str | None, shared_flags: Sequence[str]) -> argparse.ArgumentParser:
    """A parser for `python -m <module>` with the named shared flags, and with `--json` and `--debug`, as all have."""
    parser = argparse.ArgumentParser(
        prog=f"python -m {module}",
        description=description,
        formatter_class=_HelpFormatter,
    )
    for flag in shared_flags:
        options = dict(_SHARED_FLAGS[flag])
        parser.add_argument(options.pop("name", f"--{flag}"), **options)
    parser.add_argument("--json", action="store_true", help="print one JSON object as the last line")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return parser


class _HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Keeps the lines of the description, which has commands to copy; tells only defaults that are values."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        if action.default is None or action.default is False or action.default == []:
            return action.help
        return super()._get_help_string(action)


def run(
    main: Callable[[argparse.Namespace], dict[str, Any]],
    parser: argparse.ArgumentParser,
    argv: Sequence[str] | None = None,
) -> int:
    """Run a job and return its exit code: 0 done, 1 failed, 2 wrong usage."""
    args = parser.parse_args(argv)
    # Before torch is imported: OpenMP threads that spin collapse as soon as another process wants a core.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    try:
        figures = main(args)
    except UsageError as error:
        return _fail(args, error, error.exit_code)
    except UserError as error:
        return _fail(args, error, error.exit_code)
    except KeyboardInterrupt as error:
        return _fail(args, error, 1, "interrupted; run the same command again to continue")
    except Exception as error:
        hint = "" if args.debug else " (this is a bug; --debug shows the traceback)"
        return _fail(args, error, 1, f"{type(error).__name__}: {_first_line(error)}{hint}")
    if args.json:
        print(json.dumps({"status": "done", **figures}), flush=True)
    return 0


def warn(message: str) -> None:
    """Tell the user what the job goes on in spite of."""
    print(f"warning: {message}", file=sys.stderr, flush=True)


def _fail(args: argparse.Namespace, error: BaseException, exit_code: int, message: str | None = None) -> int:
    message = message or str(error)
    if args.debug:
        traceback.print_exception(error)
    print(f"error: {message}", file=sys.stderr, flush=True)
    if args.json:
        print(json.dumps({"status": "failed", "error": message}), flush=True)
    return exit_code


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else "no message"


def parse_workers(text: str) -> tuple[int, int]:
    """The bounds of `--workers`; as `parse_range`."""
    return parse_range(text, "--workers", least=1)


def parse_range(text: str, flag: str, least: int) -> tuple[int, int]:
    """`"4"` → (4, 4); `"2:16"` → (2, 16).

    Raises:
        UsageError: not of these forms, or not `least` ≤ MIN ≤ MAX and 1 ≤ MAX.
    """
    low, separator, high = text.partition(":")
    try:
        bounds = (int(low), int(high) if separator else int(low))
    except ValueError:
        raise UsageError(f"{flag} {text!r} is neither N nor MIN:MAX, for example 4 or 2:16") from None
    if not least <= bounds[0] <= bounds[1] or bounds[1] < 1:
        raise UsageError(f"{flag} {text!r} must satisfy {least} <= MIN <= MAX{', and MAX at least 1' * (least < 1)}")
    return bounds
