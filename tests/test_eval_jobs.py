"""jobs.base_eval and jobs.chat_eval from end to end: figures, artifacts, going on, comparing, watching, refusing."""

import json
import re
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch

from jobs import base_eval, chat_eval, report
from nanochat_ray import cli
from nanochat_ray.errors import UserError
from nanochat_ray.eval import watch as watching
from nanochat_ray.eval.watch import new_steps, watch
from nanochat_ray.storage import Folder, run_folder
from nanochat_ray.tasks.conversations import exchange
from nanochat_ray.tasks.mixture import Source, build_mixture, write_mixture
from nanochat_ray.train.checkpoint import Checkpoints
from tests.small_bundle import FILES, ITEMS, write_bundle, write_tasks
from tests.small_corpus import write_corpus
from tests.tiny_runs import make_run

QUESTIONS = ITEMS * len(FILES)
CHAT_TASKS = ["ARC-Easy", "ARC-Challenge", "MMLU", "GSM8K", "HumanEval"]


class Place:
    """A storage with tiny runs in it, and all that is asked of them."""

    def __init__(self, root: Path) -> None:
        self.root, self.storage = root, str(root / "out")
        write_corpus(root / "corpus", documents=20)
        write_bundle(root / "bundle")
        write_tasks(root / "tasks")

    def stage(self, run: str, stage: str = "base") -> Folder:
        return run_folder(self.storage, run) / stage

    def base_eval(self, *flags: str) -> int:
        place = [
            "--storage",
            self.storage,
            "--corpus",
            str(self.root / "corpus"),
            "--bundle",
            str(self.root / "bundle"),
        ]
        return cli.run(
            base_eval.main, base_eval.build_parser(), [*place, "--eval-tokens", "1024", "--dtype", "fp32", *flags]
        )

    def chat_eval(self, *flags: str) -> int:
        place = ["--storage", self.storage, "--dtype", "fp32", "--max-tokens", "8"]
        return cli.run(chat_eval.main, chat_eval.build_parser(), [*place, *flags])

    def core(self, run: str) -> dict:
        return self.stage(run).read_json("base_eval.json")["core"]

    def new_run(self, run: str, seed: int = 0) -> None:
        make_run(run_folder(self.storage, run), stages=("base", "sft"), seed=seed)


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Place:
    place = Place(tmp_path_factory.mktemp("evaluated"))
    place.new_run("one", seed=1)
    place.new_run("two", seed=2)
    return place


@pytest.fixture(scope="module")
def measured(place) -> Place:
    """The same, with CORE of run `one`."""
    assert place.base_eval("--run", "one") == 0
    return place


@pytest.fixture
def no_model(monkeypatch):
    """Whoever loads a model to ask it something fails."""

    def load(*_: object, **__: object) -> None:
        raise AssertionError("a model is loaded although nothing is left to ask")

    monkeypatch.setattr("nanochat_ray.engine.load.load_chat_model", load)


@pytest.mark.slow
def test_core_is_measured_with_its_origin_and_every_answer_is_kept(place, capsys):
    assert place.base_eval("--run", "one", "--json") == 0
    out = capsys.readouterr().out
    figures = json.loads(out.splitlines()[-1])
    stored = place.stage("one").read_json("base_eval.json")
    assert {**stored, "status": "done", "artifacts": figures["artifacts"]} == figures
    core = stored["core"]
    assert set(core["tasks"]) == set(FILES)
    assert [core["tasks"][task]["examples"] for task in FILES] == [ITEMS] * 3
    centred = [task["centred"]["value"] for task in core["tasks"].values()]
    assert core["mean"]["value"] == pytest.approx(sum(centred) / 3)
    assert core["mean"]["low"] <= core["mean"]["value"] <= core["mean"]["high"]
    assert core["references"]["GPT-2 124M"]["mean"] == 0.15
    assert (core["title"], core["step"], core["max_per_task"]) == ("one, base, step 7", 7, None)
    assert core["model_digest"] == Checkpoints.of(place.stage("one")).digest(7)
    assert re.search(rf"CORE: {QUESTIONS}/{QUESTIONS} questions \| .*/s \| workers 1 \| in ", out)
    assert re.search(rf"\nCORE +{QUESTIONS} +\[.*\] +[+-]0\.\d+ +\+0\.150\n", out)

    rows = pq.read_table(core["results"]).to_pylist()
    assert len(rows) == QUESTIONS
    right = sum(row["correct"] for row in rows if row["task"] == "pronouns")
    assert core["tasks"]["pronouns"]["accuracy"]["value"] == right / ITEMS
    (line,) = place.stage("one").read("evaluations.jsonl").decode().splitlines()
    assert json.loads(line) == {"name": "CORE", "step": 7, "max_per_task": None, **core["mean"]}


