"""CORE and ChatCORE in the report card: what it shows of full results, of few, and of none."""

import json
import re
import xml.etree.ElementTree as ET

import numpy as np
import pytest

from nanochat_ray.eval.summary import TaskResult, compare, summarise
from nanochat_ray.report import build_card
from nanochat_ray.report.evaluation import read_history, score_section
from nanochat_ray.report.plots import Bar, band, bars
from nanochat_ray.storage import Folder, run_folder
from tests.test_report import HOSTILE, Page, read

# (type, shots, baseline, accuracy of a small model, centred accuracy of a reference)
CORE_TASKS = {
    "hellaswag_zeroshot": ("multiple choice", 0, 0.25, 0.30, 0.078),
    "jeopardy": ("language modelling", 10, 0.0, 0.0, 0.002),
    "bigbench_qa_wikidata": ("language modelling", 10, 0.0, 0.28, 0.283),
    "arc_easy": ("multiple choice", 10, 0.25, 0.43, 0.217),
    "arc_challenge": ("multiple choice", 10, 0.25, 0.22, -0.038),
    "copa": ("multiple choice", 0, 0.5, 0.60, 0.200),
    "commonsense_qa": ("multiple choice", 10, 0.2, 0.22, 0.031),
    "piqa": ("multiple choice", 10, 0.5, 0.63, 0.246),
    "openbook_qa": ("multiple choice", 0, 0.25, 0.28, 0.037),
    "lambada_openai": ("language modelling", 0, 0.0, 0.33, 0.323),
    "hellaswag": ("multiple choice", 10, 0.25, 0.31, 0.077),
    "winograd": ("schema", 0, 0.5, 0.57, 0.158),
    "winogrande": ("schema", 0, 0.5, 0.50, -0.028),
    "bigbench_dyck_languages": ("language modelling", 10, 0.0, 0.14, 0.155),
    "agi_eval_lsat_ar": ("multiple choice", 3, 0.2, 0.23, 0.033),
    "bigbench_cs_algorithms": ("language modelling", 10, 0.0, 0.42, 0.420),
    "bigbench_operators": ("language modelling", 10, 0.0, 0.09, 0.086),
    "bigbench_repeat_copy_logic": ("language modelling", 10, 0.0, 0.03, 0.031),
    "squad": ("language modelling", 10, 0.0, 0.07, 0.058),
    "coqa": ("language modelling", 0, 0.0, 0.13, 0.134),
    "boolq": ("multiple choice", 10, 0.62, 0.55, -0.178),
    "bigbench_language_identification": ("multiple choice", 10, 0.0909, 0.26, 0.182),
}
CHAT_TASKS = {
    "ARC-Easy": ("multiple choice", 0, 0.25, 0.41, None),
    "ARC-Challenge": ("multiple choice", 0, 0.25, 0.33, None),
    "MMLU": ("multiple choice", 0, 0.25, 0.31, None),
    "GSM8K": ("generation", 0, 0.0, 0.03, None),
    "HumanEval": ("generation", 0, 0.0, 0.0, None),
}
SEEDS = {"few_shot": "1234 + index", "order": 1337, "bootstrap": 42}


def results(tasks: dict, examples: int, better: float = 0.0, seed: int = 0) -> dict[str, TaskResult]:
    generator = np.random.default_rng(seed)
    return {
        name: TaskResult(kind, shots, baseline, generator.random(examples) < accuracy + (better if accuracy else 0))
        for name, (kind, shots, baseline, accuracy, _) in tasks.items()
    }


def core(examples: int = 500, references: int = 1) -> dict:
    """CORE as `jobs.base_eval` writes it, compared with an earlier step."""
    found = results(CORE_TASKS, examples)
    known = {name: task[-1] for name, task in CORE_TASKS.items()}
    larger = {f"GPT-2 {size}": more for size, more in (("124M", 0.0), ("355M", 0.07), ("774M", 0.1), ("1.5B", 0.14))}
    beside = {name: {task: value + more for task, value in known.items()} for name, more in larger.items()}
    return {
        "name": "CORE",
        "step": 120,
        "model_digest": "9c" * 32,
        "questions_hash": "3f" * 32,
        "max_per_task": examples,
        "seeds": SEEDS,
        "resamples": 10_000,
        "dtype": "bfloat16",
        "examples_per_s": 55.1,
        **summarise(found),
        "references": {
            name: {"mean": float(np.mean(list(tasks.values()))), "tasks": tasks}
            for name, tasks in list(beside.items())[:references]
        },
        "comparison": {"with": "demo, step 80", **compare(found, results(CORE_TASKS, examples, better=-0.03))},
    }


