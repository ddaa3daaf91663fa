"""Measure data loading, training, decoding or recovery on this machine, each figure beside its limit or its peer.

python -m jobs.bench train --corpus fineweb-edu --json
python -m jobs.bench spot --trace trace.json --speedup 60 --minutes 10    # a real spot trace on simulated machines
"""

import argparse
from typing import TYPE_CHECKING, Any

from nanochat_ray import cli
from nanochat_ray.errors import UsageError
from nanochat_ray.plan import Plan, make_plan
from nanochat_ray.storage import data_folder

if TYPE_CHECKING:
    from nanochat_ray.data.corpus import Corpus
    from nanochat_ray.tokenizer import Tokenizer

FULL = {"depth": 6, "sequence_len": 512, "vocab_size": 32768, "micro_batch_rows": 4, "steps": 9, "megabytes": 60}
QUICK = {"depth": 2, "sequence_len": 128, "vocab_size": 1024, "micro_batch_rows": 4, "steps": 5, "megabytes": 2}
MICRO_BATCHES = 4  # per step; a real plan has more of them for each update
DECODE_REPEATS = {True: 2, False: 5}  # by --quick
RECOVERY_REPEATS = {True: 1, False: 10}
SPOT_MACHINES = 2  # at once; more simulated ones than cores would measure each other


def build_parser() -> argparse.ArgumentParser:
    parser = cli.build_parser("jobs.bench", __doc__, ["corpus", "shards", "storage", "dtype", "compile", "depth"])
    parser.add_argument("what", choices=["data", "train", "decode", "recovery", "spot"], help="what to measure")
    parser.add_argument("--quick", action="store_true", help="small sizes: shows that it works, its figures say little")
    sizes = {"sequence_len": "tokens of a row", "vocab_size": "token ids", "micro_batch_rows": "rows of a micro-batch"}
    sizes |= {"steps": "training steps per run", "megabytes": "text to load"}
    for name, what in sizes.items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, help=f"{what} (default: {FULL[name]})")
    parser.add_argument("--trace", default=None, help="of `spot`: JSON file of how many machines there were")
    parser.add_argument("--speedup", type=float, default=60.0, help="seconds of the trace per second of `spot`")
    parser.add_argument("--minutes", type=float, default=10.0, help="length of `spot`")
    return parser


def main(args: argparse.Namespace) -> dict[str, Any]:
    on_spot_machines = {"recovery": _recovery, "spot": _spot}
    if args.what in on_spot_machines:
        return {"benchmark": args.what, "quick": args.quick, **on_spot_machines[args.what](args), "artifacts": {}}
    sizes = {name: getattr(args, name) or value for name, value in (QUICK if args.quick else FULL).items()}
    if args.what == "decode":
        sizes["sequence_len"] *= 2  # room for a prompt of the given length and a reply
    plan = _plan(sizes)
    corpus, tokenizer = _corpus_and_tokenizer(args, sizes)
    measure = {"data": _data, "train": _train, "decode": _decode}[args.what]
    figures = measure(args, plan, corpus, tokenizer)
    return {"benchmark": args.what, "quick": args.quick, "corpus": corpus.name, **figures, "artifacts": {}}


def _plan(sizes: dict[str, int]) -> Plan:
    rows, length = sizes["micro_batch_rows"], sizes["sequence_len"]
    return make_plan(
        depth=sizes["depth"],
        vocab_size=sizes["vocab_size"],
        sequence_len=length,
        micro_batch_rows=rows,
        batch_tokens=MICRO_BATCHES * rows * length,
        steps=sizes["steps"],
    )


