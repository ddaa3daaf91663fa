"""Write a run's model as one self-contained folder, for Hugging Face transformers, lm-eval and jobs.import_nanochat.

    python -m jobs.export --run d20                           # its chat model, or else its base model
    python -m jobs.export --run d20 --stage base --to d20-base --dtype bfloat16

The folder holds weights, configuration, tokenizer, chat template, a model card, and bundle.json, which seals them. In
transformers 5: AutoModelForCausalLM.from_pretrained(FOLDER, trust_remote_code=True). To run the same again changes
nothing.
"""

import argparse
from typing import Any

from nanochat_ray import cli
from nanochat_ray.errors import UserError
from nanochat_ray.storage import Folder, run_folder


def build_parser() -> argparse.ArgumentParser:
    parser = cli.build_parser("jobs.export", __doc__, ["run", "storage"])
    parser.add_argument(
        "--stage", choices=("base", "sft"), default=None, help="which model (default: sft, or else base)"
    )
    parser.add_argument("--step", type=int, default=None, help="of the checkpoint (default: the newest)")
    parser.add_argument("--to", default=None, help="folder or URI (default: export/<stage>_<step> in the run's folder)")
    parser.add_argument("--fresh", action="store_true", help="replace another bundle or model in that folder")
    parser.add_argument(
        "--dtype", choices=("float32", "bfloat16"), default="float32", help="of the weights; bfloat16 rounds them"
    )
    return parser


def main(args: argparse.Namespace) -> dict[str, Any]:
    from nanochat_ray.engine.load import require_trained
    from nanochat_ray.exchange.export import export

    run = run_folder(args.storage, args.run)
    stage = args.stage or ("sft" if (run / "sft" / "checkpoints").list() else "base")
    require_trained(args.storage, args.run, stage)
    exported = export(run, stage, args.step, args.dtype)
    suffix = "" if args.dtype == "float32" else f"_{args.dtype}"
    folder = Folder.at(args.to) if args.to else run / "export" / f"{stage}_{exported.step:06d}{suffix}"
    try:
        digest, written = exported.write(folder, args.fresh)
    except OSError as error:
        raise UserError(f"{folder} cannot be written ({error}); give another folder or URI with --to") from error
    print(f"{stage} model of {args.run}, step {exported.step:,}, as {args.dtype}: bundle {digest[:16]}")
    print(f"saved in {folder}" if written else f"{folder} holds this bundle already")
    return {
        "run": args.run,
        "stage": stage,
        "step": exported.step,
        "digest": digest,
        "unchanged": not written,
        "artifacts": {"bundle": str(folder)},
    }


if __name__ == "__main__":
    raise SystemExit(cli.run(main, build_parser()))
