"""The report card: what it shows of a whole run, of a part of one, and of hostile text."""

import json
import math
import os
import random
import re
import subprocess
import sys
import xml.etree.ElementTree as ET
from html.parser import HTMLParser
from pathlib import Path

import pytest

from jobs import report
from nanochat_ray import cli
from nanochat_ray.errors import UserError
from nanochat_ray.plan import make_plan, sft_plan
from nanochat_ray.report import build_card
from nanochat_ray.report.document import Document, Sample, Samples, Section, Table, Text, printable
from nanochat_ray.report.goodput import Prices
from nanochat_ray.report.html import to_html
from nanochat_ray.report.markdown import to_markdown
from nanochat_ray.report.plots import MAX_POINTS, curve, moving_average, thin, timeline
from nanochat_ray.storage import Folder, run_folder

HOSTILE = '<script>alert("x")</script> `code` | # *not* [markup](x)'


class Page(HTMLParser):
    """The tags, text and references of a page; fails when tags do not close in order."""

    VOID = frozenset({"meta", "img", "br"})

    def __init__(self, page: str):
        super().__init__()
        self.tags: list[str] = []
        self.open: list[str] = []
        self.references: list[str] = []
        self.text = ""
        self.feed(page)
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.references += [value for name, value in attrs if name in ("src", "href")]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


def events(steps: int, *, seed: int, batch: int, chat: bool = False) -> str:
    """Events as the trainer writes them, of a run that fell and recovered as runs do."""
    noise = random.Random(seed)
    lines = [{"kind": "start", "step": 0, "workers": 1, "dtype": "torch.bfloat16", "mode": "eager", "threads": 2}]
    for step in range(steps):
        loss = (1.2 if chat else 4.2) + (2.0 if chat else 4.1) * math.exp(-6 * step / steps) + noise.gauss(0, 0.05)
        lines.append(
            {
                "kind": "step",
                "step": step,
                "tokens": (step + 1) * batch,
                "loss": loss,
                "lr": min(1.0, (step + 1) / 15),
                "stream_hash": f"{step:016x}",
                "workers": 1,
                "seconds": 1.5 + noise.random() / 5,
                "data_wait_s": 0.01,
                "tok_per_s": 5000 + noise.gauss(0, 120),
                "mfu": 0.41,
                "cropped_tokens": 400,
                "padding_tokens": batch // 64 if chat else 0,
                "targets": batch // 2 if chat else batch,
            }
        )
        if (step + 1) % 30 == 0 or step + 1 == steps:
            lines.append({"kind": "eval", "step": step + 1, "val_bpb": 1.3 + 1.9 * math.exp(-4 * step / steps)})
    lines.append({"kind": "checkpoint", "step": steps, "bytes": 73_000_000})
    lines.append({"kind": "finish", "step": steps, "tokens": steps * batch})
    return "".join(json.dumps({"time": 0.0, **line}) + "\n" for line in lines)


