"""Training on a real local cluster: one loss curve for any number of workers and any history, and clear refusals."""

import json
import re
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from jobs import base_eval, data, pretrain, sft, tokenizer
from nanochat_ray import cli
from nanochat_ray.data.corpus import open_corpus
from nanochat_ray.storage import Folder, run_folder
from nanochat_ray.stream.cursor import RowId
from nanochat_ray.stream.rows import PretrainingRows, micro_batches, stream_hash
from nanochat_ray.tokenizer import Tokenizer
from nanochat_ray.train.checkpoint import Checkpoints
from nanochat_ray.train.events import read_events
from nanochat_ray.train.job import TrainingJob
from nanochat_ray.train.lease import Lease
from nanochat_ray.train.samples import OPENINGS
from nanochat_ray.train.watchdog import STACKS, Patience
from tests.small_corpus import write_corpus
from tests.stream_fakes import HangingRows

pytestmark = [pytest.mark.ray, pytest.mark.slow]

ROOT = Path(__file__).parents[1]
STEPS = 30
SHAPE = [
    "--depth",
    "2",
    "--sequence-len",
    "64",
    "--batch-tokens",
    "1024",
    "--micro-batch-rows",
    "4",
    "--steps",
    str(STEPS),
]
FP32 = ["--dtype", "fp32", "--compile", "off"]


@pytest.fixture(scope="module")
def workplace(tmp_path_factory):
    """A storage root with a corpus, and a run called `source` that holds only a tokenizer."""
    root = tmp_path_factory.mktemp("training")
    write_corpus(root / "corpus")
    storage = root / "storage"
    flags = ["--storage", str(storage), "--run", "source", "--corpus", str(root / "corpus"), "--vocab-size", "300"]
    assert cli.run(tokenizer.main, tokenizer.build_parser(), flags) == 0
    return root


def new_run(workplace: Path, run: str) -> Folder:
    """A run folder that holds only `tokenizer/`."""
    folder, source = run_folder(str(workplace / "storage"), run), run_folder(str(workplace / "storage"), "source")
    for name in (source / "tokenizer").list():
        (folder / "tokenizer").write(name, (source / "tokenizer").read(name))
    return folder


def flags_of(workplace: Path, run: str) -> list[str]:
    return ["--storage", str(workplace / "storage"), "--run", run, "--corpus", str(workplace / "corpus"), *SHAPE, *FP32]


def pretrain_run(workplace: Path, run: str, *more: str) -> int:
    return cli.run(pretrain.main, pretrain.build_parser(), [*flags_of(workplace, run), *more])


def steps_of(folder: Folder, stage: str = "base") -> list[dict]:
    return [event for event in read_events(folder / stage) if event["kind"] == "step"]


@pytest.fixture(scope="module")
def calm(workplace, ray_cluster):
    """The undisturbed run on one worker."""
    folder = new_run(workplace, "calm")
    assert pretrain_run(workplace, "calm") == 0
    return folder


def assert_same_history(folder: Folder, calm: Folder) -> None:
    ours, theirs = steps_of(folder), steps_of(calm)
    assert [event["step"] for event in ours] == list(range(STEPS))
    assert [event["stream_hash"] for event in ours] == [event["stream_hash"] for event in theirs]
    np.testing.assert_allclose([event["loss"] for event in ours], [event["loss"] for event in theirs], rtol=1e-4)


def test_the_model_learns_and_the_events_say_so(calm):
    steps = steps_of(calm)
    assert [event["step"] for event in steps] == list(range(STEPS))
    assert steps[-1]["tokens"] == STEPS * 1024
    assert steps[-1]["loss"] < steps[0]["loss"] - 0.5
    bpb = [event["val_bpb"] for event in read_events(calm / "base") if event["kind"] == "eval"]
    assert bpb[-1] < bpb[0]


def test_samples_are_written_at_each_evaluation(calm):
    events = read_events(calm / "base")
    samples = [event for event in events if event["kind"] == "samples"]
    assert [event["step"] for event in samples] == [event["step"] for event in events if event["kind"] == "eval"]
    assert all({sample["prompt"] for sample in event["samples"]} == set(OPENINGS) for event in samples)
    assert samples[0]["samples"] != samples[-1]["samples"]


def test_the_stream_of_the_trainer_is_the_sequence_of_rows(calm, workplace):
    """Through Ray Data, Ray Train and an optimizer the hashes are those of a plain loop over the corpus."""
    state = Checkpoints.of(calm / "base").state(STEPS)
    source = PretrainingRows(Tokenizer.load(calm / "tokenizer"), 64)
    units = open_corpus(str(workplace / "corpus"), Folder.at(workplace)).train
    sequence = micro_batches(source, units, 4, RowId(0, 0, 0), state.plan.seed)
    expected = [stream_hash([next(sequence).digest() for _ in range(4)]) for _ in range(STEPS)]
    assert [event["stream_hash"] for event in steps_of(calm)] == expected


