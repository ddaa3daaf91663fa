"""jobs.base_eval from end to end: figures, artifacts, what is asked again, comparing, and what is refused."""

import json
import re
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from jobs import base_eval, report
from nanochat_ray import cli
from nanochat_ray.storage import run_folder
from nanochat_ray.train.checkpoint import Checkpoints
from tests.evaluated_place import Place, forbid_models, one_error
from tests.small_bundle import FILES, ITEMS, write_bundle

QUESTIONS = ITEMS * len(FILES)


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
    forbid_models(monkeypatch)


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

    rows = pq.read_table(place.results(core, "one")).to_pylist()
    assert len(rows) == QUESTIONS
    right = sum(row["correct"] for row in rows if row["task"] == "pronouns")
    assert core["tasks"]["pronouns"]["accuracy"]["value"] == right / ITEMS
    (line,) = place.stage("one").read("evaluations.jsonl").decode().splitlines()
    assert json.loads(line).items() >= {"name": "CORE", "step": 7, "max_per_task": None, **core["mean"]}.items()


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
    written = measured.results(before, "one").stat().st_mtime_ns
    assert measured.base_eval("--run", "one") == 0
    assert f"CORE: all {QUESTIONS} questions were answered before" in capsys.readouterr().out
    assert measured.results(before, "one").stat().st_mtime_ns == written
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
    assert len(pq.read_table(place.results(whole, "fewer"))) == QUESTIONS
    assert len(place.stage("fewer").read("evaluations.jsonl").splitlines()) == 2


HALF = {"value": 0.5, "low": 0.4, "high": 0.6}
SCORE = {"mean": HALF, "tasks": {"a": {"examples": 1, "accuracy": HALF, "centred": HALF}}}


@pytest.mark.slow
def test_without_a_bundle_the_bits_are_measured_and_what_was_known_of_these_weights_stays(place, capsys, no_model):
    place.new_run("bits")
    assert place.base_eval("--run", "bits", "--bundle", "none") == 0
    assert "CORE was not measured; --bundle" in capsys.readouterr().out
    found = place.stage("bits").read_json("base_eval.json")
    assert found["val_bpb"] > 0
    assert "core" not in found

    for digest, stays in (("another", False), (Checkpoints.of(place.stage("bits")).digest(7), True)):
        place.stage("bits").write_json("base_eval.json", {**found, "model_digest": digest, "core": SCORE})
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
    assert sorted(file.name for file in parts.iterdir()) == ["results.parquet", "score.json"]
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
    assert measured.base_eval("--run", "two", "--compare", "nobody") == 1
    assert "runs/nobody/base, to compare with; check --compare" in one_error(capsys)
    stage, score = measured.stage("unmeasured"), measured.core("one")
    stage.write_json("base_eval.json", {"step": 7, "core": {**score, "mean": None}})
    assert measured.base_eval("--run", "two", "--compare", "unmeasured") == 1
    assert "base_eval.json is not what an evaluation writes; delete it" in one_error(capsys)
    stage.write_json("base_eval.json", {"step": 7, "core": {**score, "results": "gone/results.parquet"}})
    assert measured.base_eval("--run", "two", "--compare", "unmeasured") == 1
    assert re.search(r"gone/results\.parquet, to compare with, is gone; evaluate one, base", one_error(capsys))


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


def test_a_run_or_a_model_that_is_not_there_is_one_line(place, capsys):
    assert place.base_eval("--run", "nobody") == 1
    assert "no run named 'nobody'" in one_error(capsys)
    assert place.base_eval("--hf", str(place.root / "nowhere")) == 1
    assert re.search(r"no weights \(\*\.safetensors, \*\.bin\) in .*nowhere; --hf wants", one_error(capsys))
    assert place.base_eval("--hf", str(place.root / "bundle")) == 1
    assert "no weights" in one_error(capsys)


@pytest.mark.slow
def test_a_damaged_bundle_is_one_line_before_a_model_is_loaded(place, capsys, tmp_path, no_model):
    (write_bundle(tmp_path) / "eval_data" / FILES["endings"]).write_text("{}\n")
    assert place.base_eval("--run", "one", "--bundle", str(tmp_path)) == 1
    assert "item 1 has no 'context' of type str" in one_error(capsys)


@pytest.mark.slow
def test_one_process_is_the_submitted_jobs_own_which_has_the_gpu(place, monkeypatch):
    place.new_run("submitted")
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")  # as in a job's driver; whoever asks this cluster fails
    assert place.base_eval("--run", "submitted") == 0


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
    ours, theirs = (
        pq.read_table(measured.results(core, run)).to_pylist() for run, core in (("spread", spread), ("one", alone))
    )
    for one, other in zip(ours, theirs, strict=True):
        assert one.pop("scores") == pytest.approx(other.pop("scores"), abs=1e-5)
        assert one == other
