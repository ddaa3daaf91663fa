"""Finetune a run's base model on conversations. Run the same command again to continue.

python -m jobs.sft --run d20 --sft hub --workers 2:16

A chat model that was imported as the run's sft stage is finetuned further, from its own weights.
"""

import argparse
import tempfile
from contextlib import nullcontext
from typing import Any

from nanochat_ray import cli
from nanochat_ray.errors import UsageError, UserError
from nanochat_ray.plan import sft_plan, table
from nanochat_ray.storage import Folder, run_folder


def build_parser() -> argparse.ArgumentParser:
    parser = cli.build_parser("jobs.sft", __doc__, [*cli.TRAINING_FLAGS, "sft", "tasks"])
    parser.add_argument("--epochs", type=float, default=1.0, help="times the mixture is seen")
    parser.add_argument("--batch-tokens", type=int, default=None, help="tokens of the global batch (default: as base)")
    parser.add_argument("--micro-batch-rows", type=int, default=None, help="rows of a micro-batch (default: as base)")
    return parser


def main(args: argparse.Namespace) -> dict[str, Any]:
    from nanochat_ray.stream.rows import ChatRows, look_at_epoch
    from nanochat_ray.tasks.mixture import write_mixture
    from nanochat_ray.tasks.recipes import mixture_of
    from nanochat_ray.tokenizer import Tokenizer
    from nanochat_ray.train.checkpoint import Checkpoints, imported_digest
    from nanochat_ray.train.lease import Lease, clear_stage
    from nanochat_ray.train.origin import START, Origin

    workers = cli.parse_workers(args.workers)
    if args.epochs <= 0:
        raise UsageError(f"--epochs {args.epochs} must be more than 0")
    run = run_folder(args.storage, args.run)
    stage = run / "sft"
    base = stage if Origin.of(stage) else run / "base"
    base_step = START if base == stage else Checkpoints.of(base).newest_valid(cli.warn)
    if base_step is None:
        raise UserError(f"no base model in {base}: run `python -m jobs.pretrain --run {args.run}` first")
    initial_digest = imported_digest(stage) if base == stage else Checkpoints.of(base).digest(base_step)
    base_plan = Checkpoints.of(base).state(base_step).plan
    if base_step < base_plan.steps:
        raise UserError(
            f"{base} stands at step {base_step} of {base_plan.steps}: finish `python -m jobs.pretrain` first"
        )

    with nullcontext() if args.plan_only else Lease.acquire(stage) as lease:  # before the mixture is written
        tokenizer = Tokenizer.load(run / "tokenizer")
        source = ChatRows(tokenizer, base_plan.model.sequence_len)
        mixture = mixture_of(args.sft, args.tasks, args.seed)
        untouched = args.plan_only or args.fresh  # what the run holds stays as it is until everything is checked
        with tempfile.TemporaryDirectory() as scratch:
            place = Folder.at(scratch) if untouched else stage / "data"
            corpus = write_mixture(mixture, place, replace=untouched or not any(Checkpoints.of(stage).steps()))
            epoch = look_at_epoch(source, corpus.train)
        rows = int(args.epochs * epoch.rows)
        plan = sft_plan(
            base_plan,
            rows,
            batch_tokens=args.batch_tokens,
            micro_batch_rows=args.micro_batch_rows,
            steps=args.steps,
            seed=args.seed,
        )
        print(table(plan))
        if lease is None:
            return {"plan": plan.to_dict()}

        from nanochat_ray.cluster import connect
        from nanochat_ray.stream import ray_stream
        from nanochat_ray.train.job import TrainingJob, training_figures
        from nanochat_ray.train.ray_trainer import require_workers, run_training

        with connect(args.address, workers[1], ray_stream.load) as cluster:
            require_workers(cluster, workers)
            if args.fresh:
                clear_stage(stage)
                corpus = write_mixture(mixture, stage / "data")
            job = TrainingJob.from_flags(
                args,
                stage=stage,
                plan=plan,
                tokenizer=tokenizer,
                source=source,
                train_units=corpus.train,
                validation_units=corpus.validation,
                corpus_fingerprint=corpus.fingerprint,
                initial_model=base,
                initial_digest=initial_digest,
                fence=lease.fence,
            )
            filled = f"{epoch.fill:.1%} of the positions filled"
            cut = f", {epoch.cropped:.1%} of the text cut off where it is longer than a row" if epoch.cropped else ""
            print(f"{len(mixture.train):,} conversations in {epoch.rows:,} rows: {filled}{cut}")
            for name, count in mixture.counts.items():
                print(f"  {name:<16} {count['train']:>9,} conversations, {count['test']:,} held out")
            unchanged = not run_training(job, cluster, workers)
    return {**training_figures(stage), "unchanged": unchanged, "artifacts": {"sft": str(stage)}}


if __name__ == "__main__":
    raise SystemExit(cli.run(main, build_parser()))
