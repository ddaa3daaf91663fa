"""Talk to a trained model in the terminal: a local run, or any server of the OpenAI chat-completions protocol.

    python -m jobs.chat --run demo
    python -m jobs.chat --run demo --prompt "What is 17 * 23?"
    python -m jobs.chat --url http://127.0.0.1:8000

/new forgets the conversation, /quit leaves. Ctrl-C stops a reply. A server's API key is read from NANOCHAT_API_KEY.
"""

import argparse
import io
import os
import secrets
import sys
from collections.abc import Callable, Iterator
from typing import Any

from nanochat_ray import cli
from nanochat_ray.errors import UsageError, UserError

Message = dict[str, Any]
# Pieces of a reply: ("text", words), or ("python", expression) followed by ("python_output", result).
Answer = Callable[[list[Message]], Iterator[tuple[str, str]]]


def build_parser() -> argparse.ArgumentParser:
    parser = cli.build_parser("jobs.chat", __doc__, ["run", "storage", "used-dtype", "kernels"])
    parser.add_argument("--stage", choices=("sft", "base"), default="sft", help="which of the run's models to talk to")
    parser.add_argument("--url", default=None, help="talk to this server instead of loading a model")
    parser.add_argument("--prompt", default=None, help="ask this one question, print the reply and exit")
    parser.add_argument("--temperature", type=float, default=0.6, help="0 always takes the likeliest token")
    parser.add_argument("--top-k", type=int, default=50, help="choose among this many tokens")
    parser.add_argument("--max-tokens", type=int, default=512, help="length limit of a reply")
    parser.add_argument("--seed", type=int, default=None, help="makes replies reproducible (default: random)")
    devices = ("cuda", "mps", "cpu")
    parser.add_argument("--device", choices=devices, default=None, help="default: the best that there is")
    return parser


def main(args: argparse.Namespace) -> dict[str, Any]:
    # Before torch is loaded: threads that spin while they wait were 10 times slower beside other busy processes.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    from nanochat_ray.engine.sampler import SamplingParams

    seed = secrets.randbits(63) if args.seed is None else args.seed
    try:
        params = SamplingParams(args.temperature, args.top_k, seed=seed, max_tokens=args.max_tokens)
    except UserError as error:
        raise UsageError(str(error)) from error
    answer = _server(args.url, params) if args.url else _local(args, params)
    for stream in (sys.stdin, sys.stdout):  # bytes that are no text are shown as such, not a reason to stop
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")
    if args.prompt is not None:
        args.prompt = args.prompt.encode(errors="replace").decode()
        return {"reply": _say(answer, [{"role": "user", "content": args.prompt}])["content"], "seed": seed}
    return {"turns": _converse(answer)}


def _converse(answer: Answer) -> int:
    """Read questions until /quit or the end of input; returns how many were answered."""
    messages: list[Message] = []
    turns = 0
    while True:
        try:
            question = input("\n> ").strip()
        except (EOFError, KeyboardInterrupt):
            print()
            return turns
        if question == "/quit":
            return turns
        if question == "/new":
            messages = []
            print("(a new conversation)")
        elif question.startswith("/"):
            print("/new forgets the conversation, /quit leaves; Ctrl-C stops a reply")
        elif question:
            asked = [*messages, {"role": "user", "content": question}]
            try:
                reply = _say(answer, asked)
            except UserError as error:  # for example a full context: the conversation goes on from before the question
                print(f"error: {error}", file=sys.stderr)
                continue
            messages = [*asked, reply] if reply["content"] else messages
            turns += 1


def _say(answer: Answer, messages: list[Message]) -> Message:
    """Print a reply while it comes; the message it makes. Ctrl-C ends it early."""
    parts: list[dict[str, str]] = []
    try:
        for kind, text in answer(messages):
            print({"python": f"[{text} = ", "python_output": f"{text}] "}.get(kind, text), end="", flush=True)
            if kind == "text" and parts and parts[-1]["type"] == "text":
                parts[-1]["text"] += text
            else:
                parts.append({"type": kind, "text": text})
    except KeyboardInterrupt:
        print(" (stopped)", end="")
    print()
    return {"role": "assistant", "content": parts}


def _tool(expression: str, result: str | None) -> Iterator[tuple[str, str]]:
    if result is not None and expression:
        yield "python", expression
        yield "python_output", result


def _local(args: argparse.Namespace, params: Any) -> Answer:
    from nanochat_ray.chat import render_prompt
    from nanochat_ray.engine.load import load_chat_model

    engine = load_chat_model(args.storage, args.run, args.stage, args.device, args.dtype, kernels=args.kernels).engine

    def answer(messages: list[Message]) -> Iterator[tuple[str, str]]:
        for piece in engine.stream(render_prompt(engine.tokenizer, messages), params):  # type: ignore[arg-type]
            if piece.text:
                yield "text", piece.text
            if piece.tool:
                yield from _tool(piece.tool.expression, piece.tool.result)

    return answer


def _server(url: str, params: Any) -> Answer:
    from nanochat_ray.serve.client import ask

    known = False

    def answer(messages: list[Message]) -> Iterator[tuple[str, str]]:
        nonlocal known
        for delta in ask(url, messages, params, known=known, on_state=_tell):
            known = True
            if delta.get("content"):
                yield "text", delta["content"]
            if delta.get("tool"):
                yield from _tool(**delta["tool"])

    return answer


def _tell(state: dict[str, Any]) -> None:
    """On a terminal, why nothing comes: starting, queued, moved, reconnecting. A reply in a file stays as it is."""
    if sys.stderr.isatty() and state["state"] != "writing":
        print(f"({state['state']})", file=sys.stderr, flush=True)


if __name__ == "__main__":
    raise SystemExit(cli.run(main, build_parser()))
