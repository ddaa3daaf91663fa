"""The sections on CORE and ChatCORE: the mean and how sure one can be of it, every task, what it stands beside."""

import json
from typing import Any

from nanochat_ray.eval.summary import caveats, p_value, reference_mean
from nanochat_ray.report.document import Block, Plot, Plots, Section, Table, Text
from nanochat_ray.report.plots import Bar, band, bars
from nanochat_ray.storage import Folder

HISTORY = "evaluations.jsonl"
DIGEST_SHOWN = 12  # digits of a hash: enough to tell models apart, and short enough to read

# The standard deviation between runs of one recipe that differ only in their seed: 20 public runs. For others unknown.
_SEED_SPREAD = {"CORE": 0.006}

Json = dict[str, Any]


def score_section(score: Json | None, history: list[Json]) -> Section | None:
    """A benchmark's mean, its tasks as a picture and a table, a comparison with another model, and its provenance.

    Args:
        score: the mean and the tasks as `eval.summary.summarise` makes them, with name, step, max_per_task, references,
            comparison and provenance; None gives None.
        history: its means over steps, from `read_history`.
    """
    if not score:
        return None
    blocks: list[Block] = [Text(_certainty(score)), Plots((_tasks_plot(score),)), _task_table(score)]
    blocks += _over_steps(score["name"], history)
    if comparison := score.get("comparison"):
        blocks += _comparison(score["name"], comparison)
    blocks.append(Text(_provenance(score)))
    return Section(score["name"], tuple(blocks))


def read_history(stage: Folder, name: str) -> list[Json]:
    """Evaluations of the benchmark `name` in the order of steps, the last one of each step.

    Only those that asked as many questions as the newest: others are another measure. A line that a killed writer cut
    off is none.
    """
    if not stage.exists(HISTORY):
        return []
    lines = stage.read(HISTORY).decode(errors="replace").splitlines()
    found = [entry for entry in map(_parse, lines) if entry.get("name") == name]
    alike = {entry["step"]: entry for entry in found if entry.get("max_per_task") == found[-1].get("max_per_task")}
    return [alike[step] for step in sorted(alike)]


def key_figure(score: Json) -> tuple[str, str, str]:
    """The mean for the top of the report."""
    mean = score["mean"]
    return f"{mean['value']:.3f} ± {_half_width(mean):.3f}", score["name"], f"{_tasks(score)}, 95 % interval"


def _certainty(score: Json) -> str:
    name, mean, spread = score["name"], score["mean"], _SEED_SPREAD.get(score["name"])
    asked = sum(task["examples"] for task in score["tasks"].values())
    questions = f"{asked:,} {'question' if asked == 1 else 'questions'}"
    limit = f", at most {score['max_per_task']:,} of each" if score.get("max_per_task") else ""
    sentences = [
        f"{name} {mean['value']:.3f} ± {_half_width(mean):.3f} at step {score['step']:,} "
        f"(95 % interval {_ends(mean)}; {questions} of {_tasks(score)}{limit})."
    ]
    if spread is None:
        sentences.append("The interval is for other questions of the same kind; another seed of training adds to it.")
    else:
        sentences.append(
            "The interval is for other questions of the same kind; another seed of training adds to it: 20 public runs "
            f"of one recipe spread with a standard deviation of {spread:g} in {name}, so that two single runs that "
            f"differ by less than {1.96 * 2**0.5 * spread:.3f} may differ by their seeds alone."
        )
    return " ".join([*sentences, *caveats(score)])


def _tasks_plot(score: Json) -> Plot:
    tasks, references = score["tasks"], score.get("references", {})
    found = [
        Bar(name, centred["value"], centred["low"], centred["high"])
        for name, centred in ((name, task["centred"]) for name, task in tasks.items())
    ]
    found.sort(key=lambda bar: -bar.value)
    beside = {
        name: {task: value for task, value in reference.get("tasks", {}).items() if task in tasks}
        for name, reference in references.items()
    }
    above, below = sum(bar.low > 0 for bar in found), sum(bar.high < 0 for bar in found)
    best, worst = found[0], found[-1]
    words = (
        f"the interval is above guessing at {above} of {_tasks(score)}, below it at {below}; "
        f"best {best.name} {best.value:.3f} ({_ends(vars(best))}), worst {worst.name} {worst.value:.3f} "
        f"({_ends(vars(worst))})"
    )
    picture = bars(found, {name: ticks for name, ticks in beside.items() if ticks}, "centred accuracy: 0 is guessing")
    return Plot(f"{score['name']} by task", picture, words)