def write_run(run: Folder, *, steps_done: int = 150) -> None:
    """All artifacts of a tiny run, as the jobs write them."""
    plan = make_plan(preset="tiny", steps=150)
    texts = {"demo (validation)": (3.41, 3.55), "python": (2.92, 2.38), HOSTILE: (1.5, 1.6)}
    (run / "tokenizer").write_json(
        "tokenizer.json",
        {"vocab_size": 4096, "fingerprint": "0f" * 32, "training": {"documents": 3712, "chars": 15_200_000}},
    )
    rows = [
        {"text": text, "encoding": name, "bytes": 1000, "tokens": 300, "bytes_per_token": value}
        for text, values in texts.items()
        for name, value in zip(("ours", "gpt2"), values, strict=True)
    ]
    (run / "tokenizer").write_json(
        "eval.json",
        {
            "vocab_size": 4096,
            "references": {"gpt2": 50257, "cl100k_base": None},
            "rows": rows,
            "encode_mb_per_s": {"1": 6.5},
            "decode_mb_per_s": 30.1,
            "round_trip": True,
        },
    )
    base, sft = run / "base", run / "sft"
    base.write_json("plan.json", plan.to_dict())
    base.write("events.jsonl", events(steps_done, seed=0, batch=plan.batch_tokens))
    samples = [
        {"prompt": "Return the absolute value of", "text": " the argument.\n\nThe argument may be an integer"},
        {"prompt": HOSTILE, "text": "a ``` fence \x1b[31m and a bell \x07"},
    ]
    base_eval = {"step": 150, "train_bpb": 1.31, "val_bpb": 1.357, "tokens_per_split": 65536, "samples": samples}
    base.write_json("base_eval.json", base_eval)
    sft.write_json("plan.json", sft_plan(plan, 60 * plan.rows_per_step).to_dict())
    sft.write("events.jsonl", events(60, seed=1, batch=plan.batch_tokens, chat=True))
    sft.write_json(
        "chat_eval.json",
        {
            "step": 60,
            "tasks": {
                "documentation": {"accuracy": 0.62, "examples": 50, "tool_calls": 0},
                "arithmetic": {"accuracy": 0.94, "examples": 50, "tool_calls": 50},
                "chats": {"accuracy": None, "examples": 4, "tool_calls": 0},
            },
            "samples": [
                {"source": "arithmetic", "question": "What is 12 * 31?", "answer": "[12*31 → 372] 372"},
                {"source": "chats", "question": HOSTILE, "answer": HOSTILE},
            ],
        },
    )
    stages = [
        {"stage": name, "seconds": seconds, "status": "done"}
        for name, seconds in [("tokenizer", 21.4), ("pretrain", 262.0)]
    ]
    (run / "report").write_json("stages.json", stages)


@pytest.fixture
def run(tmp_path: Path) -> Folder:
    folder = run_folder(str(tmp_path), "demo")
    write_run(folder)
    return folder


@pytest.fixture(scope="module")
def card(tmp_path_factory) -> tuple[dict, str, str]:
    """Figures, HTML and Markdown of a whole run."""
    folder = run_folder(str(tmp_path_factory.mktemp("storage")), "demo")
    write_run(folder)
    return build_card(folder), *read(folder)


def read(run: Folder) -> tuple[str, str]:
    return (run / "report").read("report.html").decode(), (run / "report").read("report.md").decode()


def test_a_whole_run_is_shown_with_every_part(card):
    figures, page, text = card
    for title in ("Summary", "Pretraining", "Finetuning", "Chat", "Bits per byte", "Tokenizer", "Wall time", "Machine"):
        assert f"<h2>{title}" in page
        assert f"## {title}" in text
    assert figures["not_run"] == []
    assert "Not run" not in page
    assert figures["val_bpb"] == 1.357
    assert figures["chat_accuracy"] == pytest.approx(0.78)
    assert figures["tokens"] == 150 * make_plan(preset="tiny").batch_tokens
    assert figures["seconds"] == pytest.approx(283.4)
    for shown in ("7,340,162", "1.3570", "62.0%", "not scored", "4 min 43 s", "12 * 31", "cl100k_base not available"):
        assert shown.lower() in Page(page).text.lower()


def test_the_page_is_well_formed_self_contained_and_runs_nothing(card):
    page = Page(card[1])
    assert "script" not in page.tags
    assert "link" not in page.tags
    assert page.tags.count("img") == 6
    assert all(reference.startswith("data:image/svg+xml;base64,") for reference in page.references)


def test_text_of_models_and_data_is_never_markup(card):
    _, page, text = card
    assert HOSTILE in Page(page).text
    assert "\x1b" not in page + text
    outside_fences = re.sub(r"(`{3,})text\n.*?\n\1", "", text, flags=re.DOTALL)
    assert "<script>" not in outside_fences
    assert "[markup](x)" not in outside_fences
    rows = [line for line in text.splitlines() if "alert" in line and line.startswith("|")]
    assert [len(re.findall(r"(?<!\\)\|", row)) for row in rows] == [4]


def test_of_padded_rows_it_is_shown_how_full_they_are_and_how_much_is_trained_on(card):
    before, after = card[2].split("## Finetuning")
    assert "| positions filled by packing | 98.4% |" in after
    assert "| positions that are trained on | 50.0% |" in after
    assert "filled by packing" not in before


