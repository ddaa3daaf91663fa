"""Public checkpoints come in with equal logits, or are refused with every reason; nothing of them runs."""

import json
import pickle
import zipfile
from dataclasses import replace

import pytest
import torch

from jobs import import_nanochat
from nanochat_ray import cli
from nanochat_ray.errors import UserError
from nanochat_ray.exchange.nanochat_checkpoint import read_checkpoint
from nanochat_ray.exchange.nanochat_tokenizer import read_tokenizer
from nanochat_ray.exchange.stored_run import Imported, store_run
from nanochat_ray.plan.shape import OCTOBER_2025
from nanochat_ray.storage import Folder, run_folder
from nanochat_ray.tokenizer import Tokenizer
from nanochat_ray.train.checkpoint import Checkpoints, load_model
from nanochat_ray.train.lease import clear_stage
from nanochat_ray.train.origin import Origin
from tests import public_nanochat
from tests.public_nanochat import JULY, OCTOBER, make_encoding, make_model, write_checkpoint, write_tokenizer


@pytest.fixture
def place(tmp_path):
    """With a tokenizer in `tokenizer/`."""
    write_tokenizer(tmp_path / "tokenizer", make_encoding(300))
    return tmp_path


def import_run(place, *more: str, run: str = "r") -> int:
    flags = ["--source", str(place / "source"), "--tokenizer", str(place / "tokenizer"), "--run", run]
    return cli.run(
        import_nanochat.main, import_nanochat.build_parser(), [*flags, "--storage", str(place / "out"), *more]
    )


def imported_model(place, stage="base", run="r"):
    folder = run_folder(str(place / "out"), run)
    tokenizer = Tokenizer.load(folder / "tokenizer")
    return load_model(folder / stage, tokenizer.fingerprint, torch.device("cpu"), torch.float32, pytest.fail)[0]


def some_ids(public, length=200):
    return torch.randint(0, public.config["vocab_size"], (length,), generator=torch.Generator().manual_seed(1))


def assert_same_logits(model, public):
    ids = some_ids(public)
    with torch.inference_mode():
        logits = model(ids[None])[0]
    torch.testing.assert_close(logits.double(), public_nanochat.logits(public, ids), atol=1e-4, rtol=0)


@pytest.mark.parametrize("prefix", ["", "_orig_mod."])
@pytest.mark.parametrize("generation", [JULY, OCTOBER])
@pytest.mark.parametrize("changes", [{}, {"n_layer": 4, "n_kv_head": 1}, {"n_layer": 1, "n_kv_head": 4}])
def test_an_imported_model_has_the_logits_of_its_source(place, generation, changes, prefix):
    public = make_model(generation, **changes)
    write_checkpoint(place / "source", public, prefix=prefix)
    assert import_run(place) == 0
    model = imported_model(place)
    assert_same_logits(model, public)
    if generation == JULY:
        assert model.config.windows == (*((128, 128, 256, 128)[: public.config["n_layer"] - 1]), 256)
    else:
        assert {name: getattr(model.config, name) for name in OCTOBER_2025} == OCTOBER_2025


@pytest.mark.parametrize("generation", [JULY, OCTOBER])
def test_tensors_of_half_the_width_mean_the_numbers_they_hold(place, generation):
    public = make_model(generation)
    public.weights = {name: weight.bfloat16() for name, weight in public.weights.items()}
    write_checkpoint(place / "source", public)
    assert import_run(place) == 0
    assert_same_logits(imported_model(place), public)


def test_tables_that_are_padded_already_and_stored_rotary_tables_make_no_difference(place):
    public = make_model(OCTOBER)
    write_checkpoint(place / "source", public)
    padded = {
        name: torch.cat((weight, torch.ones(20, 64))) if len(weight) == 300 else weight
        for name, weight in public.weights.items()
    }
    torch.save({**padded, "cos": torch.ones(1, 9), "sin": torch.ones(1, 9)}, place / "source" / "model_000701.pt")
    (place / "source" / "meta_000701.json").write_text((place / "source" / "meta_000700.json").read_text())
    assert import_run(place) == 0
    assert_same_logits(imported_model(place), public)