def _task_table(score: Json) -> Table:
    references = list(score.get("references", {}))
    columns = ("task", "type", "shots", "examples", "accuracy", "95 % interval", "centred", *references)
    rows = [
        (
            name,
            task["type"],
            f"{task['shots']}",
            f"{task['examples']:,}",
            f"{task['accuracy']['value']:.3f}",
            _ends(task["accuracy"]),
            f"{task['centred']['value']:.3f}",
            *(_figure(score["references"][reference].get("tasks", {}).get(name)) for reference in references),
        )
        for name, task in score["tasks"].items()
    ]
    beside = (_figure(reference_mean(score, reference)) for reference in references)
    asked = sum(task["examples"] for task in score["tasks"].values())
    mean = score["mean"]
    rows.append(("mean", "", "", f"{asked:,}", "", _ends(mean), f"{mean['value']:.3f}", *beside))
    return Table(columns, tuple(rows), right=tuple(range(2, len(columns))), total=True)


def _over_steps(name: str, history: list[Json]) -> list[Block]:
    if len(history) < 2:
        return []
    steps, values, lows, highs = ([entry[key] for entry in history] for key in ("step", "value", "low", "high"))
    words = f"{values[0]:.3f} at step {steps[0]:,} → {values[-1]:.3f} ({_ends(history[-1])}) at step {steps[-1]:,}"
    return [Plots((Plot(f"{name} over steps", band(steps, values, lows, highs, f"{name}, 95 % band"), words),))]


def _comparison(name: str, comparison: Json) -> list[Block]:
    mean, tasks = comparison["mean"], comparison["tasks"]
    verdict = "chance may explain it" if mean["low"] <= 0 <= mean["high"] else "more than chance explains"
    text = (
        f"Compared with {comparison['with']} on the same questions, {name} differs by {mean['value']:+.3f} "
        f"(95 % interval {_ends(mean, '+')}, p {_equals(mean['p'])}): {verdict}. Differences are of centred "
        "accuracies. Where two models are equally good, one task in 20 has p < 0.05 by chance."
    )
    rows = [
        (task, f"{found['examples']:,}", f"{found['value']:+.3f}", _ends(found, "+"), p_value(found["p"]))
        for task, found in tasks.items()
    ]
    rows.append(("mean", "", f"{mean['value']:+.3f}", _ends(mean, "+"), p_value(mean["p"])))
    columns = (f"minus {comparison['with']}", "examples", "difference", "95 % interval", "p")
    return [Text(text), Table(columns, tuple(rows), right=(1, 2, 3, 4), total=True)]


def _provenance(score: Json) -> str:
    seeds = ", ".join(f"{name.replace('_', '-')} {seed}" for name, seed in score.get("seeds", {}).items())
    parts = [
        f"questions {score['questions_hash'][:DIGEST_SHOWN]}" if score.get("questions_hash") else "",
        f"model {score['model_digest'][:DIGEST_SHOWN]}" if score.get("model_digest") else "",
        f"seeds: {seeds}" if seeds else "",
        f"intervals from {score['resamples']:,} resamples" if "resamples" in score else "",
        str(score.get("dtype", "")).removeprefix("torch."),
        f"{score['examples_per_s']:,.1f} questions per second" if score.get("examples_per_s") else "",
        f"programs that the model wrote ran with: {', '.join(score['protections'])}"
        if score.get("protections")
        else "",
    ]
    return f"Made from: {'; '.join(part for part in parts if part)}."


def _parse(line: str) -> Json:
    try:
        entry = json.loads(line)
    except ValueError:
        return {}
    return entry if isinstance(entry, dict) else {}


def _tasks(score: Json) -> str:
    count = len(score["tasks"])
    return "1 task" if count == 1 else f"{count} tasks"


def _half_width(found: Json) -> float:
    return (found["high"] - found["low"]) / 2


def _ends(found: Json, sign: str = "") -> str:
    return f"{found['low']:{sign}.3f} to {found['high']:{sign}.3f}"


def _equals(p: float) -> str:
    return p_value(p) if p < 0.001 else f"= {p_value(p)}"


def _figure(centred: float | None) -> str:
    return "" if centred is None else f"{centred:.3f}"
