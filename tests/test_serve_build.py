"""Which checkpoint a deployment serves: one for all its replicas, and a whole one."""

from pathlib import Path

import pytest

from kernels import cpu_build
from nanochat_ray.engine.load import load_chat_model
from nanochat_ray.errors import UserError
from nanochat_ray.plan import make_plan
from nanochat_ray.serve.app import Served, build
from nanochat_ray.storage import run_folder
from nanochat_ray.stream.cursor import Cursor, StreamIdentity
from nanochat_ray.tokenizer import train_tokenizer
from nanochat_ray.train.checkpoint import MODEL, Checkpoints, TrainState, build_model


@pytest.fixture
def checkpoints(tmp_path) -> Checkpoints:
    """Of steps 3 and 7."""
    folder = run_folder(str(tmp_path), "demo")
    tokenizer = train_tokenizer([Path(__file__).read_text()], 300)
    tokenizer.save(folder / "tokenizer")
    plan = make_plan(depth=2, vocab_size=300, head_size=64, sequence_len=128, batch_tokens=1024, micro_batch_rows=4)
    found = Checkpoints.of(folder / "sft")
    for step in (3, 7):
        cursor = Cursor(StreamIdentity("c", tokenizer.fingerprint, 128, 4, 2, 42), step=step)
        found.save(TrainState(plan, cursor), build_model(plan).state_dict(), {})
    return found


def damage(checkpoints: Checkpoints, step: int) -> None:
    folder = checkpoints.folder / f"step_{step:06d}"
    data = bytearray(folder.read(MODEL))
    data[-1] ^= 1
    folder.write(MODEL, bytes(data))


def pinned(storage: Path) -> tuple[int, int]:
    """The step of replicas, and the one the ingress describes."""
    ingress = build(Served(storage=str(storage), run="demo"))._bound_deployment
    replicas, describe, *_ = ingress.init_args
    load = replicas._bound_deployment.init_args[0]
    return load.keywords["step"], describe().about["step"]


def test_all_replicas_load_the_newest_whole_checkpoint_of_the_deployment(checkpoints, tmp_path, capsys):
    assert pinned(tmp_path) == (7, 7)
    damage(checkpoints, 7)
    assert pinned(tmp_path) == (3, 3)
    assert "step_000007 is damaged" in capsys.readouterr().err


def test_a_run_whose_checkpoints_are_all_damaged_is_refused_before_anything_starts(checkpoints, tmp_path):
    damage(checkpoints, 3)
    damage(checkpoints, 7)
    with pytest.raises(UserError, match="step_000007 is damaged"):
        build(Served(storage=str(tmp_path), run="demo"))


def test_without_a_compiler_the_user_is_told_that_the_model_is_slow(checkpoints, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("CXX", "/nowhere/c++")
    monkeypatch.setattr(cpu_build, "load", cpu_build.load.__wrapped__)  # another test may have loaded it
    build(Served(storage=str(tmp_path), run="demo"))
    load_chat_model(str(tmp_path), "demo", device="cpu")
    told = capsys.readouterr().err.splitlines()
    assert [line.count("a third of the speed: no C++ compiler: $CXX is /nowhere/c++") for line in told] == [1, 1]


def test_a_file_of_keys_that_cannot_be_read_is_refused_too(checkpoints, tmp_path):
    with pytest.raises(UserError, match="cannot be read"):
        build(Served(storage=str(tmp_path), run="demo", api_keys=str(tmp_path / "none")))
