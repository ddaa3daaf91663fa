"""Checkpoints appear whole, verify themselves, and fall back when damaged."""

import dataclasses

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load as load_with_the_library

from nanochat_ray.errors import UserError
from nanochat_ray.plan import make_plan
from nanochat_ray.storage import Folder
from nanochat_ray.stream.cursor import Cursor, RowId, StreamIdentity
from nanochat_ray.train.checkpoint import (
    Checkpoints,
    TrainState,
    build_model,
    from_safetensors,
    in_safetensors,
    load_model,
)

PLAN = make_plan(depth=2, vocab_size=300, head_size=64, sequence_len=64, batch_tokens=1024, micro_batch_rows=4, steps=9)
IDENTITY = StreamIdentity("c", "t", 64, 4, 4, 42)


def state_at(step, **more):
    return TrainState(PLAN, Cursor(IDENTITY, step, step * 1024, RowId(0, step, 3)), best_val_bpb=1.5, **more)


def some_tensors(value):
    return {"a": torch.full((3, 2), float(value)), "b.exp_avg": torch.arange(4.0)}


def test_every_shape_and_layout_survives(stage):
    tensors = {
        "scalar": torch.tensor(0.25),
        "empty": torch.empty(0, 3),
        "strided": torch.arange(12.0).view(3, 4).T,
        "count": torch.tensor(2**40),
        "half": torch.linspace(-1, 1, 5, dtype=torch.bfloat16),
        'ünicode " name': torch.ones(1, requires_grad=True),
    }
    checkpoints = Checkpoints.of(stage)
    checkpoints.save(state_at(3), tensors, {})
    loaded = checkpoints.model(3)
    assert loaded.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert loaded[name].dtype == tensor.dtype
        assert torch.equal(loaded[name], tensor)
    assert checkpoints.optimizer(3) == {}


@pytest.fixture
def stage(tmp_path):
    return Folder.at(tmp_path / "base")


def test_what_was_saved_is_loaded(stage):
    checkpoints = Checkpoints.of(stage)
    size = checkpoints.save(state_at(3), some_tensors(1), some_tensors(2))
    assert size > 0
    assert checkpoints.newest_valid(pytest.fail) == 3
    assert checkpoints.state(3) == state_at(3)
    assert torch.equal(checkpoints.model(3)["a"], some_tensors(1)["a"])
    assert torch.equal(checkpoints.optimizer(3)["a"], some_tensors(2)["a"])


def test_a_folder_without_manifest_is_not_a_checkpoint(stage):
    checkpoints = Checkpoints.of(stage)
    checkpoints.save(state_at(3), some_tensors(1), some_tensors(2))
    checkpoints.save(state_at(6), some_tensors(1), some_tensors(2))
    (stage / "checkpoints" / "step_000006").delete("manifest.json")
    assert checkpoints.steps() == [3]
    assert checkpoints.newest_valid(pytest.fail) == 3


@pytest.mark.parametrize("file", ["model.safetensors", "optimizer.safetensors", "state.json", "manifest.json"])
@pytest.mark.parametrize("damage", ["flip", "truncate", "delete"])
def test_a_damaged_newest_checkpoint_is_named_and_the_one_before_is_used(stage, file, damage):
    checkpoints = Checkpoints.of(stage)
    for step in (3, 6):
        checkpoints.save(state_at(step), some_tensors(step), some_tensors(step))
    place = stage / "checkpoints" / "step_000006"
    data = place.read(file)
    if damage == "delete":
        place.delete(file)
    else:
        place.write(file, data[:-9] if damage == "truncate" else data[:-9] + bytes([data[-9] ^ 1]) + data[-8:])
    warnings = []
    assert checkpoints.newest_valid(warnings.append) == 3
    if (file, damage) != ("manifest.json", "delete"):  # that one looks like a write that never finished
        assert len(warnings) == 1
        assert "step_000006" in warnings[0]


