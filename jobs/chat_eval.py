"""Evaluate a run's chat model: ChatCORE with its error bars, and the held-out questions of its finetuning mixture.

python -m jobs.chat_eval --run demo                                          # its own held-out questions
python -m jobs.chat_eval --run d20 --tasks hub --eval-workers 8 --address auto
python -m jobs.chat_eval --run d20 --tasks tasks/ --max-per-task 100 --watch   # each checkpoint, beside finetuning

ChatCORE: ARC-Easy, ARC-Challenge, MMLU by the letters' logits, GSM8K and HumanEval by greedy replies; the mean of the
centred accuracies. Programs that the model writes run in a sandbox. Held-out questions have other wordings, numbers and
letters than those that were trained on.
"""

import argparse
from collections.abc import Sequence
from typing import Any

from nanochat_ray import cli
from nanochat_ray.errors import UsageError, UserError
from nanochat_ray.storage import Folder, run_folder

HELD_OUT_PER_TASK, SAMPLES_PER_TASK = 50, 4


def build_parser() -> argparse.ArgumentParser:
    shared = ["run", "storage", "sft", "used-dtype", "max-per-task", "eval-workers", "address", "compare", "watch"]
    parser = cli.build_parser("jobs.chat_eval", __doc__, shared)
    parser.add_argument(
        "--tasks",
        default=None,
        help="ChatCORE's questions: hub | none | a folder of them as parquet (default: where --sft has them)",
    )
    parser.add_argument("--max-tokens", type=cli.at_least(1), default=512, help="of a reply, tool calls included")
    return parser


def main(args: argparse.Namespace) -> dict[str, Any]:
    from nanochat_ray.engine.load import require_trained
    from nanochat_ray.eval.watch import watch
    from nanochat_ray.train.checkpoint import Checkpoints

    stage = run_folder(args.storage, args.run) / "sft"
    if args.watch:
        chat = Chat(args, stage)
        means = watch(stage, lambda step: chat.of_step(step, beside=True)["chat_core"]["mean"]["value"])
        return {"chat_core": means, "artifacts": {"evaluations": str(stage / "evaluations.jsonl")}}
    require_trained(args.storage, args.run, "sft")
    chat = Chat(args, stage)
    step = Checkpoints.of(stage).newest_valid(cli.warn)
    assert step is not None
    return {**chat.of_step(step), "artifacts": {"chat_eval": str(stage / "chat_eval.json")}}


class Chat:
    """What a chat model is asked: ChatCORE where its questions are to be had, and what its finetuning held out."""

    def __init__(self, args: argparse.Namespace, stage: Folder) -> None:
        from nanochat_ray.eval.chat_core import chat_core_of, held_out_tasks
        from nanochat_ray.eval.measure import measured_before
        from nanochat_ray.eval.sandbox import protections
        from nanochat_ray.tasks.mixture import open_mixture, read_examples

        self.args, self.stage = args, stage
        self.core = chat_core_of(args.tasks, args.sft, args.max_per_task)
        if not self.core and (args.watch or args.compare):
            raise UsageError("--watch and --compare are about ChatCORE; say with --tasks where its questions are")
        for line in protections() if self.core else ():
            if line.startswith("NOT"):
                cli.warn(f"the sandbox for programs that the model writes is weaker on this machine: {line}")
        self.other = None
        if args.compare:
            self.other = measured_before(run_folder(args.storage, args.compare) / "sft", "ChatCORE", self.core)
        self.held_out = []
        if not args.watch and (stage / "data").exists():
            examples = [example for unit in open_mixture(stage / "data").validation for example in read_examples(unit)]
            asked = {task.name.lower() for task in self.core}
            most = args.max_per_task or HELD_OUT_PER_TASK
            self.held_out = [task for task in held_out_tasks(examples, most) if task.name not in asked]
        if not self.core and not self.held_out:
            raise UserError(f"nothing to ask: {stage} holds out no questions; say with --tasks where ChatCORE's are")

    def of_step(self, step: int, beside: bool = False) -> dict[str, Any]:
        """All that is known of a checkpoint: scores of held-out questions, and ChatCORE's summary."""
        from nanochat_ray.eval.chat_core import protections_of
        from nanochat_ray.eval.chat_exam import ChatExam
        from nanochat_ray.eval.exam import RunModel
        from nanochat_ray.eval.kept import CHAT_EVAL, keep
        from nanochat_ray.eval.measure import answer, compared, measure, subject_of, tell

        args = self.args
        model = RunModel.at(args.storage, args.run, "sft", step, args.dtype)
        subject = subject_of(model, self.stage)
        how: dict[str, Any] = dict(workers=args.eval_workers, address=args.address, beside=beside)
        how["manner"] = f"{args.max_tokens} tokens"
        known: dict[str, Any] = {}
        if self.held_out:
            _, verdicts, _ = answer("held-out", ChatExam(model, self.held_out, args.max_tokens), subject, **how)
            known = keep(self.stage, CHAT_EVAL, step, subject.digest, self._held_out(verdicts))
        if self.core:
            exam = ChatExam(model, self.core, args.max_tokens)
            measured = measure("ChatCORE", exam, subject, max_per_task=args.max_per_task, **how)
            measured.summary["protections"] = list(protections_of(measured.verdicts))
            if self.other is not None:
                measured.summary["comparison"] = compared(measured, self.core, self.other)
            tell(measured.summary, self.stage)
            known = keep(self.stage, CHAT_EVAL, step, subject.digest, {"chat_core": measured.summary})
        return known

    def _held_out(self, verdicts: Sequence[Any]) -> dict[str, Any]:
        """Scores by source, and some answers; told to people, too."""
        from nanochat_ray.tasks.conversations import spoken_text

        tasks, samples = {}, []
        print(f"\n{'held-out questions':<20} {'right':>7} {'asked':>6} {'tool calls':>11}")
        for task in self.held_out:
            answers = [verdict for verdict in verdicts if verdict.task == task.name]
            right = sum(answer.correct for answer in answers) / len(answers)
            called = sum(answer.tool_calls > 0 for answer in answers)
            tasks[task.name] = {"accuracy": right, "examples": len(answers), "tool_calls": called}
            print(f"{task.name:<20} {right:>7.1%} {len(answers):>6} {called:>11}")
            samples += [
                {
                    "source": task.name,
                    "question": spoken_text(task.items[answer.index][-2]["content"]),
                    "answer": answer.text,
                }
                for answer in answers[:SAMPLES_PER_TASK]
            ]
        for sample in {sample["source"]: sample for sample in reversed(samples)}.values():
            print(f"\n{sample['question']}\n  {sample['answer']}")
        return {"tasks": tasks, "samples": samples}


if __name__ == "__main__":
    raise SystemExit(cli.run(main, build_parser()))
