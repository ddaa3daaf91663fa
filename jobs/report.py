"""Write the report card of a run, as Markdown and as one self-contained HTML file, from the artifacts that exist.

python -m jobs.report --run demo
python -m jobs.report --run demo --spot-price 1.5 --on-demand-price 3     # also what its workers cost
"""

import argparse
from typing import Any

from nanochat_ray import cli
from nanochat_ray.errors import UserError
from nanochat_ray.storage import run_folder


def build_parser() -> argparse.ArgumentParser:
    return cli.build_parser("jobs.report", __doc__, ["run", "storage", "spot-price", "on-demand-price"])


def main(args: argparse.Namespace) -> dict[str, Any]:
    from nanochat_ray.report import build_card
    from nanochat_ray.report.goodput import Prices, money_lines

    run = run_folder(args.storage, args.run)
    if not (run / "tokenizer").exists():
        raise UserError(f"no run named {args.run!r} in {args.storage}: nothing to report; check --run and --storage")
    figures = build_card(run, Prices(args.spot_price, args.on_demand_price))
    if "money" in figures:
        print("\n".join(money_lines(figures["money"])))
    files = {"report_html": f"{run}/report/report.html", "report_md": f"{run}/report/report.md"}
    for file in files.values():
        print(f"saved {file}")
    if figures["not_run"]:
        print(f"not run so far, and so not in it: {', '.join(figures['not_run'])}")
    return {**figures, "artifacts": files}


if __name__ == "__main__":
    raise SystemExit(cli.run(main, build_parser()))