def test_the_newest_checkpoint_is_taken_unless_another_is_named(place):
    for step in (700, 30):
        write_checkpoint(place / "source", make_model(JULY, seed=step), step=step)
    assert read_checkpoint(Folder.at(place / "source")).step == 700
    assert read_checkpoint(Folder.at(place / "source"), 30).step == 30
    with pytest.raises(UserError, match=r"no model_000031.pt in .*; there are steps 30, 700"):
        read_checkpoint(Folder.at(place / "source"), 31)


@pytest.mark.slow
def test_source_tokenizer_and_storage_may_be_uris(place):
    public = make_model(OCTOBER)
    write_checkpoint(place / "source", public)
    flags = [f"--{name}=file://{place / name}" for name in ("source", "tokenizer")]
    job, parser = import_nanochat.main, import_nanochat.build_parser()
    assert cli.run(job, parser, [*flags, "--run", "r", "--storage", f"file://{place / 'out'}"]) == 0
    assert_same_logits(imported_model(place), public)


# What is refused


def refusal(place, weights=None, config=None, generation=JULY, **changes) -> str:
    """The message on a checkpoint after changes of its weights and its configuration; None takes a name away."""
    public = make_model(generation, **changes)
    for target, given in ((public.weights, weights), (public.config, config)):
        target.update(given or {})
        for name in [name for name, value in target.items() if value is None]:
            del target[name]
    write_checkpoint(place / "source", replace(public, generation=JULY if config else generation))
    with pytest.raises(UserError) as refused:
        read_checkpoint(Folder.at(place / "source"))
    assert "\n" not in str(refused.value)
    return str(refused.value)


def test_every_tensor_that_is_missing_surplus_or_of_another_shape_is_named_at_once(place):
    changed = {
        "transformer.h.1.attn.c_q.weight": None,
        "x0_lambdas": None,
        "transformer.h.3.attn.c_q.weight": torch.ones(64, 64),
        "lm_head.weight": torch.ones(300, 64, 1),
        "resid_lambdas": torch.ones(4),
    }
    message = refusal(place, changed)
    assert "2 missing: transformer.h.1.attn.c_q.weight, x0_lambdas" in message
    assert "1 surplus: transformer.h.3.attn.c_q.weight" in message
    assert "lm_head.weight is 300×64×1 instead of 320×64, resid_lambdas is 4 instead of 3" in message


def test_long_lists_are_shortened_with_their_count(place):
    message = refusal(place, {f"extra.{n:02d}": torch.ones(1) for n in range(50)})
    assert "50 surplus: extra.00, extra.01, extra.02, extra.03 and 46 more" in message


@pytest.mark.parametrize("absent", ["resid_lambdas", "smear_gate.weight", "backout_lambda", "value_embeds.2.weight"])
def test_a_model_with_some_extras_is_of_no_generation(place, absent):
    message = refusal(place, {absent: None})
    assert f"1 missing: {absent}" in message
    assert "mixtures of them cannot" in message


def test_a_model_without_extras_but_with_windows_is_of_no_generation(place):
    assert "had no windows" in refusal(place, generation=OCTOBER, config={"window_pattern": "SSSL"})


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        ({"n_head": 5}, "n_embd 64 does not give 5 heads"),
        ({"n_kv_head": 3}, "n_kv_head 3 does not divide n_head 4"),
        ({"n_layer": 0}, "n_layer is '0'"),
        ({"n_layer": 10**6}, "n_layer is 1000000"),
        ({"n_embd": "64"}, "n_embd is '64'"),
        ({"vocab_size": True}, "vocab_size is 'True'"),
        ({"window_pattern": "SXL"}, "'SXL', which is not made of S and L"),
        ({"vocab_size": None}, "missing: vocab_size"),
        ({"n_experts": 8}, "unknown: n_experts"),
        ({"n_layer": 4}, "missing: transformer.h.1.attn.ve_gate.weight, transformer.h.3"),
        ({"sequence_len": -1}, "sequence_len is '-1'"),
    ],
)
def test_an_impossible_or_unknown_configuration_is_refused(place, config, reason):
    assert reason in refusal(place, config=config)