def test_any_step_can_be_looked_at(calm, workplace, capsys):
    flags = ["--storage", str(workplace / "storage"), "--run", "calm", "--corpus", str(workplace / "corpus")]
    assert cli.run(data.main, data.build_parser(), [*flags, "--show-step", "17", "--json"]) == 0
    *text, figures = capsys.readouterr().out.splitlines()
    assert json.loads(figures)["stream_hash"] == steps_of(calm)[17]["stream_hash"]
    assert any("brown fox" in line or "lazy dog" in line for line in text)
    assert cli.run(data.main, data.build_parser(), [*flags, "--show-step", "30"]) == 2


def test_two_workers_draw_the_same_loss_curve_and_without_samples(workplace, calm):
    folder = new_run(workplace, "two")
    assert pretrain_run(workplace, "two", "--workers", "2", "--sample-tokens", "0") == 0
    assert {event["workers"] for event in steps_of(folder)} == {2}
    assert not [event for event in read_events(folder / "base") if event["kind"] == "samples"]
    assert_same_history(folder, calm)


def test_a_killed_run_goes_on_with_three_workers_when_the_command_is_given_again(workplace, calm):
    folder = new_run(workplace, "killed")
    command = [sys.executable, "-m", "jobs.pretrain", *flags_of(workplace, "killed"), "--checkpoint-every", "0"]
    job = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, start_new_session=True)
    deadline = time.monotonic() + 120
    while len(steps_of(folder)) < 7 and time.monotonic() < deadline:
        time.sleep(0.05)
    for process in [*psutil.Process(job.pid).children(recursive=True), job]:
        process.kill()  # the driver and its cluster at once, as when the power fails
    job.wait()
    reached = len(steps_of(folder))
    assert 7 <= reached < STEPS
    assert pretrain_run(workplace, "killed", "--workers", "3") == 0
    starts = [event["step"] for event in read_events(folder / "base") if event["kind"] == "start"]
    assert starts[0] == 0
    assert 5 <= starts[1] <= reached + 1  # one may still have been on its way, or saved but not yet logged
    assert_same_history(folder, calm)


def test_a_worker_that_hangs_is_ended_and_the_run_goes_on_from_its_checkpoint(workplace, calm, monkeypatch):
    folder = new_run(workplace, "hangs")
    stacks = Path(f"{folder}/base/{STACKS}")  # what the watchdog writes

    def with_a_unit_that_hangs(args, source, train_units, **given):
        source = HangingRows(source, train_units[2], stacks)  # it is reached at about the 13th step
        patience = Patience(floor_s=5, first_s=60)
        return from_flags(args, source=source, train_units=train_units, patience=patience, **given)

    from_flags = TrainingJob.from_flags
    monkeypatch.setattr(TrainingJob, "from_flags", staticmethod(with_a_unit_that_hangs))
    assert pretrain_run(workplace, "hangs", "--checkpoint-every", "0") == 0
    assert_same_history(folder, calm)
    groups = [event["step"] for event in read_events(folder / "base") if event["kind"] == "start"]
    assert len(groups) == 2
    assert 5 < groups[1] < STEPS
    (written,) = stacks.iterdir()
    assert "no step ended for" in written.read_text()
    assert "read_micro_batches" in written.read_text()


def test_a_finished_run_is_not_done_again(workplace, calm, capsys):
    before = (calm / "base").read("events.jsonl")
    assert pretrain_run(workplace, "calm") == 0
    assert "is trained" in capsys.readouterr().out
    assert (calm / "base").read("events.jsonl") == before


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        (["--depth", "3"], "n_layer: 2 → 3"),
        (["--seed", "7"], "seed was 42, now 7"),
        (["--batch-tokens", "2048"], "micro_batches was 4, now 8"),
    ],
)
def test_a_checkpoint_of_another_plan_is_refused_with_the_difference(workplace, calm, capsys, changed, said):
    before = (calm / "base").read("events.jsonl")
    assert pretrain_run(workplace, "calm", *changed) == 1
    assert said in capsys.readouterr().err
    assert (calm / "base").read("events.jsonl") == before
    assert (calm / "base").read_json("plan.json")["depth"] == 2