@pytest.mark.slow
def test_the_report_card_shows_it(measured, capsys):
    flags = ["--storage", measured.storage, "--run", "one"]
    assert cli.run(report.main, report.build_parser(), flags) == 0
    text = (run_folder(measured.storage, "one") / "report").read("report.md").decode()
    assert f"CORE {measured.core('one')['mean']['value']:.3f} ±" in text
    assert "pronouns" in text
    assert measured.core("one")["model_digest"][:12] in text


@pytest.mark.slow
def test_the_same_command_asks_nothing_again(measured, capsys, no_model):
    before = measured.core("one")
    written = Path(before["results"]).stat().st_mtime_ns
    assert measured.base_eval("--run", "one") == 0
    assert f"CORE: all {QUESTIONS} questions were answered before" in capsys.readouterr().out
    assert Path(before["results"]).stat().st_mtime_ns == written
    assert {**measured.core("one"), "examples_per_s": None} == {**before, "examples_per_s": None}


@pytest.mark.slow
def test_fewer_questions_are_another_exam_and_the_answers_to_the_first_stay(place, capsys):
    place.new_run("fewer", seed=1)
    assert place.base_eval("--run", "fewer") == 0
    whole = place.core("fewer")
    assert place.base_eval("--run", "fewer", "--max-per-task", "3") == 0
    few = place.core("fewer")
    assert [task["examples"] for task in few["tasks"].values()] == [3, 3, 3]
    assert few["results"] != whole["results"]
    assert len(pq.read_table(whole["results"])) == QUESTIONS
    assert len(place.stage("fewer").read("evaluations.jsonl").splitlines()) == 2


@pytest.mark.slow
def test_without_a_bundle_the_bits_are_measured_and_what_was_known_of_these_weights_stays(place, capsys, no_model):
    place.new_run("bits")
    assert place.base_eval("--run", "bits", "--bundle", "none") == 0
    assert "CORE was not measured; --bundle" in capsys.readouterr().out
    found = place.stage("bits").read_json("base_eval.json")
    assert found["val_bpb"] > 0
    assert "core" not in found

    for digest, stays in (("another", False), (Checkpoints.of(place.stage("bits")).digest(7), True)):
        place.stage("bits").write_json("base_eval.json", {**found, "core": {"model_digest": digest}})
        assert place.base_eval("--run", "bits", "--bundle", "none") == 0
        assert ("core" in place.stage("bits").read_json("base_eval.json")) is stays


@pytest.mark.slow
def test_an_interrupted_evaluation_goes_on(place, capsys, monkeypatch):
    from nanochat_ray.eval import exam

    place.new_run("interrupted", seed=1)
    judge, judged = exam.judge, []

    def interrupted(*args: object) -> object:
        judged.append(args)
        if len(judged) > ITEMS + 3:
            raise KeyboardInterrupt
        return judge(*args)

    with monkeypatch.context() as patch:
        patch.setattr(exam, "judge", interrupted)
        assert place.base_eval("--run", "interrupted") == 1
    assert capsys.readouterr().err.endswith("error: interrupted; run the same command again to continue\n")
    (folder,) = (place.stage("interrupted") / "evaluations").list()
    parts = Path(str(place.stage("interrupted"))) / "evaluations" / folder
    (part,) = parts.glob("part_*.parquet")
    table = pq.read_table(part)
    assert len(table) == ITEMS
    marked = table.to_pylist()[0]
    rows = [{**row, "prediction": "kept"} if row == marked else row for row in table.to_pylist()]
    pq.write_table(table.from_pylist(rows, schema=table.schema), part)

    assert place.base_eval("--run", "interrupted") == 0
    assert f"CORE: {ITEMS} of {QUESTIONS} questions are done, going on" in capsys.readouterr().out
    assert [file.name for file in parts.iterdir()] == ["results.parquet"]
    kept = [row for row in pq.read_table(parts / "results.parquet").to_pylist() if row["prediction"] == "kept"]
    assert [(row["task"], row["index"]) for row in kept] == [(marked["task"], marked["index"])]