def test_what_is_no_state_dict_is_refused(place):
    write_checkpoint(place / "source", make_model())
    path = place / "source" / "model_000700.pt"
    whole = path.read_bytes()
    contents = {
        "cannot be read": [b"", b"not a pickle", whole[:1000], whole[: len(whole) // 2], whole[:-30]],
        "no state dict": [torch.ones(3), {1: torch.ones(3)}],
        "no plain tensors": [{"a": 1}, {"a": torch.ones(3, dtype=torch.int64)}, {"model": {"a": torch.ones(3)}}],
        "names more numbers": [{"lm_head.weight": torch.ones(1).expand(10**9)}],
        "both with and without": [{"a": torch.ones(1), "_orig_mod.a": torch.ones(1)}],
        "not finite": [{**make_model().weights, "smear_lambda": torch.tensor([torch.nan])}],
    }
    for reason, files in contents.items():
        for content in files:
            if isinstance(content, bytes):
                path.write_bytes(content)
            else:
                torch.save(content, path)
            with pytest.raises(UserError, match=reason):
                read_checkpoint(Folder.at(place / "source"))
    path.unlink()
    with pytest.raises(UserError, match=r"no checkpoint of the public nanochat .* --source"):
        read_checkpoint(Folder.at(place / "source"))


class Calls:
    """Pickles as a call of `function(*arguments)`."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


def test_code_in_a_tensor_file_does_not_run(place):
    write_checkpoint(place / "source", make_model())
    path = place / "source" / "model_000700.pt"
    evil = Calls(open, str(place / "ran"), "w")
    torch.save({"a": torch.ones(1), "b": evil}, path)
    for content in (path.read_bytes(), pickle.dumps(evil)):
        path.write_bytes(content)
        with pytest.raises(UserError, match="cannot be read as a file of tensors"):
            read_checkpoint(Folder.at(place / "source"))
    assert not (place / "ran").exists()
    assert not zipfile.is_zipfile(path)


def test_a_missing_or_damaged_description_is_refused(place):
    write_checkpoint(place / "source", make_model())
    path = place / "source" / "meta_000700.json"
    for content in ("", "[]", "{}", "[" * 10**5, json.dumps({"model_config": 3})):
        path.write_text(content)
        with pytest.raises(UserError, match="no `model_config` that can be read"):
            read_checkpoint(Folder.at(place / "source"))
    path.unlink()
    with pytest.raises(UserError, match="meta_000700.json is missing"):
        read_checkpoint(Folder.at(place / "source"))


# The run that is made


def test_a_tokenizer_of_another_size_is_refused_with_both_sizes(place, capsys):
    write_tokenizer(place / "tokenizer", make_encoding(320))
    write_checkpoint(place / "source", make_model())
    assert import_run(place) == 1
    assert "vocabulary of 300, the tokenizer in" in (error := capsys.readouterr().err)
    assert "one of 320" in error
    assert not (place / "out" / "runs" / "r").exists()


def test_the_same_import_again_changes_nothing_and_another_is_refused(place, capsys):
    write_checkpoint(place / "source", make_model())
    assert import_run(place) == 0
    folder = run_folder(str(place / "out"), "r")
    digest = Checkpoints.of(folder / "base").digest(0)
    assert import_run(place, "--json") == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["unchanged"] is True
    write_checkpoint(place / "source", make_model(seed=1))
    assert import_run(place) == 1
    assert "holds another model, which is not overwritten" in capsys.readouterr().err
    assert Checkpoints.of(folder / "base").digest(0) == digest
    assert import_run(place, "--stage", "sft") == 0  # another stage of the same run
    write_tokenizer(place / "tokenizer", make_encoding(300, specials=public_nanochat.SPECIAL_TOKENS), protocol=2)
    assert import_run(place, "--stage", "sft") == 0
    (place / "tokenizer").rename(place / "old")
    encoding = make_encoding(300)
    write_tokenizer(place / "tokenizer", public_nanochat.with_pattern(encoding, r"\w+|\W+"))
    assert import_run(place, "--stage", "sft") == 1
    assert "has another tokenizer" in capsys.readouterr().err


def test_an_import_that_was_cut_off_is_done_again(place):
    write_checkpoint(place / "source", make_model())
    assert import_run(place) == 0
    stage = run_folder(str(place / "out"), "r") / "base"
    (stage / "checkpoints" / "step_000000").delete("manifest.json")
    assert import_run(place) == 0
    assert_same_logits(imported_model(place), make_model())


def test_an_imported_run_says_where_it_came_from_and_stands_before_its_first_step(place):
    public = make_model(OCTOBER)
    write_checkpoint(place / "source", public)
    assert import_run(place) == 0
    stage = run_folder(str(place / "out"), "r") / "base"
    origin = Origin.of(stage)
    assert origin.facts == {"source": str(place / "source"), "step": 700, "generation": OCTOBER}
    state = Checkpoints.of(stage).state(0)
    assert state.plan.steps == state.cursor.tokens == 0
    assert state.plan.model == origin.model
    assert Checkpoints.of(stage).newest_valid(pytest.fail) == 0


def test_imported_weights_outlive_pruning_and_a_fresh_start(place):
    write_checkpoint(place / "source", make_model())
    assert import_run(place) == 0
    stage = run_folder(str(place / "out"), "r") / "base"
    checkpoints = Checkpoints.of(stage)
    state = checkpoints.state(0)
    for step in (1, 2, 3):
        later = replace(state, cursor=replace(state.cursor, step=step))
        checkpoints.save(later, {"a": torch.ones(1)}, {})
        checkpoints.prune(keep=1)
    assert checkpoints.steps() == [0, 3]
    stage.write("events.jsonl", "{}")
    clear_stage(stage)
    assert checkpoints.steps() == [0]
    assert stage.list() == ["checkpoints", "lease", "origin.json"]
    assert_same_logits(imported_model(place), make_model())


def test_weights_that_do_not_fit_their_model_make_no_run(place):
    write_checkpoint(place / "source", make_model())
    checkpoint = read_checkpoint(Folder.at(place / "source"))
    tokenizer = read_tokenizer(Folder.at(place / "tokenizer"))
    origin = Origin("test", "0", checkpoint.model)
    run = Folder.at(place / "run")
    with pytest.raises(UserError, match=r"not those of their model: \d+ missing"):
        store_run(run, "base", Imported({}, tokenizer, origin))
    assert not run.exists()
    assert store_run(run, "base", Imported(checkpoint.weights, tokenizer, origin))
    assert not store_run(run, "base", Imported(checkpoint.weights, tokenizer, origin))


def test_flags_that_shape_a_model_are_refused_for_an_imported_one(place, capsys):
    from jobs import pretrain

    write_checkpoint(place / "source", make_model(OCTOBER))
    assert import_run(place) == 0
    flags = ["--storage", str(place / "out"), "--run", "r", "--plan-only", "--steps", "5"]
    assert cli.run(pretrain.main, pretrain.build_parser(), [*flags, "--depth", "4"]) == 2
    assert "keeps its shape: leave out --depth 4" in capsys.readouterr().err
    assert cli.run(pretrain.main, pretrain.build_parser(), [*flags, "--json"]) == 0
    plan = json.loads(capsys.readouterr().out.splitlines()[-1])["plan"]
    assert (plan["steps"], plan["model"]["rotary_base"]) == (5, 10_000.0)
