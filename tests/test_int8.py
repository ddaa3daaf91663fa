"""Matrices of eight bits for whoever uses a model: where they can be had, what they cost, and who is refused."""

import json
import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from jobs import base_eval, bench, chat, pretrain, serve
from kernels import cpu_build, cpu_step, dispatch
from nanochat_ray import cli
from nanochat_ray.bench.decode_quality import REFERENCE, quality_figures, quality_lines
from nanochat_ray.data.corpus import Corpus, open_corpus
from nanochat_ray.device import pick_dtype, pick_used_dtype
from nanochat_ray.engine.load import describe_chat_model, load_chat_model
from nanochat_ray.engine.sampler import SamplingParams
from nanochat_ray.errors import UsageError, UserError
from nanochat_ray.eval.step_text import StepText
from nanochat_ray.eval.text import text_figures
from nanochat_ray.storage import Folder, run_folder
from tests.small_corpus import write_corpus
from tests.tiny_runs import JULY, make_run, random_model, tiny_tokenizer

CPU = torch.device("cpu")
SHAPE = replace(JULY, n_head=2, n_kv_head=1)  # heads of 32, as the fused step wants them

if reason := cpu_step.why_not(SHAPE, torch.int8):
    assert not os.environ.get("CI"), f"no CPU kernel here: {reason}; CI must not skip what needs it"
    pytest.skip(f"no CPU kernel here: {reason}", allow_module_level=True)


@pytest.fixture(scope="module")
def storage(tmp_path_factory) -> str:
    """With a run `tiny`, whose stages hold one random model."""
    folder = str(tmp_path_factory.mktemp("int8"))
    make_run(run_folder(folder, "tiny"), SHAPE, ("base", "sft"))
    return folder


@pytest.fixture(scope="module")
def corpus(storage) -> Corpus:
    write_corpus(Path(storage, "text"))
    return open_corpus(f"{storage}/text", Folder.at(storage), None)


@pytest.fixture
def no_compiler(monkeypatch):
    monkeypatch.setenv("CXX", "/nowhere/c++")
    monkeypatch.setattr(cpu_build, "load", cpu_build.load.__wrapped__)  # another test may have loaded it


def test_it_is_for_models_that_are_used_on_a_cpu():
    assert pick_used_dtype(CPU, "int8") == (torch.int8, "chosen")
    assert pick_used_dtype(CPU, "bf16") == (torch.bfloat16, "chosen")
    assert pick_used_dtype(CPU) == pick_dtype(CPU)
    with pytest.raises(UsageError, match="int8 is the CPU's; on cuda choose from bf16, fp32"):
        pick_used_dtype(torch.device("cuda"), "int8")
    with pytest.raises(UsageError, match="'int4' is not one of"):
        pick_used_dtype(CPU, "int4")


def test_training_with_it_is_refused_in_words(capsys):
    with pytest.raises(UsageError, match="int8 is for models that are used, not for training"):
        pick_dtype(CPU, "int8")
    with pytest.raises(SystemExit) as stopped:
        cli.run(pretrain.main, pretrain.build_parser(), ["--dtype", "int8"])
    assert stopped.value.code == 2
    assert "argument --dtype: int8 is for models that are used; train with bf16 or fp32" in capsys.readouterr().err


def test_whoever_uses_a_model_can_ask_for_it(storage):
    for job in (chat, serve, base_eval):
        assert job.build_parser().parse_args(["--dtype", "int8"]).dtype == "int8"
    place = (storage, "tiny", "sft", "cpu")
    loaded = load_chat_model(*place, "int8")
    assert loaded.about["dtype"] == "int8"
    assert loaded.about["model_step"].startswith("fused CPU step, int8")
    greedy = SamplingParams(temperature=0.0, max_tokens=8)
    assert list(loaded.engine.stream(tiny_tokenizer().encode("Hello there"), greedy))[-1].finish is not None


def test_models_of_unlike_dtypes_never_share_a_reply(storage):
    place = (storage, "tiny", "sft")
    prints = {describe_chat_model(*place, None, dtype)[3] for dtype in (None, "fp32", "bf16", "int8")}
    assert len(prints) == 4
    assert load_chat_model(*place, "cpu", "int8").fingerprint in prints