@pytest.mark.slow
def test_two_runs_are_compared_on_the_same_questions(measured, capsys):
    assert measured.base_eval("--run", "two", "--compare", "one") == 0
    assert "compared with one, base, step 7" in capsys.readouterr().out
    ours, theirs = measured.core("two"), measured.core("one")
    comparison = ours["comparison"]
    assert comparison["with"] == "one, base, step 7"
    assert comparison["mean"]["value"] == pytest.approx(ours["mean"]["value"] - theirs["mean"]["value"])
    assert comparison["tasks"]["colours"]["examples"] == ITEMS
    assert measured.base_eval("--run", "one", "--compare", "one") == 0
    same = measured.core("one")["comparison"]
    assert (same["mean"]["value"], same["mean"]["p"]) == (0.0, 1.0)


@pytest.mark.slow
def test_what_cannot_be_compared_is_said_before_anything_is_asked(measured, capsys, no_model):
    assert measured.base_eval("--run", "two", "--compare", "one", "--max-per-task", "5") == 1
    asked = r"one, base, step 7 was asked other questions \(all of each task\).*--max-per-task"
    assert re.search(asked, one_error(capsys))
    measured.new_run("unmeasured")
    assert measured.base_eval("--run", "two", "--compare", "unmeasured") == 1
    assert "there is nothing to compare with; evaluate that run first" in one_error(capsys)
    lost = {**measured.core("one"), "results": str(measured.root / "gone" / "results.parquet")}
    measured.stage("unmeasured").write_json("base_eval.json", {"core": lost})
    assert measured.base_eval("--run", "two", "--compare", "unmeasured") == 1
    assert re.search(r"gone/results\.parquet, to compare with, is gone; evaluate one, base", one_error(capsys))


@pytest.mark.slow
def test_each_checkpoint_is_measured_while_it_is_trained(place, capsys, monkeypatch):
    given_way: list[int] = []
    monkeypatch.setattr(watching, "LOOK_EVERY_S", 0.02)
    monkeypatch.setattr("os.nice", given_way.append)
    stage, run = place.stage("watched"), run_folder(place.storage, "watched")

    def train() -> None:
        time.sleep(0.1)
        for step, seed in ((2, 2), (7, 7)):
            make_run(run, stages=("base",), seed=seed, step=step)
            deadline = time.monotonic() + 60
            while not (stage.exists("evaluations.jsonl") and f'"step": {step},' in history()):
                assert time.monotonic() < deadline
                time.sleep(0.02)

    def history() -> str:
        return stage.read("evaluations.jsonl").decode()

    training = threading.Thread(target=train, daemon=True)
    training.start()
    assert place.base_eval("--run", "watched", "--watch", "--json") == 0
    training.join()
    out = capsys.readouterr().out.splitlines()
    lines = [json.loads(line) for line in history().splitlines()]
    assert [(line["name"], line["step"]) for line in lines] == [("CORE", 2), ("CORE", 7)]
    assert json.loads(out[-1])["core"] == {str(line["step"]): line["value"] for line in lines}
    assert out[0] == f"waiting for a checkpoint in {stage / 'checkpoints'}"
    assert set(given_way) == {watching.NICENESS}
    for step in (2, 7):
        assert f"watched, base, step {step}" in out


def write_checkpoint(stage: Folder, step: int, last: int = 7) -> None:
    """One without weights worth the name."""
    from dataclasses import replace

    from nanochat_ray.plan import make_plan
    from nanochat_ray.stream.cursor import Cursor, StreamIdentity
    from nanochat_ray.train.checkpoint import TrainState

    plan = replace(make_plan(depth=2, vocab_size=300, steps=last))
    cursor = Cursor(StreamIdentity("", "", 64, 4, 4, 42), step, step)
    Checkpoints.of(stage).save(TrainState(plan, cursor), {"w": torch.zeros(1)}, {})


def script(*acts: Callable[[], object]) -> Callable[[float], object]:
    """A sleep during which things happen, one after the other."""
    left = iter(acts)
    return lambda seconds: next(left)()


def test_only_the_newest_checkpoint_is_measured_until_the_plans_last(tmp_path, capsys):
    stage = Folder.at(tmp_path)

    def write(*steps: int) -> Callable[[], None]:
        return lambda: [write_checkpoint(stage, step) for step in steps]

    steps = new_steps(stage, script(lambda: None, write(2), lambda: None, write(4, 5), write(7)))
    assert list(steps) == [2, 5, 7]
    waits = [line.removesuffix(str(tmp_path / "checkpoints")) for line in capsys.readouterr().out.splitlines()]
    expected = ["waiting for a checkpoint", *(f"waiting for a checkpoint after step {step}" for step in (2, 5))]
    assert waits == [f"{line} in " for line in expected]


