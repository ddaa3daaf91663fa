"""Evaluate a run's base model: bits per byte, continuations of held-out openings, and CORE with its error bars.

python -m jobs.base_eval --run d20 --corpus fineweb-edu                     # everything, on this machine
python -m jobs.base_eval --run d20 --eval-workers 8 --address auto          # by as many as the cluster has room for
python -m jobs.base_eval --run d20 --max-per-task 500 --watch               # CORE of each checkpoint, beside training
python -m jobs.base_eval --run d20 --corpus fineweb-edu --compare d18       # and the difference on the same questions
python -m jobs.base_eval --hf gpt2/                                         # CORE of a model in Hugging Face's format
"""

import argparse
from pathlib import Path
from typing import Any

from nanochat_ray import cli
from nanochat_ray.errors import UsageError
from nanochat_ray.storage import Folder, data_folder, run_folder

SAMPLES, OPENING_TOKENS, SAMPLE_TOKENS = 4, 16, 48


def build_parser() -> argparse.ArgumentParser:
    shared = ["run", "storage", "corpus", "shards", "dtype", "eval-tokens", "bundle", "max-per-task"]
    parser = cli.build_parser("jobs.base_eval", __doc__, [*shared, "eval-workers", "address", "compare", "watch"])
    parser.add_argument("--hf", default=None, metavar="PATH", help="folder of a Hugging Face model, instead of a run")
    parser.add_argument("--trust-code", action="store_true", help="let Python code that comes with --hf's model run")
    return parser


def main(args: argparse.Namespace) -> dict[str, Any]:
    cli.parse_range(args.eval_workers, "--eval-workers", least=1)
    needs_core = args.hf or args.watch or args.compare
    source = args.bundle or ("none" if args.corpus == "demo" and not needs_core else "public")
    if needs_core and source == "none":
        raise UsageError("--hf, --watch and --compare are about CORE, which --bundle none leaves out")
    core = Core(args, source) if source != "none" else None
    if args.hf:
        assert core is not None
        return core.of_hugging_face()

    from nanochat_ray.engine.load import require_trained
    from nanochat_ray.train.checkpoint import Checkpoints

    stage = run_folder(args.storage, args.run) / "base"
    if args.watch:
        assert core is not None
        return core.watch(stage)
    require_trained(args.storage, args.run, "base")
    step = Checkpoints.of(stage).newest_valid(cli.warn)
    assert step is not None
    result = {"step": step, **text_figures(args, step)}
    stage.write_json("base_eval.json", result)
    if core is not None:
        result["core"] = core.of_step(stage, step)
        stage.write_json("base_eval.json", result)
    else:
        print("CORE was not measured; --bundle public, or a folder that has its questions, measures it")
    return {**result, "artifacts": {"base_eval": str(stage / "base_eval.json")}}


def text_figures(args: argparse.Namespace, at_step: int) -> dict[str, Any]:
    """Bits per byte on training and validation text, and continuations."""
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
    model, plan, step = load_model(run / "base", tokenizer.fingerprint, device, dtype, at_step=at_step)
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
    train_bpb, val_bpb = bits_per_byte(corpus.train), bits_per_byte(corpus.validation)
    print(f"step {step}: train {train_bpb:.4f}, validation {val_bpb:.4f} bits per byte")
    for sample in samples:
        print(f"  {sample['prompt']!r} → {sample['text']!r}")
    tokens = count * row_tokens
    return {"train_bpb": train_bpb, "val_bpb": val_bpb, "tokens_per_split": tokens, "samples": samples}


class Core:
    """CORE's questions, and how they are asked of one model or another."""

    def __init__(self, args: argparse.Namespace, source: str) -> None:
        from nanochat_ray.eval.bundle import bundle_of
        from nanochat_ray.eval.measure import measured_before

        self.bundle = bundle_of(source, args.storage)
        self.tasks = self.bundle.asked(args.max_per_task)
        self.other = measured_before(run_folder(args.storage, args.compare) / "base", "CORE") if args.compare else None
        self.args = args

    def of_step(self, stage: Folder, step: int, niceness: int = 0) -> dict[str, Any]:
        from nanochat_ray.eval.exam import CoreExam, RunModel
        from nanochat_ray.eval.measure import subject_of

        model = RunModel(self.args.storage, self.args.run, "base", step, self.args.dtype)
        return self._measure(CoreExam(model, self.tasks), subject_of(model, stage), niceness)

    def of_hugging_face(self) -> dict[str, Any]:
        from nanochat_ray.eval.hugging_face import HuggingFaceExam, subject_of

        path = str(Path(self.args.hf).resolve())
        stage = Folder.at(self.args.storage) / "hugging_face" / Path(path).name
        exam = HuggingFaceExam(path, self.tasks, self.args.dtype, self.args.trust_code)
        core = self._measure(exam, subject_of(path, stage, self.args.dtype), 0)
        return {"core": core, "artifacts": {"results": core["results"]}}

    def watch(self, stage: Folder) -> dict[str, Any]:
        from nanochat_ray.eval.watch import NICENESS, new_steps

        means = {step: self.of_step(stage, step, NICENESS)["mean"] for step in new_steps(stage)}
        return {"core": means, "artifacts": {"evaluations": str(stage / "evaluations.jsonl")}}

    def _measure(self, exam: Any, subject: Any, niceness: int) -> dict[str, Any]:
        from nanochat_ray.eval.measure import compared, measure, tell

        measured = measure(
            "CORE",
            exam,
            subject,
            max_per_task=self.args.max_per_task,
            workers=cli.parse_range(self.args.eval_workers, "--eval-workers", least=1)[1],
            address=self.args.address,
            niceness=niceness,
        )
        measured.summary["references"] = dict(self.bundle.references)
        if self.other is not None:
            measured.summary["comparison"] = compared(measured, self.tasks, self.other)
        tell(measured.summary)
        return measured.summary


if __name__ == "__main__":
    raise SystemExit(cli.run(main, build_parser()))
