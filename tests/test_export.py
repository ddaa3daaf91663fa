"""jobs.export: a bundle that is whole or none, that knows its own parts, and that comes back as the same model."""

import json
import shutil
from pathlib import Path

import pytest
import torch

from jobs import export as export_job
from jobs import import_nanochat as import_job
from nanochat_ray.errors import UsageError, UserError
from nanochat_ray.exchange.bundle import MANIFEST, read_bundle
from nanochat_ray.model.gpt import GPT, GPTConfig
from nanochat_ray.storage import Folder, run_folder
from nanochat_ray.tokenizer import Tokenizer
from tests.tiny_runs import JULY, OCTOBER, make_run


def export(storage, *flags: str) -> dict:
    return export_job.main(export_job.build_parser().parse_args(["--run", "r", "--storage", str(storage), *flags]))


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A bundle of a chat model, and the model."""
    storage = tmp_path_factory.mktemp("storage")
    model = make_run(run_folder(str(storage), "r"), JULY, ("base", "sft"))
    return Path(export(storage)["artifacts"]["bundle"]), model


@pytest.fixture
def bundle(finished, tmp_path) -> Path:
    """A copy of the bundle, to be damaged."""
    return Path(shutil.copytree(finished[0], tmp_path / "bundle"))


def loaded(folder) -> GPT:
    bundle = read_bundle(Folder.at(folder))
    model = GPT(GPTConfig.from_shape(bundle.shape))
    model.load_state_dict(bundle.tensors)
    return model


@pytest.mark.parametrize("shape", [JULY, OCTOBER])
def test_a_bundle_comes_back_as_the_same_model_and_tokenizer(tmp_path, shape):
    run = run_folder(str(tmp_path), "r")
    model = make_run(run, shape, ("base",))
    folder = export(tmp_path)["artifacts"]["bundle"]
    bundle = read_bundle(Folder.at(folder))
    assert (bundle.shape, bundle.stage, bundle.source["step"], bundle.source["tokens"]) == (shape, "base", 7, 57344)
    ids = torch.arange(40).reshape(2, 20)
    with torch.inference_mode():
        assert torch.equal(loaded(folder)(ids), model(ids))
    assert bundle.tokenizer.fingerprint == Tokenizer.load(run / "tokenizer").fingerprint


def test_bfloat16_halves_the_weights_and_keeps_learned_scalars_exact(tmp_path, finished):
    folder, model = finished
    run = run_folder(str(tmp_path), "r")
    make_run(run, JULY, ("sft",))
    half = Path(export(tmp_path, "--dtype", "bfloat16")["artifacts"]["bundle"])
    sizes = [(place / "model.safetensors").stat().st_size for place in (half, folder)]
    assert 0.5 < sizes[0] / sizes[1] < 0.52
    tensors = read_bundle(Folder.at(half)).tensors
    assert torch.equal(tensors["resid_lambdas"], model.resid_lambdas)
    assert torch.equal(tensors["transformer.h.0.attn.c_q.weight"], model.blocks[0].attn.c_q.weight.bfloat16().float())
    assert json.loads((half / "config.json").read_text())["dtype"] == "bfloat16"


def test_the_chat_model_is_exported_unless_another_stage_is_asked_for(finished):
    storage = finished[0].parents[3]
    assert finished[0].name == "sft_000007"
    assert export(storage, "--stage", "base")["artifacts"]["bundle"].endswith("base_000007")


def test_exporting_again_changes_nothing(finished):
    storage = finished[0].parents[3]
    before = {path: path.stat().st_mtime_ns for path in finished[0].rglob("*")}
    again = export(storage)
    assert again["unchanged"]
    assert {path: path.stat().st_mtime_ns for path in finished[0].rglob("*")} == before


def test_another_bundle_is_replaced_only_by_fresh(finished, bundle):
    storage = finished[0].parents[3]
    first = read_bundle(Folder.at(bundle)).digest
    with pytest.raises(UserError, match="another bundle, or a damaged one"):
        export(storage, "--stage", "base", "--to", str(bundle))
    (bundle / ".gitattributes").write_text("*.safetensors filter=lfs")
    (bundle / "notes.txt").write_text("my own")
    export(storage, "--stage", "base", "--to", str(bundle), "--fresh")
    assert read_bundle(Folder.at(bundle)).digest != first
    assert (bundle / "notes.txt").read_text() == "my own"
    assert (bundle / ".gitattributes").exists()


def test_a_folder_with_other_things_in_it_is_left_alone(finished, tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(UserError, match=r"holds other files \(thesis.tex\)"):
        export(finished[0].parents[3], "--to", str(tmp_path), "--fresh")
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


SAVED_BY_TRANSFORMERS = (
    "config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json",
    "chat_template.jinja", "README.md",
)  # fmt: skip


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("names", [SAVED_BY_TRANSFORMERS, ["README.md"], ["tokenizer/tokenizer.json"]])
def test_a_model_that_is_no_bundle_is_replaced_only_by_fresh(finished, tmp_path, names):
    storage, there = finished[0].parents[3], tmp_path / "theirs"
    for name in names:
        (there / name).parent.mkdir(parents=True, exist_ok=True)
        (there / name).write_text(f"{name} that took weeks")
    before = contents(there)
    with pytest.raises(UserError, match=rf"(?s)theirs.*{sorted(names)[0]}.*another folder with --to.*--fresh"):
        export(storage, "--to", str(there))
    assert contents(there) == before
    export(storage, "--to", str(there), "--fresh")
    assert read_bundle(Folder.at(there)).digest == read_bundle(Folder.at(finished[0])).digest


def test_one_changed_byte_in_an_unfinished_bundle_is_somebodys_work(finished, bundle):
    (bundle / MANIFEST).unlink()
    card = (bundle / "README.md").read_bytes()
    (bundle / "README.md").write_bytes(card[:-1] + b"!")
    before = contents(bundle)
    with pytest.raises(UserError, match=r"README\.md"):
        export(finished[0].parents[3], "--to", str(bundle))
    assert contents(bundle) == before


def test_a_part_of_bundles_that_this_one_has_not_is_somebodys_work_too(finished, bundle):
    (bundle / MANIFEST).unlink()
    (bundle / "report.md").write_text("of another run")
    with pytest.raises(UserError, match=r"report\.md"):
        export(finished[0].parents[3], "--to", str(bundle))
    assert (bundle / "report.md").read_text() == "of another run"


@pytest.mark.parametrize("after", range(12))
def test_an_unfinished_bundle_is_none_and_the_same_command_finishes_it(finished, tmp_path, monkeypatch, after):
    """However many files were written before the storage failed."""
    storage, there = finished[0].parents[3], tmp_path / "bundle"
    write, written = Folder.write, []

    def fail_in_time(folder, name, data):
        if len(written) == after:
            raise OSError("the disk is full")
        written.append(name)
        write(folder, name, data)

    with monkeypatch.context() as patch:
        patch.setattr(Folder, "write", fail_in_time)
        with pytest.raises(UserError, match="the disk is full"):
            export(storage, "--to", str(there))
    with pytest.raises(UserError, match="no bundle in"):
        read_bundle(Folder.at(there))
    before = {name: (there / name).stat().st_mtime_ns for name in written}
    assert not export(storage, "--to", str(there))["unchanged"]
    assert read_bundle(Folder.at(there)).digest == read_bundle(Folder.at(finished[0])).digest
    assert {name: (there / name).stat().st_mtime_ns for name in written} == before


def test_what_a_killed_export_left_of_a_file_is_in_nobodys_way(finished, bundle):
    (bundle / MANIFEST).rename(bundle / f"{MANIFEST}.89ab0123.partial")
    (bundle / "model.safetensors").rename(bundle / "model.safetensors.0123abcd.partial")
    (bundle / "tokenizer/tokenizer.json").rename(bundle / "tokenizer/tokenizer.json.4567cdef.partial")
    export(finished[0].parents[3], "--to", str(bundle))
    assert contents(bundle) == contents(finished[0])


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json", "tokenizer/ranks.tiktoken"])
@pytest.mark.parametrize("harm", ["cut", "changed", "missing"])
def test_a_damaged_part_is_named(bundle, name, harm):
    data = (bundle / name).read_bytes()
    if harm == "missing":
        (bundle / name).unlink()
    else:
        (bundle / name).write_bytes(data[:-1] if harm == "cut" else data[:-1] + bytes([data[-1] ^ 1]))
    with pytest.raises(UserError, match=f"{name} is damaged or of another bundle"):
        read_bundle(Folder.at(bundle))


def test_parts_of_another_bundle_are_refused(bundle, tmp_path):
    storage = tmp_path / "other"
    make_run(run_folder(str(storage), "r"), JULY, seed=1)
    other = Path(export(storage)["artifacts"]["bundle"])
    shutil.copy(other / "model.safetensors", bundle)
    with pytest.raises(UserError, match="model.safetensors is damaged or of another bundle"):
        read_bundle(Folder.at(bundle))


def test_a_changed_manifest_is_refused(bundle):
    manifest = json.loads((bundle / MANIFEST).read_text())
    manifest["shape"]["rotary_base"] = 10_000.0
    (bundle / MANIFEST).write_text(json.dumps(manifest))
    with pytest.raises(UserError, match="its digest does not fit what it says"):
        read_bundle(Folder.at(bundle))


def test_the_card_says_how_to_load_it_and_where_it_comes_from(finished):
    card = (finished[0] / "README.md").read_text()
    source = read_bundle(Folder.at(finished[0])).source
    assert card.startswith("---\nlibrary_name: transformers\n")
    assert "from_pretrained(folder, trust_remote_code=True)" in card
    assert "| steps, tokens | 7 of 7, 57,344 |" in card
    assert source["weights_sha256"] in card
    assert source["stream"]["corpus"] in card


def test_the_benchmark_of_the_very_weights_is_told(tmp_path):
    run = run_folder(str(tmp_path), "r")
    make_run(run, JULY, ("base",))
    interval = {"value": 0.25, "low": 0.2, "high": 0.3}
    core = {
        "name": "CORE",
        "mean": interval,
        "max_per_task": 50,
        "questions_hash": "beef",
        "seeds": {},
        "tasks": {"arc": {"examples": 50, "accuracy": interval, "centred": interval}},
        "model_digest": "of other weights",
    }
    (run / "base").write_json("base_eval.json", {"step": 7, "core": core})
    assert read_bundle(Folder.at(export(tmp_path)["artifacts"]["bundle"])).source["benchmark"] is None
    core["model_digest"] = read_bundle(Folder.at(export(tmp_path)["artifacts"]["bundle"])).source["weights_sha256"]
    (run / "base").write_json("base_eval.json", {"step": 7, "core": core})
    card = (Path(export(tmp_path, "--fresh")["artifacts"]["bundle"]) / "README.md").read_text()
    assert "0.250 (0.200 to 0.300): centred accuracy" in card
    assert "| arc | 50 | 0.250 (0.200 to 0.300) | 0.250 (0.200 to 0.300) |" in card


def test_what_is_not_there_is_told_with_the_command_that_makes_it(tmp_path):
    with pytest.raises(UserError, match="no run named 'r' with a tokenizer"):
        export(tmp_path)
    make_run(run_folder(str(tmp_path), "r"), JULY, ("base",))
    with pytest.raises(UserError, match="python -m jobs.sft"):
        export(tmp_path, "--stage", "sft")
    with pytest.raises(UserError, match="no checkpoint of step 8 in .*; there are: 7"):
        export(tmp_path, "--step", "8")


def test_a_bundle_may_lie_in_any_store(finished):
    to = "memory://bundles/chat"
    assert not export(finished[0].parents[3], "--to", to)["unchanged"]
    assert export(finished[0].parents[3], "--to", to)["unchanged"]
    assert read_bundle(Folder.at(to)).digest == read_bundle(Folder.at(finished[0])).digest


def test_a_bundle_is_imported_as_a_run_and_exported_from_there_with_the_same_weights(finished, tmp_path):
    def run_import(*flags: str) -> dict:
        given = ["--source", str(finished[0]), "--run", "r", "--storage", str(tmp_path), *flags]
        return import_job.main(import_job.build_parser().parse_args(given))

    assert run_import()["artifacts"]["sft"].endswith("r/sft")
    assert run_import()["unchanged"]
    folder = export(tmp_path)["artifacts"]["bundle"]
    again, first = read_bundle(Folder.at(folder)), read_bundle(Folder.at(finished[0]))
    assert all(torch.equal(again.tensors[name], tensor) for name, tensor in first.tensors.items())
    assert again.source["origin"]["digest"] == first.digest
    assert f"| weights imported from | bundle {first.digest} |" in Path(folder, "README.md").read_text()
    with pytest.raises(UsageError, match="bundle of stage sft: leave out --stage base"):
        run_import("--stage", "base")
    with pytest.raises(UsageError, match="leave out --tokenizer, --step"):
        run_import("--step", "3")