def test_a_checkpoint_that_training_deletes_meanwhile_is_left_out_and_any_other_failure_ends_it(tmp_path, capsys):
    stage = Folder.at(tmp_path)
    for step in (2, 5):
        write_checkpoint(stage, step)

    def measure(step: int) -> float:
        if step == 5:
            (stage / "checkpoints" / "step_000005").delete()
            write_checkpoint(stage, 7)
            raise UserError("checkpoint step_000005 cannot be used")
        return 0.5

    def write_last(seconds: float) -> None:
        raise AssertionError("nothing to wait for")

    assert watch(stage, measure, write_last) == {7: 0.5}
    assert "the checkpoint of step 5 was deleted while it was measured; going on" in capsys.readouterr().err

    def fail(step: int) -> float:
        raise UserError("no room is left")

    with pytest.raises(UserError, match="no room"):
        watch(stage, fail)


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--eval-workers", "0"], "0 must be at least 1"),
        (["--eval-workers", "2:4"], "invalid"),
        (["--max-per-task", "0"], "0 must be at least 1"),
        (["--bundle", "none", "--watch"], "--bundle none leaves out"),
        (["--bundle", "none", "--compare", "b"], "--bundle none leaves out"),
        (["--bundle", "none", "--hf", "x"], "--bundle none leaves out"),
        (["--hf", "x", "--watch"], "there are no checkpoints to --watch"),
        (["--trust-code"], "--trust-code is about the model of --hf"),
        (["--run", "../x"], "--run"),
    ],
)
def test_wrong_flags_are_wrong_usage(tmp_path, capsys, flags, said):
    try:
        code = cli.run(base_eval.main, base_eval.build_parser(), ["--storage", str(tmp_path), *flags])
    except SystemExit as end:
        code = end.code
    assert code == 2
    assert said in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_too_few_questions_are_wrong_usage_and_the_remedy_is_said(place, capsys, no_model):
    assert place.base_eval("--run", "one", "--max-per-task", "2") == 2
    assert "2 examples of colours are too few" in one_error(capsys)


def one_error(capsys: pytest.CaptureFixture[str]) -> str:
    """What was said last, which must be one line."""
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert "this is a bug" not in line
    return line


def test_a_run_or_a_model_that_is_not_there_is_one_line(place, capsys):
    assert place.base_eval("--run", "nobody") == 1
    assert "no run named 'nobody'" in one_error(capsys)
    assert place.base_eval("--hf", str(place.root / "nowhere")) == 1
    assert re.search(r"no weights \(\*\.safetensors, \*\.bin\) in .*nowhere; --hf wants", one_error(capsys))
    assert place.base_eval("--hf", str(place.root / "bundle")) == 1
    assert "no weights" in one_error(capsys)
    assert place.chat_eval("--run", "nobody") == 1
    assert "no run named 'nobody'" in one_error(capsys)


@pytest.mark.slow
def test_a_damaged_bundle_is_one_line_before_a_model_is_loaded(place, capsys, tmp_path, no_model):
    (write_bundle(tmp_path) / "eval_data" / FILES["endings"]).write_text("{}\n")
    assert place.base_eval("--run", "one", "--bundle", str(tmp_path)) == 1
    assert "item 1 has no 'context' of type str" in one_error(capsys)


@pytest.fixture(scope="module")
def asked(place) -> Place:
    """Chat models with ChatCORE's figures, the second with held-out questions as well."""
    held_out = [exchange(f"What is {number} + {number}?", f"{2 * number}") for number in range(6)]
    mixture = build_mixture([Source("arithmetic", held_out, held_out, 1.0)], seed=42)
    write_mixture(mixture, place.stage("two", "sft") / "data")
    for run in ("one", "two"):
        assert place.chat_eval("--run", run, "--tasks", str(place.root / "tasks")) == 0
    return place


