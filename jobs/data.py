"""Fetch or make a corpus, check every shard, and print what it holds.

python -m jobs.data --corpus demo
python -m jobs.data --corpus fineweb-edu --shards 8 --storage s3://bucket/nanochat
python -m jobs.data --corpus ../shared/data/pretrain --json
"""

import argparse
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from nanochat_ray import cli

if TYPE_CHECKING:
    from nanochat_ray.data.corpus import Corpus, Unit


def build_parser() -> argparse.ArgumentParser:
    return cli.build_parser("jobs.data", __doc__.splitlines()[0], ["corpus", "shards", "storage"])


def main(args: argparse.Namespace) -> dict[str, Any]:
    from nanochat_ray.data.corpus import open_corpus
    from nanochat_ray.storage import data_folder

    corpus = open_corpus(args.corpus, data_folder(args.storage), args.shards)
    splits = {"train": summarize(corpus.train), "validation": summarize(corpus.validation)}
    print_table(corpus, splits)
    return {
        "corpus": corpus.name,
        "fingerprint": corpus.fingerprint,
        **splits,
        "validation_shard": corpus.validation[0].shard,
        "artifacts": {"corpus": corpus.train[0].shard.rpartition("/")[0]},
    }


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
