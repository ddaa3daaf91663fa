"""Import a model of the public nanochat, of July 2026 or October 2025, or a bundle of jobs.export, as a run.

    python -m jobs.import_nanochat --source base_checkpoints/d20 --tokenizer tokenizer --run d20
    python -m jobs.import_nanochat --source chatsft_checkpoints/d20 --tokenizer tokenizer --run d20 --stage sft
    python -m jobs.import_nanochat --source BUNDLE --run d20

Then, as with any run:

    python -m jobs.base_eval --run d20                     # measure it; jobs.serve and jobs.chat talk with a chat model
    python -m jobs.sft --run d20 --sft hub                 # finetune it: an imported chat model further, else the base
    python -m jobs.pretrain --run d20 --corpus fineweb-edu --steps 1000
                                                           # train on from the imported weights, with a fresh optimizer

A checkpoint's folder needs model_NNNNNN.pt and meta_NNNNNN.json, its tokenizer's tokenizer.pkl, which is read as data:
nothing in it runs. A bundle brings its tokenizer along, and each of its files is verified. What a run holds is never
overwritten; to import the same again changes nothing.
"""

import argparse
import hashlib
import json
from typing import TYPE_CHECKING, Any

from nanochat_ray import cli
from nanochat_ray.errors import UsageError, UserError
from nanochat_ray.plan import ModelShape
from nanochat_ray.storage import Folder, run_folder

if TYPE_CHECKING:
    from nanochat_ray.exchange.stored_run import Imported


def build_parser() -> argparse.ArgumentParser:
    parser = cli.build_parser("jobs.import_nanochat", __doc__, ["storage"])
    parser.add_argument("--source", required=True, help="folder of the checkpoint, or of a bundle")
    parser.add_argument("--tokenizer", default=None, help="folder of a checkpoint's tokenizer: tokenizer.pkl")
    parser.add_argument("--run", required=True, help="name of the run to make, or to add the stage to")
    parser.add_argument("--stage", choices=("base", "sft"), default=None, help="sft: the source is a chat model")
    parser.add_argument("--step", type=int, default=None, help="of the checkpoint (default: the newest)")
    return parser


def main(args: argparse.Namespace) -> dict[str, Any]:
    from nanochat_ray.exchange.bundle import is_bundle
    from nanochat_ray.exchange.stored_run import store_run

    run, source = run_folder(args.storage, args.run), Folder.at(args.source)
    if not source.exists():
        raise UserError(f"there is nothing at {source}; check --source")
    stage, imported = (_from_bundle if is_bundle(source) else _from_checkpoint)(source, args)
    written = store_run(run, stage, imported)
    print(f"saved in {run / stage}" if written else f"{run / stage} holds this import already")
    model = imported.origin.model
    return {
        **imported.origin.facts,
        "parameters": model.count_parameters().total,
        "vocab_size": model.vocab_size,
        "unchanged": not written,
        "artifacts": {"tokenizer": str(run / "tokenizer"), stage: str(run / stage)},
    }


def _from_bundle(source: Folder, args: argparse.Namespace) -> "tuple[str, Imported]":
    from nanochat_ray.exchange.bundle import imported, read_bundle

    if args.tokenizer is not None or args.step is not None:
        raise UsageError(
            f"{source} is a bundle, which has its own tokenizer and one step: leave out --tokenizer, --step"
        )
    bundle = read_bundle(source)
    if args.stage not in (None, bundle.stage):
        raise UsageError(f"{source} is a bundle of stage {bundle.stage}: leave out --stage {args.stage}")
    print(f"{source}: bundle {bundle.digest[:16]} of stage {bundle.stage}, {_described(bundle.shape)}")
    return bundle.stage, imported(bundle, source)


def _from_checkpoint(source: Folder, args: argparse.Namespace) -> "tuple[str, Imported]":
    from nanochat_ray.exchange.nanochat_checkpoint import read_checkpoint
    from nanochat_ray.exchange.nanochat_tokenizer import read_tokenizer
    from nanochat_ray.exchange.stored_run import Imported
    from nanochat_ray.train.origin import Origin

    if args.tokenizer is None:
        raise UsageError(f"{source} is no bundle: give the folder of the checkpoint's tokenizer.pkl with --tokenizer")
    stage = args.stage or "base"
    tokenizer = read_tokenizer(Folder.at(args.tokenizer))
    checkpoint = read_checkpoint(source, args.step)
    model = checkpoint.model
    print(f"{source}, step {checkpoint.step:,}: nanochat of {checkpoint.generation}, {_described(model)}")
    if model.vocab_size != tokenizer.vocab_size:
        raise UserError(
            f"{source} has a vocabulary of {model.vocab_size:,}, the tokenizer in {args.tokenizer} one of "
            f"{tokenizer.vocab_size:,}: they do not belong together"
        )
    facts = {"source": str(source), "step": checkpoint.step, "generation": checkpoint.generation}
    identity = json.dumps([checkpoint.sha256, stage, tokenizer.fingerprint])
    origin = Origin("nanochat checkpoint", hashlib.sha256(identity.encode()).hexdigest(), model, facts)
    return stage, Imported(checkpoint.weights, tokenizer, origin)


def _described(model: ModelShape) -> str:
    return (
        f"{model.n_layer} layers, width {model.n_embd:,}, {model.n_head} heads, {model.n_kv_head} key/value heads, "
        f"context {model.sequence_len:,}, {model.count_parameters().total:,} parameters"
    )


if __name__ == "__main__":
    raise SystemExit(cli.run(main, build_parser()))