@pytest.mark.slow
def test_chat_core_has_its_five_tasks_and_held_out_questions_stand_beside(asked, capsys):
    assert asked.chat_eval("--run", "two", "--tasks", str(asked.root / "tasks"), "--compare", "one", "--json") == 0
    out = capsys.readouterr().out
    figures = json.loads(out.splitlines()[-1])
    stored = asked.stage("two", "sft").read_json("chat_eval.json")
    assert {**stored, "status": "done", "artifacts": figures["artifacts"]} == figures
    chat_core = stored["chat_core"]
    assert list(chat_core["tasks"]) == CHAT_TASKS
    assert [task["baseline"] for task in chat_core["tasks"].values()] == [0.25, 0.25, 0.25, 0.0, 0.0]
    assert chat_core["protections"]
    assert chat_core["comparison"]["with"] == "one, sft, step 7"
    assert set(stored["tasks"]) == {"arithmetic"}
    assert stored["tasks"]["arithmetic"]["examples"] == 6
    assert stored["samples"][0]["question"].startswith("What is ")
    assert "ChatCORE: all 26 questions were answered before" in out
    assert re.search(r"\nChatCORE +20 +\[", out)
    assert re.search(r"\narithmetic +\d+\.\d% +6 +\d+\n", out)
    written = pq.read_table(chat_core["results"]).to_pylist()
    assert {row["task"] for row in written} == {*CHAT_TASKS, "arithmetic"}


@pytest.mark.slow
def test_another_length_of_replies_is_another_exam(asked, capsys):
    tasks = str(asked.root / "tasks")
    before = asked.stage("one", "sft").read_json("chat_eval.json")["chat_core"]
    assert asked.chat_eval("--run", "one", "--tasks", tasks, "--max-tokens", "2") == 0
    assert "answered before" not in capsys.readouterr().out
    after = asked.stage("one", "sft").read_json("chat_eval.json")["chat_core"]
    assert after["results"] != before["results"]


@pytest.mark.slow
def test_its_report_card_shows_chat_core(asked):
    flags = ["--storage", asked.storage, "--run", "two"]
    assert cli.run(report.main, report.build_parser(), flags) == 0
    text = (run_folder(asked.storage, "two") / "report").read("report.md").decode()
    for each in ("ChatCORE", *CHAT_TASKS, "arithmetic"):
        assert each in text


@pytest.mark.slow
def test_without_chat_cores_tasks_the_held_out_questions_are_asked(asked, capsys):
    assert asked.chat_eval("--run", "two", "--tasks", "none", "--max-per-task", "2") == 0
    out = capsys.readouterr().out
    found = asked.stage("two", "sft").read_json("chat_eval.json")
    assert found["tasks"]["arithmetic"]["examples"] == 2
    assert "chat_core" not in found
    assert "held-out: 2/2 questions" in out
    assert "ChatCORE" not in out


@pytest.mark.slow
def test_a_finished_run_is_watched_to_its_end_at_once(asked, capsys, monkeypatch, no_model):
    monkeypatch.setattr("os.nice", None)
    assert asked.chat_eval("--run", "one", "--tasks", str(asked.root / "tasks"), "--watch") == 0
    assert "ChatCORE: all 20 questions were answered before" in capsys.readouterr().out
    (line,) = map(json.loads, asked.stage("one", "sft").read("evaluations.jsonl").decode().splitlines())
    assert (line["name"], line["step"]) == ("ChatCORE", 7)


@pytest.mark.parametrize(
    ("flags", "code", "said"),
    [
        (["--tasks", "none"], 1, "nothing to ask: .* holds out no questions; say with --tasks"),
        ([], 1, "nothing to ask"),
        (["--tasks", "none", "--watch"], 2, "--watch and --compare are about ChatCORE; say with --tasks"),
        (["--compare", "two"], 2, "--watch and --compare are about ChatCORE"),
        (["--tasks", "nowhere"], 1, r"no test-\*\.parquet in .*nowhere/arc/ARC-Easy"),
    ],
)
def test_a_chat_model_that_cannot_be_asked_is_one_line(place, capsys, no_model, flags, code, said):
    assert place.chat_eval("--run", "one", *flags) == code
    assert re.search(said, one_error(capsys))


@pytest.mark.slow
@pytest.mark.ray
def test_several_processes_wherever_they_stand_find_what_one_finds(measured, ray_cluster, capsys, monkeypatch):
    measured.new_run("spread", seed=1)
    alone = measured.core("one")
    monkeypatch.chdir(measured.root)  # the cluster's processes stand where the tests were started
    assert measured.base_eval("--run", "spread", "--storage", "out", "--eval-workers", "2") == 0
    assert re.search(rf"CORE: {QUESTIONS}/{QUESTIONS} questions", capsys.readouterr().out)
    spread = measured.core("spread")
    assert spread["tasks"] == alone["tasks"]
    ours, theirs = (pq.read_table(core["results"]).to_pylist() for core in (spread, alone))
    for one, other in zip(ours, theirs, strict=True):
        assert one.pop("scores") == pytest.approx(other.pop("scores"), abs=1e-5)
        assert one == other