def test_without_a_compiler_it_is_refused_and_bf16_goes_on_with_a_warning(storage, no_compiler, capsys):
    with pytest.raises(UserError, match=r"int8 needs the fused step of the CPU: no C\+\+ compiler: .* --dtype bf16"):
        load_chat_model(storage, "tiny", "sft", "cpu", "int8")
    assert (
        load_chat_model(storage, "tiny", "sft", "cpu", "bf16")
        .about["model_step"]
        .startswith("torch on cpu: no C++ compil")
    )
    assert "a third of the speed: no C++ compiler" in capsys.readouterr().err


def test_a_step_reads_text_as_the_network_does():
    model = random_model(SHAPE)
    tokens_MT = np.random.default_rng(0).integers(0, SHAPE.vocab_size, (3, 40))
    ids = torch.from_numpy(tokens_MT)
    with torch.no_grad():
        logits_MTV = model(ids[:, :-1])
        nats_MT = model(ids[:, :-1], ids[:, 1:], reduction="none")
    text = StepText(dispatch.step_model(model, torch.float32, threads=1)[0])
    found_MT, likeliest_MT = text.read(tokens_MT)
    np.testing.assert_allclose(found_MT, nats_MT.numpy(), atol=1e-4)
    np.testing.assert_array_equal(likeliest_MT, logits_MTV.argmax(dim=-1).numpy())
    np.testing.assert_allclose(text.losses(ids[:, :-1], ids[:, 1:]).numpy(), nats_MT.numpy(), atol=1e-4)
    begin = tokens_MT[0, :7].tolist()
    assert text.continued(begin, 9) == list(model.generate(begin, 9, temperature=0.0))


def test_what_it_costs_is_measured_on_held_out_text(storage, corpus):
    figures = quality_figures(storage, "tiny", corpus, tokens=1024)
    assert json.loads(json.dumps(figures)) == figures
    assert figures["tokens"] == 1024
    dtypes = figures["dtypes"]
    assert list(dtypes) == [REFERENCE, "bf16", "fp32", "int8"]
    assert dtypes["fp32"]["same_likeliest"] > 0.999
    assert abs(dtypes["fp32"]["bpb_cost"]) < 1e-5 < abs(dtypes["int8"]["bpb_cost"]) < 0.01
    assert 0.8 < dtypes["int8"]["same_likeliest"] < dtypes["bf16"]["same_likeliest"] <= 1
    lines = quality_lines(figures)
    assert [line.what for line in lines] == list(dtypes)
    assert "of 1,024 positions; fused CPU step, int8" in lines[-1].beside


@pytest.mark.slow
def test_bits_and_samples_of_a_base_model_can_be_those_of_int8(storage, corpus):
    run = run_folder(storage, "tiny")
    int8, fp32 = (text_figures(run, 7, corpus, CPU, dtype, 1024) for dtype in (torch.int8, torch.float32))
    assert int8["val_bpb"] != fp32["val_bpb"]
    assert int8["val_bpb"] == pytest.approx(fp32["val_bpb"], rel=0.01)
    assert all(sample["text"] for sample in int8["samples"])
    with pytest.raises(UsageError, match="--hf takes bf16 or fp32"):
        base_eval.main(base_eval.build_parser().parse_args(["--hf", "gpt2/", "--dtype", "int8"]))


@pytest.mark.slow
def test_one_command_says_what_each_dtype_costs_and_another_how_fast_it_writes(storage, corpus, capsys):
    flags = ["--storage", storage, "--corpus", f"{storage}/text", "--quick", "--json"]
    assert cli.run(bench.main, bench.build_parser(), ["decode", "--run", "tiny", *flags]) == 0
    *_, table, last = capsys.readouterr().out.strip().splitlines()
    assert "cores busy with other programs" in table
    assert set(json.loads(last)["dtypes"]) == {REFERENCE, "bf16", "fp32", "int8"}
    sizes = ["--vocab-size", "300", "--sequence-len", "32", "--dtype", "int8"]
    assert cli.run(bench.main, bench.build_parser(), ["decode", *sizes, *flags]) == 0
    figures = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (figures["dtype"], figures["activations_dtype"]) == ("torch.int8", "torch.bfloat16")
    assert all(decode["tok_per_s"] > 0 for decode in figures["decode"].values())
