"""Import a model of the public nanochat, of July 2026 or October 2025, as a run.

    python -m jobs.import_nanochat --source base_checkpoints/d20 --tokenizer tokenizer --run d20
    python -m jobs.import_nanochat --source chatsft_checkpoints/d20 --tokenizer tokenizer --run d20 --stage sft

Then, as with any run:

    python -m jobs.base_eval --run d20                     # measure it; jobs.serve and jobs.chat talk with a chat model
    python -m jobs.sft --run d20 --sft hub                 # finetune it: an imported chat model further, else the base
    python -m jobs.pretrain --run d20 --corpus fineweb-edu --steps 1000
                                                           # train on from the imported weights, with a fresh optimizer

The source needs model_NNNNNN.pt and meta_NNNNNN.json, the tokenizer tokenizer.pkl, which is read as data: nothing in it
runs. What a run holds is never overwritten; to import the same again changes nothing.
"""

import argparse
import hashlib
import json
from typing import Any

from nanochat_ray import cli
from nanochat_ray.errors import UserError
from nanochat_ray.storage import Folder, run_folder


def build_parser() -> argparse.ArgumentParser:
    parser = cli.build_parser("jobs.import_nanochat", __doc__, ["storage"])
    parser.add_argument("--source", required=True, help="folder of the checkpoint: model_NNNNNN.pt, meta_NNNNNN.json")
    parser.add_argument("--tokenizer", required=True, help="folder of its tokenizer: tokenizer.pkl, token_bytes.pt")
    parser.add_argument("--run", required=True, help="name of the run to make, or to add the stage to")
    parser.add_argument("--stage", choices=("base", "sft"), default="base", help="sft: the source is a chat model")
    parser.add_argument("--step", type=int, default=None, help="of the checkpoint (default: the newest)")
    return parser


def main(args: argparse.Namespace) -> dict[str, Any]:
    from nanochat_ray.exchange.nanochat_checkpoint import read_checkpoint
    from nanochat_ray.exchange.nanochat_tokenizer import read_tokenizer
    from nanochat_ray.exchange.stored_run import Imported, store_run
    from nanochat_ray.train.origin import Origin

    run, source = run_folder(args.storage, args.run), Folder.at(args.source)
    tokenizer = read_tokenizer(Folder.at(args.tokenizer))
    checkpoint = read_checkpoint(source, args.step)
    model = checkpoint.model
    print(
        f"{source}, step {checkpoint.step:,}: nanochat of {checkpoint.generation}, {model.n_layer} layers, "
        f"width {model.n_embd:,}, {model.n_head} heads, {model.n_kv_head} key/value heads, "
        f"context {model.sequence_len:,}, {model.count_parameters().total:,} parameters"
    )
    if model.vocab_size != tokenizer.vocab_size:
        raise UserError(
            f"{source} has a vocabulary of {model.vocab_size:,}, the tokenizer in {args.tokenizer} one of "
            f"{tokenizer.vocab_size:,}: they do not belong together"
        )
    facts = {"source": str(source), "step": checkpoint.step, "generation": checkpoint.generation}
    identity = json.dumps([checkpoint.sha256, args.stage, tokenizer.fingerprint])
    origin = Origin("nanochat checkpoint", hashlib.sha256(identity.encode()).hexdigest(), model, facts)
    written = store_run(run, args.stage, Imported(checkpoint.weights, tokenizer, origin))
    print(f"saved in {run / args.stage}" if written else f"{run / args.stage} holds this import already")
    return {
        **facts,
        "parameters": model.count_parameters().total,
        "vocab_size": model.vocab_size,
        "unchanged": not written,
        "artifacts": {"tokenizer": str(run / "tokenizer"), args.stage: str(run / args.stage)},
    }


if __name__ == "__main__":
    raise SystemExit(cli.run(main, build_parser()))