@pytest.mark.parametrize("manifest", ['{"files": []}', '{"files": null}', '{"files": {}}', "[]", "{}", "7"])
def test_a_manifest_of_another_form_is_damage(stage, manifest):
    checkpoints = Checkpoints.of(stage)
    for step in (3, 6):
        checkpoints.save(state_at(step), some_tensors(step), some_tensors(step))
    (stage / "checkpoints" / "step_000006").write("manifest.json", manifest)
    assert checkpoints.newest_valid(lambda warning: None) == 3


def test_if_all_are_damaged_nothing_begins_again_by_itself(stage):
    checkpoints = Checkpoints.of(stage)
    checkpoints.save(state_at(3), some_tensors(1), some_tensors(2))
    (stage / "checkpoints" / "step_000003").write("state.json", "{}")
    with pytest.raises(UserError, match="step_000003 is damaged .*state.json.*--fresh"):
        checkpoints.newest_valid(pytest.fail)


def test_what_lies_beyond_the_step_that_is_resumed_does_not_count_as_kept(stage):
    checkpoints = Checkpoints.of(stage)
    for step in (3, 6):
        checkpoints.save(state_at(step), some_tensors(step), some_tensors(step))
    (stage / "checkpoints" / "step_000006").write("state.json", "{}")
    checkpoints.delete_after(3)
    checkpoints.save(state_at(5), some_tensors(5), some_tensors(5))
    checkpoints.prune(keep=1)
    assert checkpoints.newest_valid(pytest.fail) == 5


def test_the_digest_names_the_weights(stage):
    checkpoints = Checkpoints.of(stage)
    for step, value in ((1, 1), (2, 1), (3, 2)):
        checkpoints.save(state_at(step), some_tensors(value), some_tensors(step))
    assert checkpoints.digest(1) == checkpoints.digest(2) != checkpoints.digest(3)


def test_a_model_of_another_tokenizer_is_refused(stage):
    Checkpoints.of(stage).save(state_at(9), build_model(PLAN).state_dict(), some_tensors(0))
    with pytest.raises(UserError, match="another tokenizer"):
        load_model(stage, "u", torch.device("cpu"), torch.float32)


def test_only_the_newest_are_kept(stage):
    checkpoints = Checkpoints.of(stage)
    for step in (1, 2, 3, 4):
        checkpoints.save(state_at(step), some_tensors(step), some_tensors(step))
    (stage / "checkpoints" / "step_000002").delete("manifest.json")  # left by a writer that was killed
    checkpoints.prune(keep=2)
    assert (stage / "checkpoints").list() == ["step_000003", "step_000004"]


def test_saving_over_an_unfinished_attempt_leaves_nothing_of_it(stage):
    place = stage / "checkpoints" / "step_000003"
    place.write("leftover.safetensors", b"half")
    checkpoints = Checkpoints.of(stage)
    checkpoints.save(state_at(3), some_tensors(1), some_tensors(2))
    assert "leftover.safetensors" not in place.list()


def test_a_model_is_loaded_for_inference_with_its_plan(stage):
    model = build_model(PLAN)
    Checkpoints.of(stage).save(state_at(9), model.state_dict(), some_tensors(0))
    loaded, plan, step = load_model(stage, "t", torch.device("cpu"), torch.float32)
    assert (plan, step) == (PLAN, 9)
    ids_BT = torch.arange(12).view(1, 12)
    assert torch.equal(loaded(ids_BT), model(ids_BT))


def test_a_stage_without_a_model_says_what_to_run(stage):
    with pytest.raises(UserError, match="no trained model in .*base.*run the stage"):
        load_model(stage, "t", torch.device("cpu"), torch.float32)


def test_another_schema_is_refused(stage):
    value = {**state_at(1).to_dict(), "schema": 99}
    with pytest.raises(UserError, match="schema 99"):
        TrainState.from_dict(value)
    assert dataclasses.is_dataclass(TrainState.from_dict(state_at(1).to_dict()))


def test_the_best_stays_however_old_it_is(stage):
    checkpoints = Checkpoints.of(stage)
    for step in (1, 2, 3, 4, 5):
        checkpoints.save(state_at(step), some_tensors(step), some_tensors(step))
        checkpoints.prune(keep=2, best=2)
    assert checkpoints.steps() == [2, 4, 5]
    assert checkpoints.newest_valid(pytest.fail) == 5
    checkpoints.prune(keep=1, best=5)
    assert checkpoints.steps() == [5]


