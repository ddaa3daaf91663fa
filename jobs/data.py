"""Fetch or make a corpus, check every shard, and print what it holds.

python -m jobs.data --corpus demo
python -m jobs.data --corpus fineweb-edu --shards 8 --storage s3://bucket/nanochat
python -m jobs.data --run d20 --corpus fineweb-edu --show-step 1234
"""

import argparse
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from nanochat_ray import cli
from nanochat_ray.errors import UsageError, UserError

if TYPE_CHECKING:
    from nanochat_ray.data.corpus import Corpus, Unit


def build_parser() -> argparse.ArgumentParser:
    parser = cli.build_parser("jobs.data", __doc__.splitlines()[0], ["corpus", "shards", "storage", "run"])
    parser.add_argument(
        "--show-step", type=int, default=None, help="print the row ids and the text of a pretraining step"
    )
    return parser


def main(args: argparse.Namespace) -> dict[str, Any]:
    from nanochat_ray.data.corpus import open_corpus
    from nanochat_ray.storage import data_folder

    corpus = open_corpus(args.corpus, data_folder(args.storage), args.shards)
    if args.show_step is not None:
        return show_step(args, corpus)
    splits = {"train": summarize(corpus.train), "validation": summarize(corpus.validation)}
    print_table(corpus, splits)
    return {
        "corpus": corpus.name,
        "fingerprint": corpus.fingerprint,
        **splits,
        "validation_shard": corpus.validation[0].shard,
        "artifacts": {"corpus": corpus.train[0].shard.rpartition("/")[0]},
    }


def show_step(args: argparse.Namespace, corpus: "Corpus") -> dict[str, Any]:
    """Print a pretraining step of a run as its plan and tokenizer make it: (epoch, unit, row) and text of every row."""
    from nanochat_ray.plan import Plan
    from nanochat_ray.storage import run_folder
    from nanochat_ray.stream.order import epoch_order
    from nanochat_ray.stream.rows import PretrainingRows, step_rows, stream_hash
    from nanochat_ray.tokenizer import Tokenizer
    from nanochat_ray.train.checkpoint import Checkpoints

    run = run_folder(args.storage, args.run)
    if not (run / "base").exists("plan.json"):
        raise UserError(f"no plan in {run / 'base'}: pretrain the run first, or name another with --run")
    plan = Plan.from_dict((run / "base").read_json("plan.json"))
    if not 0 <= args.show_step < plan.steps:
        raise UsageError(f"--show-step {args.show_step}: the plan has steps 0 to {plan.steps - 1}")
    checkpoints = Checkpoints.of(run / "base")
    for step in checkpoints.steps()[-1:]:
        if checkpoints.state(step).cursor.identity.corpus != corpus.fingerprint:
            raise UserError(f"{run / 'base'} was trained on another corpus than {corpus.name}; name it with --corpus")
    tokenizer = Tokenizer.load(run / "tokenizer")
    source = PretrainingRows(tokenizer, plan.model.sequence_len)
    batches = step_rows(source, corpus.train, plan.micro_batch_rows, plan.micro_batches, plan.seed, args.show_step)
    for batch in batches:
        for (epoch, position, row), tokens_T in zip(batch.row_ids_M3.tolist(), batch.tokens_MT, strict=True):
            unit = corpus.train[epoch_order(len(corpus.train), epoch, plan.seed)[position]]
            place = f"{unit.shard.rpartition('/')[2]} row group {unit.row_group}"
            print(f"── epoch {epoch}, unit {position} ({place}), row {row}\n{tokenizer.decode(tokens_T.tolist())}")
    digest = stream_hash(batch.digest() for batch in batches)
    print(f"step {args.show_step}: {plan.rows_per_step} rows, stream_hash {digest}")
    return {"step": args.show_step, "stream_hash": digest, "row_ids": [batch.row_ids_M3.tolist() for batch in batches]}


def summarize(units: "Sequence[Unit]") -> dict[str, int]:
    """Shards, units (row groups), documents, and bytes of uncompressed text column, in these units."""
    return {
        "shards": len({unit.shard for unit in units}),
        "units": len(units),
        "documents": sum(unit.documents for unit in units),
        "bytes": sum(unit.bytes for unit in units),
    }


def print_table(corpus: "Corpus", splits: dict[str, dict[str, int]]) -> None:
    print(f"corpus {corpus.name}, fingerprint {corpus.fingerprint}")
    print(f"{'split':<12}{'shards':>8}{'units':>9}{'documents':>13}{'bytes':>18}")
    for split, figures in splits.items():
        print(
            f"{split:<12}{figures['shards']:>8,}{figures['units']:>9,}"
            f"{figures['documents']:>13,}{figures['bytes']:>18,}"
        )
    print(f"validation shard: {corpus.validation[0].shard} (never trains)")
    print(f"training shards in {corpus.train[0].shard.rpartition('/')[0]}")


if __name__ == "__main__":
    raise SystemExit(cli.run(main, build_parser()))