def _corpus_and_tokenizer(args: argparse.Namespace, sizes: dict[str, int]) -> "tuple[Corpus, Tokenizer]":
    """The first so many megabytes of the training units, and a tokenizer learned from them."""
    from dataclasses import replace

    from nanochat_ray.data.corpus import open_corpus, read_unit
    from nanochat_ray.tokenizer import train_tokenizer

    corpus = open_corpus(args.corpus, data_folder(args.storage), args.shards)
    units, size = [], 0
    for unit in corpus.train:
        if size < sizes["megabytes"] * 10**6:
            units.append(unit)
            size += unit.bytes
    print(f"corpus {corpus.name}: {len(units)} units, {size / 1e6:.1f} MB; training a tokenizer", flush=True)
    tokenizer = train_tokenizer((text for unit in units for text in read_unit(unit)), sizes["vocab_size"])
    return replace(corpus, train=tuple(units)), tokenizer


def _data(args: argparse.Namespace, plan: Plan, corpus: "Corpus", tokenizer: "Tokenizer") -> dict[str, Any]:
    from nanochat_ray.bench.data_bench import data_lines, measure_data
    from nanochat_ray.bench.measurement import print_table

    figures = measure_data(tokenizer, corpus.train, plan.model.sequence_len, plan.micro_batch_rows)
    title = f"data: T={plan.model.sequence_len}, vocabulary {tokenizer.vocab_size:,}, {figures['tokens']:,} tokens"
    print_table(title, data_lines(figures), figures["machine"])
    return figures


def _train(args: argparse.Namespace, plan: Plan, corpus: "Corpus", tokenizer: "Tokenizer") -> dict[str, Any]:
    from nanochat_ray.bench.measurement import print_table
    from nanochat_ray.bench.train_bench import measure_training, training_lines

    compiled = args.compile == "on" or (args.compile == "auto" and not args.quick)  # auto: as a long run would be
    figures = measure_training(plan, tokenizer, corpus, args.dtype, compiled)
    print_table(f"train: {_model(plan)}", training_lines(figures), figures["machine"])
    return figures


def _decode(args: argparse.Namespace, plan: Plan, corpus: "Corpus", tokenizer: "Tokenizer") -> dict[str, Any]:
    from nanochat_ray.bench.decode_bench import DecodeSettings, decode_lines, measure_decoding
    from nanochat_ray.bench.measurement import print_table

    prompt = plan.model.sequence_len // 2
    settings = DecodeSettings(prompt, new_tokens=prompt // 8, repeats=DECODE_REPEATS[args.quick])
    figures = measure_decoding(plan, tokenizer, args.dtype, settings)
    print_table(f"decode: {_model(plan)}", decode_lines(figures), figures["machine"])
    return figures


def _recovery(args: argparse.Namespace) -> dict[str, Any]:
    from nanochat_ray.bench.measurement import print_table
    from nanochat_ray.bench.recovery_bench import measure_recovery, recovery_lines

    figures = measure_recovery(args.corpus, RECOVERY_REPEATS[args.quick])
    print_table("recovery: a tiny model on two simulated machines", recovery_lines(figures), figures["machine"])
    return figures


def _spot(args: argparse.Namespace) -> dict[str, Any]:
    from nanochat_ray.bench.measurement import print_table
    from nanochat_ray.bench.spot_bench import measure_spot, spot_lines
    from nanochat_ray.plan.spot import read_trace, schedule

    if args.trace is None:
        raise UsageError(
            "bench spot needs --trace FILE: how many machines there were, for example of SkyPilot's traces"
        )
    changes = schedule(read_trace(args.trace), args.speedup, args.minutes, SPOT_MACHINES)
    figures = measure_spot(args.corpus, changes, args.minutes, SPOT_MACHINES)
    title = f"spot: {args.minutes:g} minutes of {args.trace}, {args.speedup:g} times as fast, {SPOT_MACHINES} machines"
    print_table(title, spot_lines(figures), figures["machine"])
    return figures


def _model(plan: Plan) -> str:
    shape = plan.model
    return (
        f"d{plan.depth}, width {shape.n_embd}, T={shape.sequence_len}, vocabulary {shape.vocab_size:,}, "
        f"{plan.micro_batch_rows} rows"
    )


if __name__ == "__main__":
    raise SystemExit(cli.run(main, build_parser()))