def test_a_checkpoint_is_loaded_and_verified_by_one_read_of_each_file(stage, monkeypatch):
    checkpoints, reads = Checkpoints.of(stage), []
    checkpoints.save(state_at(3, best_step=2), some_tensors(1), some_tensors(2))
    read_pieces = Folder.read_pieces
    monkeypatch.setattr(Folder, "read_pieces", lambda self, name: reads.append(name) or read_pieces(self, name))
    loaded = checkpoints.load(pytest.fail)
    assert sorted(reads) == ["manifest.json", "model.safetensors", "optimizer.safetensors", "state.json"]
    assert loaded.state == state_at(3, best_step=2)
    assert torch.equal(loaded.model["a"], some_tensors(1)["a"])
    assert torch.equal(loaded.optimizer["b.exp_avg"], some_tensors(2)["b.exp_avg"])
    reads.clear()
    assert checkpoints.newest_whole(pytest.fail) == 3
    assert sorted(reads) == ["manifest.json", "state.json"]


def test_before_the_first_checkpoint_nothing_is_loaded(stage):
    assert Checkpoints.of(stage).load(pytest.fail) is None
    assert Checkpoints.of(stage).newest_whole(pytest.fail) is None


@pytest.mark.parametrize("file", ["model.safetensors", "optimizer.safetensors", "state.json", "manifest.json"])
def test_loading_falls_back_as_verifying_does_and_sizes_alone_find_what_is_cut_short(stage, file):
    checkpoints = Checkpoints.of(stage)
    for step in (3, 6):
        checkpoints.save(state_at(step), some_tensors(step), some_tensors(step))
    place, warnings = stage / "checkpoints" / "step_000006", []
    place.write(file, place.read(file)[:-9])
    assert checkpoints.newest_whole(warnings.append) == 3
    loaded = checkpoints.load(warnings.append)
    assert loaded.state == state_at(3)
    assert torch.equal(loaded.model["a"], some_tensors(3)["a"])
    assert len(warnings) == 2
    assert "step_000006" in warnings[1]
    (stage / "checkpoints").delete("step_000003")
    with pytest.raises(UserError, match="step_000006 is damaged .*--fresh"):
        checkpoints.load(pytest.fail)


def test_storage_that_fails_is_not_taken_for_damage(stage, monkeypatch):
    checkpoints = Checkpoints.of(stage)
    checkpoints.save(state_at(3), some_tensors(3), some_tensors(3))

    def fail(self, name):
        raise OSError("unplugged")

    monkeypatch.setattr(Folder, "read_pieces", fail)
    for look in (checkpoints.newest_valid, checkpoints.newest_whole, checkpoints.load):
        with pytest.raises(OSError, match="unplugged"):
            look(pytest.fail)


def test_a_state_from_before_the_best_step_was_recorded_is_read(stage):
    value = state_at(3).to_dict()
    del value["best_step"]
    assert TrainState.from_dict(value) == state_at(3)


dtypes = st.sampled_from([torch.float32, torch.bfloat16, torch.float16, torch.int64])


@given(st.lists(st.tuples(dtypes, st.lists(st.integers(0, 5), max_size=3)), max_size=6))
def test_our_reader_and_writer_agree_with_the_library_whatever_the_order_of_the_types(entries):
    tensors = {f"t{n}": torch.randn(shape).mul(9).to(dtype) for n, (dtype, shape) in enumerate(entries)}
    data = b"".join(bytes(piece) for piece in in_safetensors(tensors))
    theirs, ours = load_with_the_library(data), from_safetensors(bytearray(data))
    assert ours.keys() == theirs.keys() == tensors.keys()
    for name, tensor in tensors.items():
        for read in (ours[name], theirs[name]):
            assert (read.dtype, read.shape) == (tensor.dtype, tensor.shape)
            assert torch.equal(read, tensor)
