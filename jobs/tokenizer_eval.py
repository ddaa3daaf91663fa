"""Measure the tokenizer of a run: compression of kinds of text beside GPT-2's and GPT-4's, speed, exactness.

python -m jobs.tokenizer_eval --run d20 --corpus fineweb-edu
"""

import argparse
import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import tiktoken

from nanochat_ray import cli
from nanochat_ray.data.corpus import Unit, open_corpus, read_unit
from nanochat_ray.errors import UserError
from nanochat_ray.reference_encodings import REFERENCE_FILES, reference_encoding
from nanochat_ray.storage import data_folder, run_folder
from nanochat_ray.tokenizer import Tokenizer
from nanochat_ray.tokenizer_samples import SAMPLES

CORPUS_CHARS = 5_000_000  # of each split
REPEATS = 3
THREADS = (1, 2)


def build_parser() -> argparse.ArgumentParser:
    return cli.build_parser("jobs.tokenizer_eval", __doc__, ["run", "storage", "corpus"])


def main(args: argparse.Namespace) -> dict[str, Any]:
    folder = run_folder(args.storage, args.run) / "tokenizer"
    tokenizer = Tokenizer.load(folder)
    corpus = open_corpus(args.corpus, data_folder(args.storage), shards=1)  # validation is the same for any
    validation = _first_texts(corpus.validation)
    texts = {f"{corpus.name} (training)": _first_texts(corpus.train), f"{corpus.name} (validation)": validation}
    texts |= {name: [text] for name, text in SAMPLES.items()}
    references = {name: reference_encoding(name) for name in REFERENCE_FILES}

    figures = {
        "vocab_size": tokenizer.vocab_size,
        "references": {name: encoding.n_vocab if encoding else None for name, encoding in references.items()},
        "rows": _rows(texts, tokenizer, references),
        **_speeds(tokenizer, validation),
        "round_trip": _round_trips(tokenizer, texts),
    }
    folder.write_json("eval.json", figures)
    _print_table(figures)
    print(f"saved in {folder / 'eval.json'}")
    return {**figures, "artifacts": {"tokenizer_eval": str(folder / "eval.json")}}


def _first_texts(units: Sequence[Unit]) -> list[str]:
    texts: list[str] = []
    chars = 0
    for unit in units:
        for document in read_unit(unit):
            texts.append(document)
            chars += len(document)
            if chars >= CORPUS_CHARS:
                return texts
    return texts


def _rows(
    texts: dict[str, list[str]], tokenizer: Tokenizer, references: dict[str, tiktoken.Encoding | None]
) -> list[dict[str, Any]]:
    """One row per text and encoding; a reference that is not available has none."""
    encoders: dict[str, Callable[[str], list[int]]] = {"ours": tokenizer.encode}
    encoders |= {name: encoding.encode_ordinary for name, encoding in references.items() if encoding}
    rows = []
    for text, documents in texts.items():
        size = sum(len(document.encode()) for document in documents)
        for name, encode in encoders.items():
            tokens = sum(len(encode(document)) for document in documents)
            row = {"text": text, "encoding": name, "bytes": size, "tokens": tokens}
            rows.append({**row, "bytes_per_token": round(size / max(tokens, 1), 3)})
    return rows


def _speeds(tokenizer: Tokenizer, documents: list[str]) -> dict[str, Any]:
    """Medians in MB/s of UTF-8 over the validation text; encoding per number of threads."""
    megabytes = sum(len(document.encode()) for document in documents) / 1e6
    ids = tokenizer.encode_batch(documents)

    def speed(work: Callable[[], Any]) -> float:
        seconds = []
        for _ in range(REPEATS):
            started = time.perf_counter()
            work()
            seconds.append(time.perf_counter() - started)
        return round(megabytes / statistics.median(seconds), 2)

    return {
        "encode_mb_per_s": {
            str(count): speed(partial(tokenizer.encode_batch, documents, threads=count)) for count in THREADS
        },
        "decode_mb_per_s": speed(lambda: [tokenizer.decode(document) for document in ids]),
    }


def _round_trips(tokenizer: Tokenizer, texts: dict[str, list[str]]) -> bool:
    for name, documents in texts.items():
        for number, document in enumerate(documents):
            if tokenizer.decode(tokenizer.encode(document)) != document:
                raise UserError(
                    f"{name}, document {number}: decoding does not give the text back; train a new tokenizer"
                )
    return True


def _print_table(figures: dict[str, Any]) -> None:
    columns = {"ours": figures["vocab_size"], **figures["references"]}
    found = {(row["text"], row["encoding"]): row["bytes_per_token"] for row in figures["rows"]}
    print(f"bytes per token (more is better){'':<2}" + "".join(f"{name:>14}" for name in columns))
    print(f"{'vocabulary':<34}" + "".join(f"{size:>14,}" if size else f"{'—':>14}" for size in columns.values()))
    for text in dict.fromkeys(row["text"] for row in figures["rows"]):
        cells = (f"{found[text, name]:>14.2f}" if (text, name) in found else f"{'—':>14}" for name in columns)
        print(f"{text:<34}" + "".join(cells))
    for name, size in figures["references"].items():
        if size is None:
            print(f"{name}: not available offline (its files are not in tiktoken's cache, $TIKTOKEN_CACHE_DIR)")
    encode = ", ".join(f"{speed} with {threads} thread(s)" for threads, speed in figures["encode_mb_per_s"].items())
    print(f"MB/s: encode {encode}; decode {figures['decode_mb_per_s']}")
    print("round trip: exact on every text")


if __name__ == "__main__":
    raise SystemExit(cli.run(main, build_parser()))
