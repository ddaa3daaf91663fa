"""Train the tokenizer of a run on the training shards of its corpus. A tokenizer that is there already is kept.

python -m jobs.tokenizer --run d20 --preset d20 --corpus fineweb-edu
"""

import argparse
import math
import os
import time
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from nanochat_ray import cli
from nanochat_ray.data.corpus import Corpus, open_corpus, read_unit
from nanochat_ray.data.download import PUBLIC_SETS
from nanochat_ray.errors import UsageError, UserError
from nanochat_ray.plan import make_plan
from nanochat_ray.plan.shape import STANDARD_VOCAB_SIZE
from nanochat_ray.storage import Folder, data_folder, run_folder
from nanochat_ray.tokenizer import Tokenizer, check_vocab_size, train_tokenizer

DOCUMENT_CHARS = 10_000  # only the start of a document trains, so that a few long books do not decide the merges
SHARD_CHARS = (
    250_000_000  # characters in one shard of the public sets, about; no more of them are fetched than are read
)
VALIDATION_CHARS = 10_000_000  # enough for three digits of bytes per token
PROGRESS_CHARS = 100_000_000


def build_parser() -> argparse.ArgumentParser:
    flags = ["run", "storage", "corpus", "shards", "depth", "preset", "fresh"]
    parser = cli.build_parser("jobs.tokenizer", __doc__, flags)
    parser.add_argument("--vocab-size", type=int, help="ids, special tokens included (default: from the plan)")
    parser.add_argument("--max-chars", type=float, default=2e9, help="stop reading after so many characters")
    return parser


def main(args: argparse.Namespace) -> dict[str, Any]:
    if args.max_chars < 1:
        raise UsageError(f"--max-chars {args.max_chars:g} must be at least 1")
    vocab_size = _vocab_size(args)
    check_vocab_size(vocab_size)
    run = run_folder(args.storage, args.run)
    run.require_writable()
    corpus = open_corpus(args.corpus, data_folder(args.storage), _shards(args))
    settings = {
        "corpus": corpus.name,
        "corpus_fingerprint": corpus.fingerprint,
        "vocab_size": vocab_size,
        "max_chars": int(args.max_chars),
        "document_chars": DOCUMENT_CHARS,
    }
    folder = run / "tokenizer"
    kept = folder.exists("tokenizer.json") and not args.fresh
    if kept:
        tokenizer = _keep(folder, settings)
        print(f"{folder} holds this tokenizer already; --fresh trains it anew")
    else:
        tokenizer = _train(corpus, settings)
        folder.delete()
        tokenizer.save(folder)
    training = tokenizer.training
    print(
        f"tokenizer of {tokenizer.vocab_size:,} tokens from {training['chars']:,} characters of {corpus.name} "
        f"in {training['seconds']:.1f} s: {training['bytes_per_token']:.2f} bytes per token on the validation split"
    )
    print(f"saved in {folder}")
    figures = {name: training[name] for name in ("documents", "chars", "seconds", "bytes_per_token")}
    return {
        "vocab_size": tokenizer.vocab_size,
        "fingerprint": tokenizer.fingerprint,
        "unchanged": kept,
        **figures,
        "artifacts": {"tokenizer": str(folder)},
    }


def _train(corpus: Corpus, settings: dict[str, Any]) -> Tokenizer:
    read = {"documents": 0, "chars": 0}
    started = time.monotonic()
    texts = _training_texts(corpus, settings["max_chars"], read)
    tokenizer = train_tokenizer(texts, settings["vocab_size"])
    seconds = round(time.monotonic() - started, 2)
    measured = {"seconds": seconds, "bytes_per_token": _bytes_per_token(tokenizer, corpus)}
    return replace(tokenizer, training={**settings, **read, **measured})


def _training_texts(corpus: Corpus, max_chars: int, read: dict[str, int]) -> Iterator[str]:
    """Document starts in corpus order, at most `max_chars` characters of them; counts into `read` as it goes."""
    for unit in corpus.train:
        for document in read_unit(unit):
            text = document[: min(DOCUMENT_CHARS, max_chars - read["chars"])]
            read["documents"] += 1
            if (read["chars"] + len(text)) // PROGRESS_CHARS > read["chars"] // PROGRESS_CHARS:
                print(f"read {(read['chars'] + len(text)) / 1e6:,.0f} of at most {max_chars / 1e6:,.0f} M characters")
            read["chars"] += len(text)
            yield text
            if read["chars"] >= max_chars:
                return


def _bytes_per_token(tokenizer: Tokenizer, corpus: Corpus) -> float:
    size = tokens = chars = 0
    for unit in corpus.validation:
        documents = read_unit(unit)
        size += sum(len(document.encode()) for document in documents)
        tokens += sum(len(ids) for ids in tokenizer.encode_batch(documents, threads=min(4, os.cpu_count() or 1)))
        chars += sum(len(document) for document in documents)
        if chars >= VALIDATION_CHARS:
            break
    return round(size / max(tokens, 1), 4)


def _keep(folder: Folder, settings: dict[str, Any]) -> Tokenizer:
    tokenizer = Tokenizer.load(folder)
    before = tokenizer.training
    changed = [
        f"{name}: {before.get(name)} → {settings[name]}" for name in settings if before.get(name) != settings[name]
    ]
    if changed:
        raise UserError(
            f"{folder} was trained with other settings ({'; '.join(changed)}); choose another --run, or replace it "
            "with --fresh (models of this run then need training anew)"
        )
    return tokenizer


def _vocab_size(args: argparse.Namespace) -> int:
    if args.vocab_size is not None:
        return args.vocab_size
    if args.depth is None and args.preset is None:
        return STANDARD_VOCAB_SIZE
    return make_plan(args.depth, args.preset).model.vocab_size


def _shards(args: argparse.Namespace) -> int | None:
    if args.shards is None and args.corpus in PUBLIC_SETS:
        return math.ceil(args.max_chars / SHARD_CHARS)
    return args.shards


if __name__ == "__main__":
    raise SystemExit(cli.run(main, build_parser()))