def test_a_second_command_on_a_run_is_refused_before_it_starts_a_cluster(workplace, capsys, monkeypatch):
    def must_not_start(*_):
        raise AssertionError

    monkeypatch.setattr("nanochat_ray.cluster.connect", must_not_start)
    folder = new_run(workplace, "busy")
    with Lease.acquire(folder / "base"):
        assert pretrain_run(workplace, "busy") == 1
    assert "two writers would destroy each other's work" in capsys.readouterr().err


def test_a_run_that_lost_its_checkpoints_does_not_begin_again_by_itself(workplace, calm, capsys):
    folder = new_run(workplace, "gone")
    (folder / "base").write("events.jsonl", (calm / "base").read("events.jsonl"))
    assert pretrain_run(workplace, "gone") == 1
    assert "was saved at step 30, but its folder checkpoints/ holds none" in capsys.readouterr().err
    assert (folder / "base").read("events.jsonl") == (calm / "base").read("events.jsonl")


def test_another_corpus_is_refused(workplace, calm, capsys, tmp_path):
    write_corpus(tmp_path / "other")
    pq.write_table(pa.table({"text": ["something else entirely"] * 30}), tmp_path / "other" / "shard_1.parquet")
    assert pretrain_run(workplace, "calm", "--corpus", str(tmp_path / "other")) == 1
    assert "corpus was" in capsys.readouterr().err


def test_nan_stops_the_run_before_the_update(workplace, calm, capsys):
    """A checkpoint with a poisoned weight stands for a diverged model: the run stops and keeps what it had."""
    folder = new_run(workplace, "nan")
    assert pretrain_run(workplace, "nan", "--checkpoint-every", "0", "--keep-checkpoints", "99") == 0
    checkpoints = Checkpoints.of(folder / "base")
    state, model = checkpoints.state(10), checkpoints.model(10)
    model["lm_head.weight"][5, 5] = float("nan")
    optimizer = checkpoints.optimizer(10)
    for step in checkpoints.steps():
        if step >= 10:
            (folder / "base" / "checkpoints").delete(f"step_{step:06d}")
    checkpoints.save(state, model, optimizer)
    capsys.readouterr()
    assert pretrain_run(workplace, "nan") == 1
    said = capsys.readouterr().err
    assert "the loss of step 10 is not finite in 4 of 4 micro-batches" in said
    assert re.search(r"\(0: rows 0/\d+/\d+ to 0/\d+/\d+, 1: rows .* as epoch/unit position/row\)", said)
    assert checkpoints.newest_valid(pytest.fail) == 10


def test_a_shard_that_goes_bad_during_the_run_is_named(workplace, ray_cluster, capsys, tmp_path):
    corpus = tmp_path / "corpus"
    write_corpus(corpus)
    folder = new_run(workplace, "badshard")
    bad = corpus / "shard_1.parquet"
    content = bytearray(bad.read_bytes())
    content[200:1200] = bytes(1000)  # pages, not the footer: only reading finds it
    bad.write_bytes(content)
    assert pretrain_run(workplace, "badshard", "--corpus", str(corpus)) == 1
    assert "shard_1.parquet" in capsys.readouterr().err
    assert len(steps_of(folder)) < STEPS


def test_more_workers_than_the_cluster_holds_is_refused_at_once(workplace, ray_cluster, capsys):
    new_run(workplace, "crowd")
    assert pretrain_run(workplace, "crowd", "--workers", "64") == 1
    assert "64" in capsys.readouterr().err


def test_finetuning_and_evaluation_follow(workplace, calm, capsys, tmp_path):
    chats = tmp_path / "chats"
    chats.mkdir()
    lines = [
        json.dumps(
            {"messages": [{"role": "user", "content": f"fox {n}"}, {"role": "assistant", "content": "the lazy dog"}]}
        )
        for n in range(200)
    ]
    (chats / "train.jsonl").write_text("\n".join(lines))
    (chats / "test.jsonl").write_text("\n".join(lines[:20]))
    common = ["--storage", str(workplace / "storage"), "--run", "calm"]
    assert cli.run(sft.main, sft.build_parser(), [*common, "--sft", str(chats), "--steps", "8", *FP32]) == 0
    assert len(steps_of(calm, "sft")) == 8
    assert (
        cli.run(sft.main, sft.build_parser(), [*common, "--sft", str(chats / "test.jsonl"), "--steps", "8", *FP32]) == 1
    )
    assert "another was asked for" in capsys.readouterr().err
    assert (calm / "sft" / "data").exists("mixture.json")
    command = [*common, "--corpus", str(workplace / "corpus"), "--bundle", "none", "--json"]
    assert cli.run(base_eval.main, base_eval.build_parser(), command) == 0
    figures = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert figures["status"] == "done"
    assert 0 < figures["val_bpb"] < 8