def chat_core() -> dict:
    """ChatCORE as `jobs.chat_eval` writes it, compared with nothing."""
    return {
        "name": "ChatCORE",
        "step": 60,
        "model_digest": "7d" * 32,
        "questions_hash": "b2" * 32,
        "max_per_task": None,
        "seeds": {"order": 1337, "bootstrap": 42},
        "resamples": 10_000,
        "dtype": "bfloat16",
        "examples_per_s": 12.0,
        "protections": ["a network namespace of its own", "limits of memory and time"],
        **summarise(results(CHAT_TASKS, 400)),
        "references": {},
        "comparison": None,
    }


def write_scores(run: Folder, references: int = 1) -> None:
    (run / "base").write_json("base_eval.json", {"step": 120, "core": core(references=references)})
    (run / "sft").write_json("chat_eval.json", {"step": 60, "tasks": {}, "samples": [], "chat_core": chat_core()})
    history = [(40, 0.02), (80, 0.081), (120, 0.112)]
    lines = [
        {"step": step, "name": "CORE", "value": mean, "low": mean - 0.02, "high": mean + 0.02, "max_per_task": 100}
        for step, mean in history
    ]
    (run / "base").write("evaluations.jsonl", "".join(json.dumps(line) + "\n" for line in lines))


@pytest.fixture(scope="module")
def card(tmp_path_factory) -> tuple[dict, str, str]:
    run = run_folder(str(tmp_path_factory.mktemp("storage")), "demo")
    write_scores(run)
    return build_card(run), *read(run)


def section(text: str, title: str) -> str:
    """One section of the Markdown report."""
    return text.split(f"## {title}\n")[1].split("\n## ")[0]


def test_core_and_chatcore_have_their_sections_and_figures(card):
    figures, page, text = card
    score = core()
    assert figures["core"] == score["mean"]["value"]
    assert figures["chat_core"] == chat_core()["mean"]["value"]
    for title in ("CORE", "ChatCORE"):
        assert f"<h2>{title}</h2>" in page
        assert re.search(rf"\| {title} \(\d+ tasks, 95 % interval\) \| 0\.\d+ ± 0\.0\d+ \|", section(text, "Summary"))
    low, high = score["mean"]["low"], score["mean"]["high"]
    assert f"95 % interval {low:.3f} to {high:.3f}; 11,000 questions of 22 tasks, at most 500 of each" in page
    assert "differ by less than 0.017 may differ by their seeds alone" in page


def test_every_task_has_a_row_with_its_interval_and_the_mean_ends_the_table(card):
    shown = section(card[2], "CORE")
    for name, task in core()["tasks"].items():
        row = next(line for line in shown.splitlines() if line.startswith(f"| {name.replace('_', chr(92) + '_')} |"))
        assert f"| {task['accuracy']['value']:.3f} | {task['accuracy']['low']:.3f} to " in row
        assert f"| {CORE_TASKS[name][-1]:.3f} |" in row
    assert re.search(r"\| mean \|  \|  \| 11,000 \|  \| 0\.\d+ to 0\.\d+ \| 0\.\d+ \| 0\.\d+ \|", shown)


def test_pictures_are_told_in_words(card):
    _, page, text = card
    assert re.search(
        r"- CORE by task: the interval is above guessing at 1\d of 22 tasks, below it at 1; best .+, worst boolq -0\.",
        text,
    )
    assert "CORE over steps: 0.020 at step 40 → 0.112 (0.092 to 0.132) at step 120" in text
    assert Page(page).tags.count("img") == 3
    assert re.search(r'<img alt="CORE by task: the interval', page)


