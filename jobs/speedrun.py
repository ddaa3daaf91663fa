"""The whole pipeline, from raw text to the chat page: every stage in turn, finished ones skipped, then a report card.

python -m jobs.speedrun --preset tiny --serve
python -m jobs.speedrun --depth 20 --corpus fineweb-edu --sft hub --run d20 --workers 2:16
"""

import argparse
import importlib
import json
import time
from typing import Any

from nanochat_ray import cli
from nanochat_ray.plan import make_plan
from nanochat_ray.storage import Folder, run_folder

STAGES = ("tokenizer", "tokenizer_eval", "pretrain", "base_eval", "sft", "chat_eval", "report")


def build_parser() -> argparse.ArgumentParser:
    shared = [*cli.TRAINING_FLAGS, "corpus", "shards", "depth", "preset", "sft", "tasks", "port"]
    shared += ["bundle", "max-per-task", "eval-workers", "spot-price", "on-demand-price"]
    parser = cli.build_parser("jobs.speedrun", __doc__, shared)
    parser.add_argument("--serve", action="store_true", help="end with the chat page, until Ctrl-C")
    return parser


def main(args: argparse.Namespace) -> dict[str, Any]:
    from nanochat_ray.cluster import connect
    from nanochat_ray.stream import ray_stream

    cli.parse_workers(args.workers)
    if args.plan_only:
        return _stage_job("pretrain", args)
    make_plan(depth=args.depth, preset=args.preset, steps=args.steps, seed=args.seed)  # wrong values fail before work
    run = run_folder(args.storage, args.run)
    run.require_writable()
    if args.serve:
        from nanochat_ray.serve.app import HOST, Served, require_free_port, serve_until_interrupted

        require_free_port(HOST, args.port)
    _require_questions(args)
    figures: dict[str, Any] = {}
    began = time.monotonic()
    with connect(args.address, cli.parse_workers(args.workers)[1], ray_stream.load):
        for number, stage in enumerate(STAGES, 1):
            print(
                f"\n━━ {number}/{len(STAGES)} {stage} ━━ python -m jobs.{stage} {' '.join(_argv(stage, args))}",
                flush=True,
            )
            stage_began = time.monotonic()
            try:
                figures[stage] = _stage_job(stage, args)
            except KeyboardInterrupt:
                _note_time(run, stage, time.monotonic() - stage_began, "interrupted")
                raise
            status = "unchanged" if figures[stage].get("unchanged") else "done"
            _note_time(run, stage, time.monotonic() - stage_began, status)
    seconds = time.monotonic() - began
    print(f"\nfrom raw text to report card in {seconds / 60:.1f} minutes: {run / 'report' / 'report.html'}", flush=True)
    if args.serve:
        served = Served(storage=args.storage, run=args.run)
        serve_until_interrupted(
            served, HOST, args.port, args.address, lambda url: print(f"chat page: {url}", flush=True)
        )
    return {"seconds": seconds, "stages": figures, "artifacts": {"run": str(run), "report": str(run / "report")}}


def _stage_job(stage: str, args: argparse.Namespace) -> dict[str, Any]:
    job = importlib.import_module(f"jobs.{stage}")
    return job.main(job.build_parser().parse_args(_argv(stage, args)))


def _require_questions(args: argparse.Namespace) -> None:
    """Have what the evaluations ask, so that neither a network nor a wrong flag stops them after hours of training."""
    from nanochat_ray.eval.chat_core import chat_core_of
    from nanochat_ray.eval.core_bundle import bundle_of, bundle_source

    source = bundle_source(args.bundle, args.corpus)
    if source is not None:
        bundle_of(source, args.storage).asked(args.max_per_task)
    chat_core_of(args.tasks, args.sft, args.max_per_task)


def _argv(stage: str, args: argparse.Namespace) -> list[str]:
    """The stage's command line: each of its flags that was given here with another value than the default."""
    job = importlib.import_module(f"jobs.{stage}")
    own = vars(job.build_parser().parse_args([]))
    defaults = vars(build_parser().parse_args([]))
    skipped = {"json", "debug"} | ({"steps"} if stage == "sft" else set())
    argv = []
    for name, value in vars(args).items():
        if name not in own or name in skipped or (value == defaults[name] and value == own[name]):
            continue
        argv += [f"--{name.replace('_', '-')}"] + ([] if value is True else [str(value)])
    return argv


def _note_time(run: Folder, stage: str, seconds: float, status: str) -> None:
    """Keep `report/stages.json` up to date: sessions of an interrupted stage add up, and done is done."""
    report = run / "report"
    entries = {
        entry["stage"]: entry for entry in (report.read_json("stages.json") if report.exists("stages.json") else [])
    }
    before = entries.get(stage)
    if before is not None and before["status"] == "done" and status != "done":
        return
    if before is not None and before["status"] == "interrupted":
        seconds += before["seconds"]
    status = "interrupted" if status == "interrupted" else "done"
    entries[stage] = {"stage": stage, "seconds": round(seconds, 1), "status": status}
    report.write("stages.json", json.dumps([entries[name] for name in STAGES if name in entries], indent=2))


if __name__ == "__main__":
    raise SystemExit(cli.run(main, build_parser()))
