"""Pretrain the base model of a run on its corpus. Run the same command again to continue.

python -m jobs.pretrain --run d20 --depth 20 --corpus fineweb-edu --workers 2:16
python -m jobs.pretrain --run imported --corpus fineweb-edu --steps 1000

A base model that was imported is trained on from its weights, with a fresh optimizer, from the start of the corpus; its
shape is its own, so --depth, --preset and --sequence-len are left out, and --fresh begins with the imported weights.
"""

import argparse
from typing import Any

from nanochat_ray import cli
from nanochat_ray.plan import make_plan, plan_for, table
from nanochat_ray.storage import data_folder, run_folder
from nanochat_ray.train.origin import Origin


def build_parser() -> argparse.ArgumentParser:
    parser = cli.build_parser("jobs.pretrain", __doc__, [*cli.TRAINING_FLAGS, "corpus", "shards", "depth", "preset"])
    parser.add_argument("--sequence-len", type=int, default=None, help="context length T (default: from the plan)")
    parser.add_argument("--batch-tokens", type=int, default=None, help="tokens of the global batch (default: plan)")
    parser.add_argument("--micro-batch-rows", type=int, default=None, help="rows of a micro-batch (default: plan)")
    return parser


def main(args: argparse.Namespace) -> dict[str, Any]:
    workers = cli.parse_workers(args.workers)
    run = run_folder(args.storage, args.run)
    base = run / "base"
    origin = Origin.of(base)
    shape = {"depth": args.depth, "preset": args.preset, "sequence_len": args.sequence_len}
    numbers = {
        "batch_tokens": args.batch_tokens,
        "micro_batch_rows": args.micro_batch_rows,
        "steps": args.steps,
        "seed": args.seed,
    }
    if origin is None:
        plan = make_plan(**shape, vocab_size=_vocab_size(run / "tokenizer"), **numbers)
    else:
        origin.require_free_shape(**shape)
        plan = plan_for(origin.model, **numbers)
    print(table(plan))
    if args.plan_only:
        return {"plan": plan.to_dict()}

    from nanochat_ray.cluster import connect
    from nanochat_ray.data.corpus import open_corpus
    from nanochat_ray.stream import ray_stream
    from nanochat_ray.stream.rows import PretrainingRows
    from nanochat_ray.tokenizer import Tokenizer
    from nanochat_ray.train.checkpoint import imported_digest
    from nanochat_ray.train.job import TrainingJob, training_figures
    from nanochat_ray.train.lease import Lease
    from nanochat_ray.train.ray_trainer import run_training

    run.require_writable()
    tokenizer = Tokenizer.load(run / "tokenizer")
    corpus = open_corpus(args.corpus, data_folder(args.storage), args.shards)
    with Lease.acquire(base) as lease, connect(args.address, workers[1], ray_stream.load) as cluster:
        job = TrainingJob.from_flags(
            args,
            stage=base,
            plan=plan,
            tokenizer=tokenizer,
            source=PretrainingRows(tokenizer, plan.model.sequence_len),
            train_units=corpus.train,
            validation_units=corpus.validation,
            corpus_fingerprint=corpus.fingerprint,
            initial_model=base if origin else None,
            initial_digest=imported_digest(base) if origin else None,
            fence=lease.fence,
        )
        print(f"{cluster.describe()}; corpus {corpus.name}: {len(corpus.train):,} units")
        unchanged = not run_training(job, cluster, workers, args.fresh)
    return {**training_figures(base), "unchanged": unchanged, "artifacts": {"base": str(base)}}


def _vocab_size(tokenizer: Any) -> int | None:
    """The vocabulary of the run's tokenizer; None before there is one, and then the plan's rule holds."""
    return tokenizer.read_json("tokenizer.json")["vocab_size"] if tokenizer.exists("tokenizer.json") else None


if __name__ == "__main__":
    raise SystemExit(cli.run(main, build_parser()))
