"""On a real cluster: an imported model is trained on, finetuned, evaluated and asked, like any other."""

import json

import pytest
import torch

from jobs import base_eval, import_nanochat, pretrain, sft
from nanochat_ray import cli
from nanochat_ray.engine.load import load_chat_model
from nanochat_ray.engine.sampler import SamplingParams
from nanochat_ray.storage import run_folder
from nanochat_ray.stream.cursor import RowId
from nanochat_ray.stream.rows import PretrainingRows, micro_batches
from nanochat_ray.tokenizer import Tokenizer
from nanochat_ray.train.checkpoint import Checkpoints
from nanochat_ray.train.events import read_events
from tests import public_nanochat
from tests.public_nanochat import JULY, OCTOBER, make_encoding, make_model, write_checkpoint, write_tokenizer
from tests.small_corpus import write_corpus

pytestmark = [pytest.mark.ray, pytest.mark.slow]

SHAPE = {"n_embd": 64, "n_head": 2, "n_kv_head": 1, "sequence_len": 256}
NUMERICS = ["--dtype", "fp32", "--compile", "off", "--eval-tokens", "8192", "--sample-tokens", "0"]
BATCH = ["--batch-tokens", "1024", "--micro-batch-rows", "2"]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    root = tmp_path_factory.mktemp("imported")
    write_corpus(root / "corpus")
    write_tokenizer(root / "tokenizer", make_encoding(300))
    return root


def run(job, place, *flags: str, name: str) -> int:
    return cli.run(job.main, job.build_parser(), ["--storage", str(place / "out"), "--run", name, *flags])


def import_model(place, name, generation, *flags: str):
    public = make_model(generation, **SHAPE)
    write_checkpoint(place / name, public)
    source = ["--source", str(place / name), "--tokenizer", str(place / "tokenizer")]
    assert run(import_nanochat, place, *source, *flags, name=name) == 0
    return public, run_folder(str(place / "out"), name)


def test_an_imported_base_is_evaluated_trained_on_and_can_always_be_begun_again(place, ray_cluster, capsys):
    public, folder = import_model(place, "older", OCTOBER)
    corpus = ["--corpus", str(place / "corpus")]
    measure = [*corpus, "--dtype", "fp32", "--eval-tokens", "8192", "--bundle", "none", "--json"]
    assert run(base_eval, place, *measure, name="older") == 0
    evaluated = json.loads(capsys.readouterr().out.splitlines()[-1])
    train = [*corpus, *BATCH, *NUMERICS, "--steps", "4", "--eval-every", "2", "--checkpoint-every", "0"]
    assert run(pretrain, place, *train, name="older") == 0
    events = read_events(folder / "base")
    steps = [event for event in events if event["kind"] == "step"]
    first_eval = next(event for event in events if event["kind"] == "eval")
    assert first_eval["step"] == 0
    assert first_eval["val_bpb"] == pytest.approx(evaluated["val_bpb"], rel=1e-4)
    assert steps[0]["loss"] == pytest.approx(first_loss(public, folder, place), rel=1e-4)
    assert steps[-1]["loss"] < steps[0]["loss"]
    checkpoints = Checkpoints.of(folder / "base")
    assert checkpoints.steps() == [0, 3, 4]
    assert checkpoints.state(4).initial_model == checkpoints.digest(0)

    assert run(pretrain, place, *train, name="older") == 0  # nothing is left to do
    assert "is trained: 4 steps are done" in capsys.readouterr().out
    for step in (3, 4):
        (checkpoints.folder / f"step_{step:06d}").delete()
    assert run(pretrain, place, *train, name="older") == 1  # lost checkpoints are not begun again by themselves
    assert "holds none" in capsys.readouterr().err
    assert run(pretrain, place, *train, "--fresh", name="older") == 0
    again = [event for event in read_events(folder / "base") if event["kind"] == "step"]
    assert [event["loss"] for event in again] == pytest.approx([event["loss"] for event in steps], rel=1e-4)


def first_loss(public, folder, place) -> float:
    """The mean loss of the corpus's first step by the reference."""
    from nanochat_ray.data.corpus import open_corpus
    from nanochat_ray.storage import Folder

    units = open_corpus(str(place / "corpus"), Folder.at(place)).train
    source = PretrainingRows(Tokenizer.load(folder / "tokenizer"), SHAPE["sequence_len"])
    rows = micro_batches(source, units, 2, RowId(0, 0, 0), 42)
    tokens = torch.cat([torch.as_tensor(next(rows).tokens_MT) for _ in range(2)]).long()
    losses = [torch.nn.functional.cross_entropy(public_nanochat.logits(public, row[:-1]), row[1:]) for row in tokens]
    return torch.stack(losses).mean().item()


def test_an_imported_chat_model_answers_and_is_finetuned_further_without_a_base(place, ray_cluster):
    _, folder = import_model(place, "chat", JULY, "--stage", "sft")
    before = load_chat_model(str(place / "out"), "chat", "sft", "cpu", "fp32")
    assert before.about["step"] == 0
    params = SamplingParams(temperature=0.0, max_tokens=5)
    assert list(before.engine.stream([before.engine.tokenizer.bos, 65], params))
    assert run(sft, place, *BATCH, *NUMERICS, "--steps", "3", name="chat") == 0
    losses = [event["loss"] for event in read_events(folder / "sft") if event["kind"] == "step"]
    assert losses[-1] < losses[0]
    after = load_chat_model(str(place / "out"), "chat", "sft", "cpu", "fp32")
    assert after.about["step"] == 3
    assert after.fingerprint != before.fingerprint


def test_an_imported_base_is_finetuned(place, ray_cluster):
    _, folder = import_model(place, "newer", JULY)
    assert run(sft, place, *BATCH, *NUMERICS, "--steps", "2", name="newer") == 0
    state = Checkpoints.of(folder / "sft").state(2)
    assert state.initial_model == Checkpoints.of(folder / "base").digest(0)
