"""Ask a run's chat model its held-out questions and score the answers per kind of question.

    python -m jobs.chat_eval --run demo --max-per-task 50

The questions are the test part of the mixture it was finetuned on: other wordings, other numbers, other letters.
"""

import argparse
from typing import Any

from nanochat_ray import cli
from nanochat_ray.errors import UsageError
from nanochat_ray.storage import run_folder

SAMPLES_PER_TASK = 4


def build_parser() -> argparse.ArgumentParser:
    parser = cli.build_parser("jobs.chat_eval", __doc__, ["run", "storage"])
    parser.add_argument("--max-per-task", type=int, default=50, help="questions of each kind")
    parser.add_argument("--max-tokens", type=int, default=128, help="length of a reply, tool calls included")
    return parser


def main(args: argparse.Namespace) -> dict[str, Any]:
    if args.max_per_task < 1 or args.max_tokens < 1:
        raise UsageError("--max-per-task and --max-tokens must be at least 1")
    from nanochat_ray.engine.load import load_chat_model
    from nanochat_ray.tasks.evaluate import Answer, accuracies, ask, first_of_each
    from nanochat_ray.tasks.mixture import open_mixture, read_examples

    stage = run_folder(args.storage, args.run) / "sft"
    model = load_chat_model(args.storage, args.run)
    mixture = open_mixture(stage / "data")
    held_out = [example for unit in mixture.validation for example in read_examples(unit)]
    examples = first_of_each(held_out, args.max_per_task)
    print(f"asking {len(examples)} of {len(held_out)} held-out questions (step {model.about['step']})", flush=True)

    answers: list[Answer] = ask(answerer(model.engine, args.max_tokens), examples)
    tasks = accuracies(answers)
    shown = first_of_each(answers, SAMPLES_PER_TASK)
    samples = [{"source": answer.source, "question": answer.question, "answer": answer.answer} for answer in shown]
    stage.write_json("chat_eval.json", {"step": model.about["step"], "tasks": tasks, "samples": samples})

    print(f"\n{'questions':<16} {'right':>7} {'asked':>6} {'tool calls':>11}")
    for name, task in tasks.items():
        print(f"{name:<16} {task['accuracy']:>7.1%} {task['examples']:>6} {task['tool_calls']:>11}")
    for answer in first_of_each(answers, 1):
        print(f"\n{answer.question}\n  {answer.answer}")
    return {"tasks": tasks, "artifacts": {"chat_eval": str(stage / "chat_eval.json")}}


def answerer(engine: Any, max_tokens: int) -> Any:
    """The engine as evaluate.ask wants it: messages in, the greedy reply as parts out."""
    from nanochat_ray.chat import render_prompt
    from nanochat_ray.engine.sampler import SamplingParams

    params = SamplingParams(temperature=0.0, max_tokens=max_tokens)

    def generate(messages: list[dict[str, Any]]) -> list[dict[str, str]]:
        ids = render_prompt(engine.tokenizer, messages)
        if len(ids) >= engine.context:
            return []  # no room to answer: counts as wrong
        parts: list[dict[str, str]] = []
        for piece in engine.stream(ids, params):
            if piece.tool is not None and piece.tool.result is not None:
                parts.append({"type": "python", "text": piece.tool.expression})
                parts.append({"type": "python_output", "text": piece.tool.result})
            if piece.text:
                parts.append({"type": "text", "text": piece.text})
        return parts

    return generate


if __name__ == "__main__":
    raise SystemExit(cli.run(main, build_parser()))