def test_a_comparison_shows_differences_and_warns_of_many_tasks(card):
    shown = section(card[2], "CORE")
    assert "Compared with demo, step 80 on the same questions, CORE differs by +0.0" in shown
    assert "one task in 20 has p" in shown
    assert "| minus demo, step 80 | examples | difference | 95 % interval | p |" in shown
    assert "Compared with" not in section(card[2], "ChatCORE")


def test_provenance_tells_what_the_figures_were_made_from(card):
    made = (
        "questions 3f3f3f3f3f3f; model 9c9c9c9c9c9c; seeds: few-shot 1234 + index, order 1337, bootstrap 42; intervals"
    )
    assert f"{made} from 10,000 resamples; bfloat16; 55.1 questions per second." in card[1]
    assert "ran with: a network namespace of its own, limits of memory and time." in card[1]
    assert "was not measured" not in section(card[2], "ChatCORE")


def test_an_evaluation_without_core_shows_only_what_it_has(tmp_path):
    run = run_folder(str(tmp_path), "young")
    (run / "base").write_json("base_eval.json", {"step": 9, "val_bpb": 1.5})
    (run / "sft").write_json("chat_eval.json", {"step": 9})
    assert build_card(run)["val_bpb"] == 1.5
    page, text = read(run)
    assert "CORE" not in page
    assert "| base, evaluated at step 9 | corpus, validation | 1.5000 |" in text
    assert "corpus, training" not in text


def test_a_single_task_with_one_example_and_no_provenance_is_shown():
    score = {"name": "CORE", "step": 0, **summarise({"copa": TaskResult("schema", 0, 0.5, np.array([True]))})}
    shown = score_section(score, [])
    assert shown is not None
    assert "1 questions" not in shown.blocks[0].text
    assert score_section(None, []) is None


def test_names_from_outside_are_never_markup(tmp_path):
    run = run_folder(str(tmp_path), "demo")
    score = core()
    score["tasks"][HOSTILE] = score["tasks"]["copa"] | {"type": HOSTILE}
    score["references"][HOSTILE] = {"mean": 0.1, "tasks": {"copa": 0.1}}
    score["comparison"]["with"] = HOSTILE
    (run / "base").write_json("base_eval.json", {"step": 1, "core": score})
    build_card(run)
    page, text = read(run)
    assert "script" not in Page(page).tags
    assert "<script>" not in text


def test_history_keeps_the_newest_of_each_step_and_drops_other_measures_and_cut_lines(tmp_path):
    stage = Folder.at(tmp_path)
    assert read_history(stage, "CORE") == []
    entries = [
        {"step": 80, "name": "CORE", "value": 0.1, "max_per_task": 100},
        {"step": 40, "name": "CORE", "value": 0.2, "max_per_task": 100},
        {"step": 60, "name": "CORE", "value": 0.3, "max_per_task": None},
        {"step": 60, "name": "ChatCORE", "value": 0.4, "max_per_task": 100},
        {"step": 80, "name": "CORE", "value": 0.5, "max_per_task": 100},
    ]
    lines = [json.dumps(entry) for entry in entries]
    stage.write("evaluations.jsonl", "\n".join([lines[0], lines[1][:20], *lines[1:], lines[0][:30]]))
    assert [(entry["step"], entry["value"]) for entry in read_history(stage, "CORE")] == [(40, 0.2), (80, 0.5)]


def test_bars_and_bands_are_valid_svg_for_one_figure_and_for_many():
    many = [Bar(f"task {n}", n / 50 - 0.2, n / 50 - 0.3, n / 50) for n in range(50)]
    beside = {f"model {n}": {"task 1": 0.1, "task 2": 0.2} for n in range(6)}
    for svg in (bars(many, beside, "x"), bars(many[:1], {}, "x"), band([1], [0.1], [0.0], [0.2], "CORE")):
        assert ET.fromstring(svg).tag.endswith("svg")
        assert len(svg) < 150_000
    assert b"model 5" in bars(many, beside, "x")


def test_a_name_in_a_picture_is_not_read_as_a_formula():
    svg = bars([Bar("a$b$c", 0.1, 0.0, 0.2)], {"$1$": {"a$b$c": 0.1}}, "x")
    shown = {element.text for element in ET.fromstring(svg).iter() if element.tag.endswith("}text")}
    assert {"a$b$c", "$1$"} <= shown
