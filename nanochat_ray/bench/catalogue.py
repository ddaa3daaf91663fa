"""What `jobs.bench` can measure: from its flags to figures, and these as lines for people.

What measures is imported when it is asked for: the job's --help needs neither torch nor Ray.
"""

import argparse
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from nanochat_ray.bench.serve_options import ServeSettings
from nanochat_ray.errors import UsageError
from nanochat_ray.storage import Folder, data_folder

if TYPE_CHECKING:
    from nanochat_ray.bench.measurement import Line
    from nanochat_ray.data.corpus import Corpus
    from nanochat_ray.plan import Plan
    from nanochat_ray.tokenizer import Tokenizer

Sizes = dict[str, int]
Figures = dict[str, Any]
Measured = tuple[str, Figures, Callable[[Figures], list["Line"]]]  # title, figures, and these as lines for people
SPOT_MACHINES = 2  # at once; more simulated ones than cores would measure each other


def _data(args: argparse.Namespace) -> Measured:
    from nanochat_ray.bench.data_bench import data_lines, measure_data

    plan, corpus, tokenizer = _text(args)
    length = plan.model.sequence_len
    figures = {"corpus": corpus.name, **measure_data(tokenizer, corpus.train, length, plan.micro_batch_rows)}
    return f"data: {plan.in_words}, {figures['tokens']:,} tokens", figures, data_lines


def _train(args: argparse.Namespace) -> Measured:
    from nanochat_ray.bench.train_bench import measure_training, training_lines

    plan, corpus, tokenizer = _text(args)
    long_run = "off" if args.quick else "on"  # how torch alone would train for hours, whose compilation pays
    compile = long_run if args.compile == "auto" and args.kernels == "off" else args.compile
    figures = {"corpus": corpus.name, **measure_training(plan, tokenizer, corpus, args.dtype, args.kernels, compile)}
    return f"train: {plan.in_words}", figures, training_lines


def _decode(args: argparse.Namespace) -> Measured:
    from nanochat_ray.bench.decode_bench import DecodeSettings, decode_lines, measure_decoding

    if args.run:
        return _quality(args)
    plan, corpus, tokenizer = _text(args, longer=2)  # room for a prompt of the given length and a reply
    prompt = plan.model.sequence_len // 2
    settings = DecodeSettings(prompt, new_tokens=prompt // 8, repeats=2 if args.quick else 5)
    figures = {"corpus": corpus.name, **measure_decoding(plan, tokenizer, args.dtype, settings)}
    return f"decode: {plan.in_words}", figures, decode_lines


def _quality(args: argparse.Namespace) -> Measured:
    from nanochat_ray.bench.decode_quality import QUICK_TOKENS, TOKENS, measure_quality, quality_lines
    from nanochat_ray.data.corpus import open_corpus

    corpus = open_corpus(args.corpus, data_folder(args.storage), args.shards)
    figures = measure_quality(args.storage, args.run, corpus, QUICK_TOKENS if args.quick else TOKENS)
    return f"decode: what rounding costs, {args.run}, step {figures['step']:,}", figures, quality_lines


def _checkpoint(args: argparse.Namespace) -> Measured:
    from nanochat_ray.bench.checkpoint_bench import checkpoint_lines, measure_checkpoints
    from nanochat_ray.bench.sizes import CHECKPOINT, QUICK, plan_of

    plan = plan_of(_sizes(args, QUICK | {"steps": 24} if args.quick else CHECKPOINT), micro_batches=1)
    figures = measure_checkpoints(plan, args.dtype, Folder.at(args.storage))
    return f"checkpoint: {plan.in_words}", figures, checkpoint_lines


def _eval(args: argparse.Namespace) -> Measured:
    from nanochat_ray.bench import eval_bench
    from nanochat_ray.eval.core_bundle import bundle_of

    tasks = bundle_of(args.bundle or "public", args.storage).asked(args.max_per_task or eval_bench.LEAST_PER_TASK)
    plan, _, tokenizer = _text(args, eval_bench.QUICK if args.quick else eval_bench.SIZES)
    return f"eval: {plan.in_words}", eval_bench.measure(plan, tokenizer, tasks, args.dtype), eval_bench.lines


def _kernels(args: argparse.Namespace) -> Measured:
    from nanochat_ray.bench.kernel_bench import kernel_lines, measure_kernels
    from nanochat_ray.bench.sizes import FULL, QUICK, plan_of

    if args.kernels == "off":
        raise UsageError("bench kernels measures our kernels; leave out --kernels off")
    plan = plan_of(_sizes(args, QUICK if args.quick else FULL))
    figures = measure_kernels(plan, args.dtype, repeats=2 if args.quick else 9)
    return f"kernels: {plan.in_words}, forward and backward", figures, kernel_lines


def _recovery(args: argparse.Namespace) -> Measured:
    from nanochat_ray.bench.recovery_bench import measure_recovery, recovery_lines

    figures = measure_recovery(args.corpus, repeats=1 if args.quick else 10)
    return "recovery: a tiny model on two simulated machines", figures, recovery_lines


def _serve(args: argparse.Namespace) -> Measured:
    from nanochat_ray.bench.serve_bench import SERVED, SERVED_QUICK, measure_serving, serving_lines

    settings = ServeSettings.of(args)
    if settings.url or settings.run:
        return f"serve: {settings.url or settings.run}", measure_serving(settings, None), serving_lines
    plan, _, tokenizer = _text(args, SERVED_QUICK if args.quick else SERVED)
    return f"serve: {plan.in_words}", measure_serving(settings, (plan, tokenizer)), serving_lines


def _spot(args: argparse.Namespace) -> Measured:
    from nanochat_ray.bench.spot_bench import measure_spot, spot_lines
    from nanochat_ray.plan.spot import read_trace, schedule

    if args.trace is None:
        raise UsageError("bench spot needs --trace FILE: how many machines there were, as SkyPilot's traces say")
    changes = schedule(read_trace(args.trace), args.speedup, args.minutes, SPOT_MACHINES)
    figures = measure_spot(args.corpus, changes, args.minutes, SPOT_MACHINES)
    return f"spot: {args.minutes:g} minutes of {args.trace}, {args.speedup:g} times as fast", figures, spot_lines


BENCHMARKS = {
    "data": _data, "train": _train, "decode": _decode, "checkpoint": _checkpoint, "eval": _eval,
    "kernels": _kernels, "recovery": _recovery, "serve": _serve, "spot": _spot,
}  # fmt: skip


def _text(args: argparse.Namespace, usual: Sizes | None = None, longer: int = 1) -> "tuple[Plan, Corpus, Tokenizer]":
    from nanochat_ray.bench.sizes import FULL, QUICK, corpus_and_tokenizer, plan_of

    sizes = _sizes(args, usual or (QUICK if args.quick else FULL))
    sizes["sequence_len"] *= longer
    return plan_of(sizes), *corpus_and_tokenizer(args.corpus, data_folder(args.storage), args.shards, sizes)


def _sizes(args: argparse.Namespace, usual: Sizes) -> Sizes:
    return {name: getattr(args, name) or size for name, size in usual.items()}