def test_a_run_with_only_a_tokenizer_says_what_was_not_run(tmp_path):
    run = run_folder(str(tmp_path), "young")
    (run / "tokenizer").write_json("tokenizer.json", {"vocab_size": 4096, "fingerprint": "ab" * 32, "training": {}})
    figures = build_card(run)
    page, text = read(run)
    assert figures["not_run"] == ["tokenizer_eval", "pretrain", "base_eval", "sft", "chat_eval"]
    assert "<h2>Not run</h2>" in page
    assert "python -m jobs.pretrain --run young" in page
    assert "Pretraining" not in Page(page).text
    assert "4,096 tokens" in text


def test_a_run_in_the_middle_says_how_far_it_came(tmp_path):
    run = run_folder(str(tmp_path), "half")
    write_run(run, steps_done=70)
    build_card(run)
    assert "Not finished: 70 of 150 steps are done." in read(run)[0]


def test_events_cut_off_by_a_kill_are_read_up_to_the_cut(run):
    whole = (run / "base").read("events.jsonl").decode()
    (run / "base").write("events.jsonl", whole[: len(whole) // 2])
    assert 0 < build_card(run)["steps"] < 150


def test_events_without_optional_fields_are_enough(run):
    lines = [
        {"kind": "step", "step": n, "tokens": n + 1, "loss": 5.0 - n, "stream_hash": "", "workers": 2, "tok_per_s": 9}
        for n in range(3)
    ]
    (run / "base").write("events.jsonl", "".join(json.dumps(line) + "\n" for line in lines))
    assert build_card(run)["loss"] == 3.0


def interrupted_run(run: Folder) -> None:
    """Pretraining of 100 steps: half of them on 4 workers, a kill that costs 10 steps, then the rest on 2."""
    write_run(run, steps_done=1)
    numbers = {"loss": 3.0, "tok_per_s": 5000.0, "stream_hash": "", "seconds": 9.0, "data_wait_s": 1.0}
    began = 1.7e9
    lines = [{"kind": "start", "time": began + 60, "step": 0, "workers": 4, "attempt": "a", "attempt_began": began}]
    for step in range(50):
        lines.append({"kind": "step", "time": began + 69 + 9 * step, "step": step, "tokens": step + 1, "workers": 4})
    lines.append({"kind": "lost", "time": began + 600, "began": began + 510, "step": 50, "steps": 10, "workers": 4})
    again = {"step": 50, "workers": 2, "attempt": "a", "waited_for_capacity_s": 100.0}
    lines.append({"kind": "start", "time": began + 720, **again})
    for step in range(50, 100):
        time = began + 729 + 9 * (step - 50)
        lines.append({"kind": "step", "time": time, "step": step, "tokens": step + 1, "workers": 2})
    (run / "base").write("events.jsonl", "".join(json.dumps({**numbers, **line}) + "\n" for line in lines))


def test_an_interrupted_run_shows_where_its_time_and_money_went(tmp_path):
    run = run_folder(str(tmp_path), "spot")
    interrupted_run(run)
    figures = build_card(run, Prices(spot=1.0, on_demand=3.0))
    page, text = read(run)
    useful, everything = 4 * 50 * 8 + 2 * 50 * 8, 4 * 600 + 2 * 570
    assert figures["goodput"] == pytest.approx(useful / everything)
    assert "| useful | 40 min 00 s | 67.8% | $0.67 | $2.00 |" in text
    assert "| waiting for capacity | 3 min 20 s | 5.6% | $0.06 | $0.17 |" in text
    assert "| together | 59 min 00 s | 100.0% | $0.98 | $2.95 |" in text
    assert "1: last step to next step, with machines enough: 1 killed (median 29 s)" in text
    assert "| steps lost and done again | 10 |" in text
    calm = everything - (4 * 61 + 2 * 21) - 4 * 90 - 2 * 100  # without starts, repeated work and waiting
    assert figures["money"]["spot"] == pytest.approx(everything / 3600)
    assert figures["money"]["on_demand"] == pytest.approx(3 * calm / 3600)
    assert "% saved" in Page(page).text
    assert "Workers over time" in Page(page).text


def test_without_prices_nothing_is_said_of_money(tmp_path):
    run = run_folder(str(tmp_path), "spot")
    interrupted_run(run)
    assert "money" not in build_card(run)
    assert "cost" not in read(run)[1].split("## Finetuning")[0]
    assert "| useful | 40 min 00 s | 67.8% |" in read(run)[1]


def test_the_job_prints_the_cost_by_label(tmp_path, capsys):
    interrupted_run(run_folder(str(tmp_path), "spot"))
    flags = ["--storage", str(tmp_path), "--run", "spot", "--spot-price", "1"]
    assert cli.run(report.main, report.build_parser(), [*flags, "--on-demand-price", "3"]) == 0
    shown = capsys.readouterr().out
    assert re.search(r"repeated work +\$0.10 +\$0.30", shown)
    assert re.search(r"together +\$0.98 +\$2.95", shown)
    assert "saved." in shown
    assert cli.run(report.main, report.build_parser(), flags) == 0
    assert re.search(r"together +\$0.98$", capsys.readouterr().out, re.MULTILINE)
    with pytest.raises(SystemExit):
        report.build_parser().parse_args(["--spot-price", "0"])


def test_a_timeline_is_valid_svg_of_bounded_size_and_keeps_every_worker_second():
    stretches = [(0.5 + n % 3, n % 17, ("work", "wait")[n % 2]) for n in range(20_000)]
    svg = timeline(stretches, {"work": "#2457a6", "unused": "#000000", "wait": "#c3cad3"})
    assert ET.fromstring(svg).tag.endswith("svg")
    assert len(svg) < 150_000
    assert b"wait" in svg
    assert b"unused" not in svg
    assert ET.fromstring(timeline([(0.25, 2, "work")], {"work": "#2457a6"})).tag.endswith("svg")


def test_a_damaged_artifact_is_named(run):
    (run / "base").write("base_eval.json", "{")
    with pytest.raises(UserError, match=r"base/base_eval\.json is not valid JSON"):
        build_card(run)


def test_a_run_that_does_not_exist_is_an_error(tmp_path):
    with pytest.raises(UserError, match="there is no run at"):
        build_card(run_folder(str(tmp_path), "nothing"))


def test_the_environment_is_not_in_the_report(run, monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", "very-secret-value")
    build_card(run)
    for text in read(run):
        assert "very-secret-value" not in text
        assert os.environ["PATH"] not in text
        assert str(Path.cwd()) not in text


def test_the_same_run_gives_the_same_plots(run, card):
    build_card(run)
    assert Page(read(run)[0]).references == Page(card[1]).references


def test_the_job_reports_its_artifacts(run, tmp_path):
    command = [sys.executable, "-m", "jobs.report", "--storage", str(tmp_path), "--run", "demo", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    answer = json.loads(done.stdout.splitlines()[-1])
    assert answer["status"] == "done"
    assert Path(answer["artifacts"]["report_html"]).is_file()
    assert Path(answer["artifacts"]["report_md"]).is_file()


def test_a_curve_is_valid_svg_of_bounded_size_even_for_one_point_or_very_many():
    one, many = curve([1], [4.2], "loss"), curve(range(100_000), [1.0] * 100_000, "loss", smooth=True)
    for svg in (one, many):
        assert ET.fromstring(svg).tag.endswith("svg")
        assert len(svg) < 150_000


def test_thinning_keeps_short_curves_and_means_of_long_ones():
    assert thin([1, 2, 3], [4.0, 5.0, 6.0]) == ([1, 2, 3], [4, 5, 6])
    x, y = thin(range(10 * MAX_POINTS), [7.0] * (10 * MAX_POINTS))
    assert len(x) == MAX_POINTS
    assert set(y) == {7.0}
    assert x[0] == pytest.approx(4.5)


def test_the_moving_average_of_a_constant_is_that_constant_from_the_first_step():
    assert moving_average([3.0] * 50) == pytest.approx([3.0] * 50)


def test_printable_drops_control_characters_and_cuts_long_text():
    assert printable("a\x00b\nc") == "a�b\nc"
    assert printable("x" * 20, limit=5) == "xxxxx …"


def test_both_formats_write_every_kind_of_block():
    blocks = (Text("plain"), Table(("a", "b"), (("1", "2"),), right=(1,)), Samples((Sample("l", "given", "said"),)))
    document = Document("T", "S", (Section("one", blocks), Section("two", (Text("hidden"),), folded=True)))
    page = Page(to_html(document))
    assert "details" in page.tags
    for word in ("plain", "given", "said", "hidden"):
        assert word in page.text
        assert word in to_markdown(document)
    assert "| --- | ---: |" in to_markdown(document)
