"""Evaluate a run's base model: bits per byte, continuations of held-out openings, and CORE with its error bars.

python -m jobs.base_eval --run d20 --corpus fineweb-edu                     # everything, on this machine
python -m jobs.base_eval --run d20 --eval-workers 8 --address auto          # by as many as the cluster has room for
python -m jobs.base_eval --run d20 --max-per-task 500 --watch               # CORE of each checkpoint, beside training
python -m jobs.base_eval --run d20 --corpus fineweb-edu --compare d18       # and the difference on the same questions
python -m jobs.base_eval --hf gpt2/                                         # CORE of a model in Hugging Face's format
"""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nanochat_ray import cli
from nanochat_ray.errors import UsageError
from nanochat_ray.storage import Folder, data_folder, run_folder

if TYPE_CHECKING:
    from nanochat_ray.eval.exam import Exam
    from nanochat_ray.eval.measure import Subject


def build_parser() -> argparse.ArgumentParser:
    shared = ["run", "storage", "corpus", "shards", "used-dtype", "eval-tokens", "bundle", "max-per-task"]
    parser = cli.build_parser("jobs.base_eval", __doc__, [*shared, "eval-workers", "address", "compare", "watch"])
    parser.add_argument("--hf", default=None, metavar="PATH", help="folder of a Hugging Face model, instead of a run")
    parser.add_argument("--trust-code", action="store_true", help="let Python code that comes with --hf's model run")
    return parser


def main(args: argparse.Namespace) -> dict[str, Any]:
    from nanochat_ray.engine.load import require_trained
    from nanochat_ray.eval.core_bundle import bundle_source
    from nanochat_ray.eval.exam import RunModel
    from nanochat_ray.eval.kept import BASE_EVAL, keep
    from nanochat_ray.eval.measure import subject_of
    from nanochat_ray.train.checkpoint import Checkpoints

    needs_core = args.hf or args.watch or args.compare
    source = bundle_source(args.bundle or ("public" if needs_core else None), args.corpus)
    if needs_core and source is None:
        raise UsageError("--hf, --watch and --compare are about CORE, which --bundle none leaves out")
    if args.hf and args.watch:
        raise UsageError("--hf measures the one model of a folder: there are no checkpoints to --watch")
    if args.hf and args.dtype == "int8":
        raise UsageError("--dtype int8 is for models of ours; --hf takes bf16 or fp32")
    if args.trust_code and not args.hf:
        raise UsageError("--trust-code is about the model of --hf")
    if args.hf:
        return core_of_hugging_face(args, str(source))
    stage = run_folder(args.storage, args.run) / "base"
    if args.watch:
        return watch_core(args, str(source), stage)
    require_trained(args.storage, args.run, "base")
    core = Core(args, source) if source is not None else None
    step = Checkpoints.of(stage).newest_valid(cli.warn)
    assert step is not None
    subject = subject_of(RunModel.at(args.storage, args.run, "base", step, args.dtype), stage)
    result = keep(stage, BASE_EVAL, step, subject.digest, bits_and_samples(args, step))
    if core is not None:
        result = core.of_step(stage, step)
    elif "core" not in result:
        print("CORE was not measured; --bundle public, or a folder that has its questions, measures it")
    return {**result, "artifacts": {"base_eval": str(stage / BASE_EVAL)}}


def bits_and_samples(args: argparse.Namespace, step: int) -> dict[str, Any]:
    from nanochat_ray.data.corpus import open_corpus
    from nanochat_ray.device import pick_device, pick_used_dtype
    from nanochat_ray.eval.text import EVAL_TOKENS, text_figures

    device, _ = pick_device()
    dtype, _ = pick_used_dtype(device, args.dtype)
    corpus = open_corpus(args.corpus, data_folder(args.storage), args.shards)
    run = run_folder(args.storage, args.run)
    figures = text_figures(run, step, corpus, device, dtype, args.eval_tokens or EVAL_TOKENS)
    bits = f"train {figures['train_bpb']:.4f}, validation {figures['val_bpb']:.4f} bits per byte"
    print(f"step {step:,}: {bits} ({figures['tokens_per_split']:,} tokens of each)")
    for sample in figures["samples"]:
        print(f"  {sample['prompt']!r} → {sample['text']!r}")
    return figures


class Core:
    """CORE's questions, and how they are asked of one model or another."""

    def __init__(self, args: argparse.Namespace, source: str) -> None:
        from nanochat_ray.eval.core_bundle import bundle_of
        from nanochat_ray.eval.measure import measured_before

        self.args = args
        self.bundle = bundle_of(source, args.storage)
        self.tasks = self.bundle.asked(args.max_per_task)
        self.other = None
        if args.compare:
            self.other = measured_before(run_folder(args.storage, args.compare) / "base", "CORE", self.tasks)

    def of_step(self, stage: Folder, step: int, beside: bool = False) -> dict[str, Any]:
        """All that is known of a run's checkpoint, CORE's summary among it."""
        from nanochat_ray.eval.exam import CoreExam, RunModel
        from nanochat_ray.eval.kept import BASE_EVAL, keep
        from nanochat_ray.eval.measure import subject_of

        model = RunModel.at(self.args.storage, self.args.run, "base", step, self.args.dtype)
        subject = subject_of(model, stage)
        summary = self.measure(CoreExam(model, self.tasks), subject, beside)
        return keep(stage, BASE_EVAL, step, subject.digest, {"core": summary})

    def measure(self, exam: "Exam", subject: "Subject", beside: bool = False) -> dict[str, Any]:
        """The summary of any model, which is also printed."""
        from nanochat_ray.eval.measure import compared, measure, tell

        measured = measure(
            "CORE",
            exam,
            subject,
            max_per_task=self.args.max_per_task,
            workers=self.args.eval_workers,
            address=self.args.address,
            beside=beside,
        )
        measured.summary["references"] = dict(self.bundle.references)
        if self.other is not None:
            measured.summary["comparison"] = compared(measured, self.tasks, self.other)
        tell(measured.summary, subject.stage)
        return measured.summary


def watch_core(args: argparse.Namespace, source: str, stage: Folder) -> dict[str, Any]:
    from nanochat_ray.eval.watch import watch

    core = Core(args, source)
    means = watch(stage, lambda step: core.of_step(stage, step, beside=True)["core"]["mean"]["value"])
    return {"core": means, "artifacts": {"evaluations": str(stage / "evaluations.jsonl")}}


def core_of_hugging_face(args: argparse.Namespace, source: str) -> dict[str, Any]:
    from nanochat_ray.eval.exam import best_dtype
    from nanochat_ray.eval.hugging_face import HuggingFaceExam, subject_of

    path = str(Path(args.hf).resolve())
    dtype = args.dtype or best_dtype()
    subject = subject_of(path, Folder.at(args.storage) / "hugging_face" / Path(path).name, dtype)
    core = Core(args, source)
    summary = core.measure(HuggingFaceExam(path, core.tasks, dtype, args.trust_code), subject)
    return {"core": summary, "artifacts": {"results": str(subject.stage / summary["results"])}}


if __name__ == "__main__":
    raise SystemExit(cli.run(main, build_parser()))
