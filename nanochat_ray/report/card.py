"""Collects the artifacts of a run that exist, and writes `report/report.md` and `report/report.html`."""

from datetime import UTC, datetime
from typing import Any

from nanochat_ray.errors import UserError
from nanochat_ray.eval.kept import BASE_EVAL, CHAT_EVAL, read_evaluation
from nanochat_ray.plan import duration
from nanochat_ray.report import sections
from nanochat_ray.report.document import Document, KeyFigures, Section
from nanochat_ray.report.evaluation import key_figure, read_history, score_section
from nanochat_ray.report.goodput import NO_PRICES, Prices, money
from nanochat_ray.report.html import to_html
from nanochat_ray.report.markdown import to_markdown
from nanochat_ray.report.samples import samples_section
from nanochat_ray.report.training import Training, plan_section, read_training, training_section
from nanochat_ray.storage import Folder

MARKDOWN, HTML = "report.md", "report.html"


def build_card(run: Folder, prices: Prices = NO_PRICES) -> dict[str, Any]:
    """Write the report card of a run and return its main figures; with prices, also in money.

    Reads, where they exist: tokenizer/{tokenizer,eval}.json, {base,sft}/{plan.json,events.jsonl,evaluations.jsonl},
    base/base_eval.json, sft/chat_eval.json, report/stages.json. What is absent is listed in the report as not run.

    Raises:
        UserError: there is no such run, or one of its artifacts is damaged; names the file.
    """
    if not run.exists():
        raise UserError(f"there is no run at {run}; begin one with `python -m jobs.speedrun --preset tiny`")
    name = run.uri.rsplit("/", 1)[-1]
    read = _Artifacts(run)
    tokenizer, tokenizer_eval = read("tokenizer/tokenizer.json"), read("tokenizer/eval.json")
    base, sft = read_training(run / "base"), read_training(run / "sft")
    base_eval, chat_eval = read_evaluation(run / "base", BASE_EVAL), read_evaluation(run / "sft", CHAT_EVAL)
    stages = read("report/stages.json")
    core, chat_core = base_eval.get("core"), chat_eval.get("chat_core")

    present = {
        "tokenizer": tokenizer,
        "tokenizer_eval": tokenizer_eval,
        "pretrain": base,
        "base_eval": base_eval,
        "sft": sft,
        "chat_eval": chat_eval,
    }
    missing = [(job, f"python -m jobs.{job} --run {name}") for job, artifact in present.items() if not artifact]
    figures = _main_figures(base, base_eval, sft, chat_eval, stages)
    if base and (costs := money(base.ledger, prices)):
        figures["money"] = costs
    scores = [key_figure(score) for score in (core, chat_core) if score]
    found: list[Section | None] = [
        Section("Summary", (KeyFigures((*_key_figures(base, figures), *scores)),)) if figures else None,
        sections.missing_section(missing),
        training_section("Pretraining", base, prices) if base else None,
        samples_section("Samples during pretraining", base) if base else None,
        score_section(core, read_history(run / "base", "CORE")),
        sections.base_samples_section(base_eval),
        training_section("Finetuning", sft, prices) if sft else None,
        samples_section("Samples during finetuning", sft) if sft else None,
        score_section(chat_core, read_history(run / "sft", "ChatCORE")),
        sections.chat_section(chat_eval),
        sections.bpb_section(base, base_eval, sft),
        sections.tokenizer_section(tokenizer, tokenizer_eval),
        sections.time_section(stages),
        plan_section("Plan of pretraining", base.plan, folded=False) if base and base.plan else None,
        plan_section("Plan of finetuning", sft.plan, folded=True) if sft and sft.plan else None,
        sections.machine_section(),
    ]
    document = Document(
        title=f"nanochat_ray report card: {name}",
        subtitle=f"written {datetime.now(UTC):%Y-%m-%d %H:%M} UTC",
        sections=tuple(section for section in found if section),
    )
    try:
        (run / "report").write(MARKDOWN, to_markdown(document))
        (run / "report").write(HTML, to_html(document))
    except OSError as error:
        raise UserError(f"the report cannot be written to {run}/report ({error}); give another --storage") from error
    return {**figures, "not_run": [job for job, _ in missing]}


class _Artifacts:
    """Reads JSON artifacts of a run by their path in it; None where there is none."""

    def __init__(self, run: Folder):
        self._run = run

    def __call__(self, path: str) -> Any:
        return self._run.read_json(path) if self._run.exists(path) else None


def _main_figures(
    base: Training | None, base_eval: Any, sft: Training | None, chat_eval: Any, stages: Any
) -> dict[str, Any]:
    """The figures by which runs are compared; only those that exist."""
    figures: dict[str, Any] = {}
    if base:
        figures |= {"steps": base.steps_done, "tokens": base.steps[-1]["tokens"], "loss": base.end_loss}
        figures["tok_per_s"] = base.tok_per_s
        if base.ledger.goodput is not None:
            figures["goodput"] = base.ledger.goodput
        if base.plan:
            figures["parameters"] = base.plan.parameters.total
    if (base_eval or {}).get("val_bpb") is not None:
        figures["val_bpb"] = base_eval["val_bpb"]
    elif base and base.evals:
        figures["val_bpb"] = base.evals[-1]["val_bpb"]
    if sft:
        figures["sft_loss"] = sft.end_loss
    scores = [
        task["accuracy"] for task in (chat_eval or {}).get("tasks", {}).values() if task.get("accuracy") is not None
    ]
    if scores:
        figures["chat_accuracy"] = sum(scores) / len(scores)
    for name, score in (("core", (base_eval or {}).get("core")), ("chat_core", (chat_eval or {}).get("chat_core"))):
        if score:
            figures[name] = score["mean"]["value"]
    if stages:
        figures["seconds"] = sum(entry["seconds"] for entry in stages)
    return figures


def _key_figures(base: Training | None, figures: dict[str, Any]) -> list[tuple[str, str, str]]:
    shown = []
    if "parameters" in figures:
        depth = f"depth {base.plan.depth}" if base and base.plan else ""
        shown.append((_short(figures["parameters"]), "parameters", depth))
    if "tokens" in figures:
        shown.append((_short(figures["tokens"]), "training tokens", f"{figures['steps']:,} steps"))
    if "val_bpb" in figures:
        shown.append((f"{figures['val_bpb']:.3f}", "bits per byte", "base model, validation"))
    if "chat_accuracy" in figures:
        shown.append((f"{figures['chat_accuracy']:.0%}", "of held-out questions right", "mean over kinds"))
    if "tok_per_s" in figures:
        shown.append((f"{figures['tok_per_s']:,.0f}", "tokens per second", "pretraining, median"))
    if "goodput" in figures:
        shown.append((f"{figures['goodput']:.0%}", "goodput", "useful share of worker time"))
    if "seconds" in figures:
        shown.append((duration(figures["seconds"]), "all stages", "wall time"))
    return shown


def _short(count: int) -> str:
    """`7.3 M`, `1.2 B`."""
    for unit, size in (("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if count >= size:
            return f"{count / size:.3g} {unit}"
    return str(count)
