"""CORE of models in Hugging Face's format: scores are the plain model's, whatever stands beside them in a batch."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from jobs import base_eval
from nanochat_ray import cli
from nanochat_ray.eval.core import core_questions
from nanochat_ray.eval.core_bundle import open_bundle
from nanochat_ray.eval.exam import Piece
from nanochat_ray.eval.hugging_face import HuggingFaceExam, HuggingFaceScorer, model_digest
from nanochat_ray.eval.question import Question, as_question
from nanochat_ray.storage import Folder
from tests.fakes import ByteTokenizer
from tests.small_bundle import FILES, ITEMS, items, write_bundle

pytestmark = pytest.mark.slow  # importing transformers alone takes seconds

POSITIONS = 96
BEGIN = "<|endoftext|>"


@pytest.fixture(scope="module")
def transformers():
    """The library, without network."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_HUB_OFFLINE", "1")
        import transformers

        yield transformers


@pytest.fixture(scope="module")
def model(transformers):
    """A GPT-2 whose weights are random and far from flat."""
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=320, n_positions=POSITIONS, n_embd=32, n_layer=2, n_head=2, initializer_range=0.3
    )
    return transformers.GPT2LMHeadModel(config).eval()


def make_tokenizer(transformers, **special: str):
    """Byte-level BPE, trained on the questions of the small bundle."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    texts = [json.dumps(item) for task in items().values() for item in task]
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=[BEGIN],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=POSITIONS, **special)


@pytest.fixture(scope="module")
def folder(transformers, model, tmp_path_factory) -> Path:
    """The model as it would be downloaded."""
    folder = tmp_path_factory.mktemp("downloaded") / "tiny-gpt2"
    model.save_pretrained(folder)
    make_tokenizer(transformers, eos_token=BEGIN, bos_token=BEGIN).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    return open_bundle(Folder.at(write_bundle(tmp_path_factory.mktemp("bundle")))).asked(None)


@pytest.fixture(scope="module")
def questions(tasks) -> list[Question]:
    """All of them, those of the task with examples longer than the model; in bytes."""
    found = [q for task in tasks for q in core_questions(task, range(ITEMS), ByteTokenizer(), POSITIONS)]
    assert any(len(sequence) == POSITIONS for question in found for sequence in question.sequences)
    return found


def alone(model, question: Question) -> list[tuple[np.ndarray, np.ndarray]]:
    """Losses and likeliest tokens of each scored end, one whole sequence at a time."""
    found = []
    for sequence, start in zip(question.sequences, question.starts, strict=True):
        with torch.inference_mode():
            logits = model(torch.tensor([sequence])).logits[0, start - 1 : -1].float()
        nats = torch.nn.functional.cross_entropy(logits, torch.tensor(sequence[start:]), reduction="none")
        found.append((nats.numpy(), logits.argmax(-1).numpy()))
    return found


@pytest.mark.parametrize("batch_tokens", [1, 300, 100_000])
def test_scores_are_those_of_each_sequence_by_itself(model, questions, batch_tokens):
    scored = list(HuggingFaceScorer(model, batch_tokens).score(questions))
    assert [question for question, _ in scored] == questions
    for question, ends in scored:
        for end, (nats, likeliest) in zip(ends, alone(model, question), strict=True):
            np.testing.assert_allclose(end.nats, nats, atol=1e-4)
            assert np.array_equal(end.likeliest, likeliest)


def test_a_model_that_cannot_leave_logits_out_gets_the_same_scores(model, questions):
    class Plain:
        """Its `forward` knows of no `logits_to_keep`."""

        config, device = model.config, model.device

        def forward(self, input_ids, attention_mask, use_cache):
            return model(input_ids=input_ids, attention_mask=attention_mask, use_cache=use_cache)

        __call__ = forward

    for (_, ends), (_, plain) in zip(
        HuggingFaceScorer(model).score(questions), HuggingFaceScorer(Plain()).score(questions), strict=True
    ):
        for one, other in zip(ends, plain, strict=True):
            np.testing.assert_allclose(one.nats, other.nats, atol=1e-5)


def test_a_question_longer_than_the_model_keeps_its_end(model):
    scorer = HuggingFaceScorer(model)
    assert scorer.limit == POSITIONS
    sequences = [[number % 200 for number in range(first, first + 150)] for first in (0, 0)]
    sequences[1][-1] = 7
    question = as_question("long", 0, ["", ""], sequences, [149, 149], 0, scorer.limit)
    assert question.sequences[0] == tuple(sequences[0][-POSITIONS:])
    (_, ends), *_ = scorer.score([question])
    assert [end.nats.item() for end in ends] == pytest.approx([nats.item() for nats, _ in alone(model, question)], 1e-4)


def test_texts_make_no_special_tokens_and_bos_stands_in_front(folder, tasks, transformers):
    from nanochat_ray.eval.hugging_face import _load

    _, tokenizer = _load(str(folder), trust_code=False)
    assert tokenizer.bos == 0
    ids = tokenizer.encode(f"a {BEGIN} b")
    assert tokenizer.bos not in ids
    assert tokenizer.decode(ids) == f"a {BEGIN} b"


def test_gpt2s_way_without_a_bos_token_takes_the_one_that_ends_texts(folder, transformers, tmp_path):
    from nanochat_ray.eval.hugging_face import _load

    shutil.copytree(folder, tmp_path / "model")
    make_tokenizer(transformers, eos_token=BEGIN).save_pretrained(tmp_path / "model")
    _, tokenizer = _load(str(tmp_path / "model"), trust_code=False)
    assert tokenizer.bos == 0


def hugging_face_eval(tmp_path: Path, model: Path, *flags: str) -> int:
    if not (tmp_path / "bundle").exists():
        write_bundle(tmp_path / "bundle")
    place = ["--storage", str(tmp_path / "out"), "--bundle", str(tmp_path / "bundle"), "--dtype", "fp32"]
    return cli.run(base_eval.main, base_eval.build_parser(), [*place, "--hf", str(model), *flags])


def test_core_of_such_a_model_from_end_to_end(folder, tasks, tmp_path, capsys):
    assert hugging_face_eval(tmp_path, folder, "--json") == 0
    captured = capsys.readouterr()
    figures = json.loads(captured.out.splitlines()[-1])
    core, results = figures["core"], figures["artifacts"]["results"]
    assert core["title"] == "tiny-gpt2"
    assert core["model_digest"] == model_digest(str(folder))
    assert [task["examples"] for task in core["tasks"].values()] == [ITEMS] * len(FILES)
    assert "longer than the specified maximum" not in captured.err

    grade = HuggingFaceExam(str(folder), tasks, "fp32").begin()
    expected = [verdict for task in tasks for verdict in grade(Piece(task.name, tuple(range(ITEMS))))]
    kept = {(row["task"], row["index"]): row for row in pq.read_table(results).to_pylist()}
    assert len(kept) == len(expected)
    for verdict in expected:
        row = kept[verdict.task, verdict.index]
        assert (row["prediction"], row["correct"]) == (verdict.prediction, verdict.correct)
        assert row["scores"] == pytest.approx(verdict.scores, abs=1e-4)

    assert hugging_face_eval(tmp_path, folder) == 0
    assert "CORE: all 36 questions were answered before" in capsys.readouterr().out


def error_line(capsys: pytest.CaptureFixture[str]) -> str:
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert "this is a bug" not in line
    return line


def test_a_tokenizer_without_a_token_that_begins_texts_is_refused(folder, transformers, tmp_path, capsys):
    shutil.copytree(folder, tmp_path / "model")
    make_tokenizer(transformers).save_pretrained(tmp_path / "model")
    assert hugging_face_eval(tmp_path, tmp_path / "model") == 1
    assert re.search(r"tokenizer of .*model has no token that begins a text", error_line(capsys))


@pytest.mark.parametrize("damage", ["config", "tokenizer", "cut off", "other shapes", "a layer is missing"])
def test_a_folder_that_is_no_whole_model_is_one_line(folder, tmp_path, capsys, damage):
    place = shutil.copytree(folder, tmp_path / "model")
    said = f"no causal language model can be loaded from {place}"
    if damage == "config":
        (place / "config.json").unlink()
    elif damage == "tokenizer":
        for file in place.glob("*token*"):
            file.unlink()
        said = f"the tokenizer of {place} knows no words"
    elif damage == "cut off":
        weights = (place / "model.safetensors").read_bytes()
        (place / "model.safetensors").write_bytes(weights[:-100])
    else:
        config = json.loads((place / "config.json").read_text())
        config |= {"n_embd": 64} if damage == "other shapes" else {"n_layer": 3}
        (place / "config.json").write_text(json.dumps(config))
    assert hugging_face_eval(tmp_path, place) == 1
    assert said in error_line(capsys)


def test_code_that_comes_with_a_model_runs_only_if_it_is_trusted(folder, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    place = shutil.copytree(folder, tmp_path / "model")
    config = json.loads((place / "config.json").read_text())
    names = {"AutoConfig": "configuration_own.OwnConfig", "AutoModelForCausalLM": "modeling_own.OwnModel"}
    (place / "config.json").write_text(json.dumps({**config, "model_type": "own", "auto_map": names}))
    (place / "configuration_own.py").write_text(
        "from transformers import GPT2Config\nclass OwnConfig(GPT2Config):\n    model_type = 'own'\n"
    )
    (place / "modeling_own.py").write_text(
        f"open({str(tmp_path / 'it ran')!r}, 'w').close()\n"
        "from transformers import GPT2LMHeadModel\nfrom .configuration_own import OwnConfig\n"
        "class OwnModel(GPT2LMHeadModel):\n    config_class = OwnConfig\n"
    )
    assert hugging_face_eval(tmp_path, place) == 1
    assert "if it comes with code that you trust, give --trust-code" in error_line(capsys)
    assert not (tmp_path / "it ran").exists()
    command = [sys.executable, "-m", "jobs.base_eval", "--hf", str(place), "--trust-code", "--dtype", "fp32"]
    places = ["--bundle", str(tmp_path / "bundle"), "--storage", str(tmp_path / "out")]
    answer = subprocess.run([*command, *places], cwd=Path(__file__).parents[1], capture_output=True, text=True)
    assert answer.returncode == 0, answer.stderr
    assert (tmp_path / "it ran").exists()
