"""Evaluate a run's base model: bits per byte on training and validation text, and continuations of held-out openings.

python -m jobs.base_eval --run d20 --corpus fineweb-edu
"""

import argparse
from typing import Any

from nanochat_ray import cli
from nanochat_ray.storage import data_folder, run_folder

SAMPLES, OPENING_TOKENS, SAMPLE_TOKENS = 4, 16, 48


def build_parser() -> argparse.ArgumentParser:
    return cli.build_parser("jobs.base_eval", __doc__, ["run", "storage", "corpus", "shards", "dtype", "eval-tokens"])


def main(args: argparse.Namespace) -> dict[str, Any]:
    from itertools import islice

    from nanochat_ray.data.corpus import open_corpus
    from nanochat_ray.device import pick_device, pick_dtype
    from nanochat_ray.eval.bpb import evaluate_bpb
    from nanochat_ray.stream.rows import PretrainingRows, one_epoch
    from nanochat_ray.tokenizer import Tokenizer
    from nanochat_ray.train.checkpoint import load_model

    run = run_folder(args.storage, args.run)
    device, _ = pick_device()
    dtype, _ = pick_dtype(device, args.dtype)
    tokenizer = Tokenizer.load(run / "tokenizer")
    model, plan, step = load_model(run / "base", tokenizer.fingerprint, device, dtype)
    corpus = open_corpus(args.corpus, data_folder(args.storage), args.shards)
    source = PretrainingRows(tokenizer, plan.model.sequence_len)
    row_tokens = plan.micro_batch_rows * plan.model.sequence_len
    count = max(1, (args.eval_tokens or 2**16) // row_tokens)

    def bits_per_byte(units: Any) -> float:
        once = one_epoch(source, units, plan.micro_batch_rows, plan.seed)
        losses = lambda inputs, targets: model(inputs, targets, reduction="none")  # noqa: E731
        return evaluate_bpb(losses, islice(once, count), tokenizer.token_bytes(), device)

    samples = []
    for batch in islice(one_epoch(source, corpus.validation, 1, plan.seed), SAMPLES):
        opening = batch.tokens_MT[0, :OPENING_TOKENS].tolist()
        continuation = list(model.generate(opening, SAMPLE_TOKENS, temperature=0.0))
        samples.append({"prompt": tokenizer.decode(opening[1:]), "text": tokenizer.decode(continuation)})

    result = {
        "step": step,
        "train_bpb": bits_per_byte(corpus.train),
        "val_bpb": bits_per_byte(corpus.validation),
        "tokens_per_split": count * row_tokens,
        "samples": samples,
    }
    (run / "base").write_json("base_eval.json", result)
    print(f"step {step}: train {result['train_bpb']:.4f}, validation {result['val_bpb']:.4f} bits per byte")
    for sample in samples:
        print(f"  {sample['prompt']!r} → {sample['text']!r}")
    return {**result, "artifacts": {"base_eval": str(run / "base" / "base_eval.json")}}


if __name__ == "__main__":
    raise SystemExit(cli.run(main, build_parser()))
