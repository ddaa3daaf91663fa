"""The tokenizer: exact, deterministic, immune to special-looking text, safe to store."""

import base64
import json
import pickle
import random
import subprocess
import sys

import numpy as np
import pytest
import rustbpe
from hypothesis import given
from hypothesis import strategies as st

from jobs import tokenizer as tokenizer_job
from jobs import tokenizer_eval as eval_job
from nanochat_ray.errors import UsageError, UserError
from nanochat_ray.reference_encodings import REFERENCE_FILES, reference_encoding
from nanochat_ray.storage import Folder
from nanochat_ray.tokenizer import MIN_VOCAB_SIZE, SPECIAL_TOKENS, SPLIT_PATTERN, Tokenizer, train_tokenizer
from nanochat_ray.tokenizer_samples import SAMPLES

TEXTS = [*SAMPLES.values(), "<|bos|> is nine letters"]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_tokenizer(TEXTS, 600)


@pytest.fixture(scope="module")
def sizes(tokenizer) -> np.ndarray:
    return tokenizer.token_bytes()


@given(text=st.text())
def test_any_text_round_trips(tokenizer, sizes, text):
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert tokenizer.decode_bytes(ids) == text.encode()
    assert sizes[ids].sum() == len(text.encode())


@given(pieces=st.lists(st.sampled_from([f"<|{name}|>" for name in SPECIAL_TOKENS] + ["<|", "|>", "a", " "])))
def test_special_looking_text_never_becomes_a_special_token(tokenizer, pieces):
    text = "".join(pieces)
    ids = tokenizer.encode(text)
    assert max(ids, default=0) < tokenizer.special("bos")
    assert tokenizer.decode(ids) == text


def test_special_tokens_are_the_last_nine_ids_in_order(tokenizer):
    assert [tokenizer.special(name) for name in SPECIAL_TOKENS] == list(range(591, 600))
    assert tokenizer.vocab_size == 600
    assert tokenizer.bos == 591
    assert tokenizer.decode([tokenizer.bos]) == "<|bos|>"


def test_token_bytes_counts_bytes_and_gives_special_tokens_none(tokenizer):
    sizes = tokenizer.token_bytes()
    assert sizes.dtype == np.int32
    assert sizes.shape == (600,)
    assert (sizes[:256] == 1).all()
    assert (sizes[-9:] == 0).all()
    assert all(sizes[i] == len(tokenizer.decode_bytes([i])) for i in range(591))


@pytest.mark.parametrize("threads", [1, 2])
def test_a_batch_is_encoded_like_its_texts_one_by_one(tokenizer, threads):
    assert tokenizer.encode_batch([*TEXTS, ""], threads=threads) == [tokenizer.encode(text) for text in [*TEXTS, ""]]


@given(text=st.text(st.sampled_from(" \t\n\r\u3000ab1'.s"), max_size=40))
def test_bounding_white_space_does_not_change_ordinary_text(tokenizer, text):
    unbounded = SPLIT_PATTERN.replace(r"\s{1,50000}(?!\S)", r"\s+(?!\S)")
    assert unbounded != SPLIT_PATTERN
    assert tokenizer.encode(text) == Tokenizer(tokenizer.ranks, unbounded).encode(text)


@pytest.mark.parametrize("unit", [" ", "\u3000", "a"])
def test_a_million_equal_characters_are_encoded_and_trained_on(tokenizer, unit):
    text = unit * 1_000_001 + "x"
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert train_tokenizer([text], MIN_VOCAB_SIZE + 1).vocab_size == MIN_VOCAB_SIZE + 1


def test_numbers_are_cut_into_pairs_of_digits():
    trained = train_tokenizer(["1234567890 " * 50], 270)
    numbers = [token for token in _tokens(trained)[256:] if token.isdigit()]
    assert sorted(numbers) == [b"12", b"34", b"56", b"78", b"90"]


def test_tiktoken_runs_the_merges_as_rustbpe_trained_them():
    trainer = rustbpe.Tokenizer()
    trainer.train_from_iterator(iter(TEXTS), 591, pattern=SPLIT_PATTERN)
    ours = train_tokenizer(TEXTS, 600)
    assert all(ours.encode(text) == trainer.encode(text) for text in TEXTS)


def test_the_same_texts_give_the_same_tokenizer(tokenizer):
    again = train_tokenizer(iter(TEXTS), 600)
    assert again == tokenizer
    assert again.fingerprint == tokenizer.fingerprint


def test_the_fingerprint_follows_ranks_and_pattern_but_not_training_notes(tokenizer):
    others = {
        train_tokenizer(TEXTS, 599).fingerprint,
        Tokenizer(tokenizer.ranks, SPLIT_PATTERN.replace("{1,2}", "{1,3}")).fingerprint,
    }
    assert len(others | {tokenizer.fingerprint}) == 3
    assert Tokenizer(tokenizer.ranks, training={"seconds": 1}).fingerprint == tokenizer.fingerprint


def test_it_pickles_as_data_also_after_use(tokenizer):
    tokenizer.encode("used")
    copy = pickle.loads(pickle.dumps(tokenizer))
    assert copy == tokenizer
    assert copy.encode("hello") == tokenizer.encode("hello")
    assert b"tiktoken" not in pickle.dumps(tokenizer)


def test_lone_surrogates_become_the_replacement_character(tokenizer):
    assert tokenizer.decode(tokenizer.encode("a\ud800b")) == "a\ufffdb"
    assert tokenizer.encode_batch(["a\ud800b"], threads=2) == [tokenizer.encode("a\ufffdb")]
    assert train_tokenizer(["\ud800 \ud800"], 266) == train_tokenizer(["\ufffd \ufffd"], 266)


def test_text_that_is_no_string_is_refused(tokenizer):
    with pytest.raises(TypeError):
        tokenizer.encode(None)
    with pytest.raises(UserError, match=r"document 1 .* is NoneType"):
        train_tokenizer(["a", None], 300)


def test_ids_outside_the_vocabulary_are_refused(tokenizer):
    with pytest.raises(KeyError):
        tokenizer.decode([600])


def test_too_small_a_vocabulary_is_wrong_usage():
    with pytest.raises(UsageError, match="at least 265"):
        train_tokenizer(["text"], 264)


def test_too_large_a_vocabulary_names_the_largest_that_works():
    with pytest.raises(UserError, match="pass --vocab-size 269 or less"):
        train_tokenizer(["abcd abcd"], 300)
    assert train_tokenizer(["abcd abcd"], 269).vocab_size == 269
    with pytest.raises(UserError, match="--vocab-size 265 or less"):
        train_tokenizer([], 300)


def test_it_is_the_same_after_saving_and_loading(tokenizer, tmp_path):
    noted = Tokenizer(tokenizer.ranks, training={"bytes_per_token": 4.5})
    noted.save(Folder.at(tmp_path))
    loaded = Tokenizer.load(Folder.at(tmp_path))
    assert loaded == tokenizer
    assert loaded.training == {"bytes_per_token": 4.5}
    facts = json.loads((tmp_path / "tokenizer.json").read_text())
    assert facts["vocab_size"] == 600
    assert facts["fingerprint"] == tokenizer.fingerprint


def _truncate(path):
    path.write_bytes(path.read_bytes()[:-1])


def _flip_a_bit(path):
    content = bytearray(path.read_bytes())
    content[100] ^= 1
    path.write_bytes(content)


def _replace(old, new):
    return lambda path: path.write_text(path.read_text().replace(old, new))


@pytest.mark.parametrize(
    ("name", "damage", "message"),
    [
        ("ranks.tiktoken", _truncate, r"ranks\.tiktoken is damaged .* bytes instead of"),
        ("ranks.tiktoken", _flip_a_bit, r"ranks\.tiktoken is damaged .*sha256.*--fresh"),
        ("ranks.tiktoken", lambda path: path.unlink(), r"ranks\.tiktoken does not exist; train one"),
        ("tokenizer.json", lambda path: path.unlink(), r"tokenizer\.json does not exist; train one"),
        ("tokenizer.json", lambda path: path.write_text("{"), r"tokenizer\.json is damaged"),
        ("tokenizer.json", lambda path: path.write_text("[]"), r"tokenizer\.json is damaged"),
        ("tokenizer.json", lambda path: path.write_bytes(b"\xff\xfe{"), r"tokenizer\.json is damaged"),
        ("tokenizer.json", _replace('"sha256"', '"sha255"'), r"tokenizer\.json is damaged .*sha256"),
        ("tokenizer.json", _replace("{1,2}", "{1,3}"), r"tokenizer\.json is damaged .*fingerprint"),
        ("tokenizer.json", _replace('"format": 1', '"format": 2'), r"has format 2 .* reads format 1"),
        ("tokenizer.json", _replace("python_start", "julia_start"), r"special tokens .*julia_start"),
    ],
)
def test_damage_is_found_and_named(tokenizer, tmp_path, name, damage, message):
    tokenizer.save(Folder.at(tmp_path))
    damage(tmp_path / name)
    with pytest.raises(UserError, match=message):
        Tokenizer.load(Folder.at(tmp_path))


def test_reference_encodings_are_used_only_from_an_intact_cache(tmp_path, monkeypatch):
    def no_network(url):
        raise AssertionError(f"download of {url}")

    monkeypatch.setattr("tiktoken.load.read_file", no_network)
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path))
    damaged = tmp_path / "9b5ad71b2ce5302211f9c61530b329a4922fc6a4"  # SHA-1 of the URL of cl100k_base
    damaged.write_bytes(b"IQ== 0\n")
    assert [reference_encoding(name) for name in REFERENCE_FILES] == [None, None]
    assert damaged.exists()
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", "")
    assert reference_encoding("gpt2") is None


def test_the_job_trains_keeps_and_refuses_to_mix_settings(tmp_path, capsys):
    corpus = _small_corpus(tmp_path / "texts")

    def run(*flags):
        arguments = ["--storage", str(tmp_path / "out"), "--corpus", corpus, "--run", "r", "--vocab-size", *flags]
        return tokenizer_job.main(tokenizer_job.build_parser().parse_args(arguments))

    first = run("400")
    assert not first["unchanged"]
    assert first["chars"] <= 10_000 * first["documents"]
    folder = Folder.at(first["artifacts"]["tokenizer"])
    assert Tokenizer.load(folder).fingerprint == first["fingerprint"]

    assert run("400") == {**first, "unchanged": True}
    assert "already" in capsys.readouterr().out
    with pytest.raises(UserError, match=r"vocab_size: 400 → 401.*--fresh"):
        run("401")
    with pytest.raises(UserError, match="larger than the text supports"):
        run("30000", "--fresh")
    assert Tokenizer.load(folder).vocab_size == 400  # a failed replacement costs nothing
    assert run("401", "--fresh")["vocab_size"] == 401
    assert run("401", "--fresh", "--max-chars", "5000")["chars"] == 5000


def test_the_evaluation_writes_what_the_report_reads(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path))
    arguments = ["--storage", str(tmp_path / "out"), "--corpus", _small_corpus(tmp_path / "texts"), "--run", "r"]
    tokenizer_job.main(tokenizer_job.build_parser().parse_args([*arguments, "--vocab-size", "400"]))
    eval_job.main(eval_job.build_parser().parse_args(arguments))
    saved = json.loads((tmp_path / "out/runs/r/tokenizer/eval.json").read_text())
    assert saved["round_trip"] is True
    assert set(saved["encode_mb_per_s"]) == {"1", "2"}
    assert {row["text"] for row in saved["rows"]} == {"texts (training)", "texts (validation)", *SAMPLES}
    assert all(row["encoding"] == "ours" and row["bytes_per_token"] >= 1 for row in saved["rows"])
    assert "gpt2: not available offline" in capsys.readouterr().out


def test_wrong_usage_ends_with_code_2_and_one_line():
    command = [sys.executable, "-m", "jobs.tokenizer", "--vocab-size", "7"]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 2
    assert result.stderr.splitlines() == [result.stderr.strip()]
    assert "at least 265" in result.stderr


@pytest.mark.slow
def test_real_text_trains_fast_and_compresses(shared_data, tmp_path):
    arguments = ["--storage", str(tmp_path), "--corpus", str(shared_data / "pretrain"), "--preset", "tiny"]
    figures = tokenizer_job.main(tokenizer_job.build_parser().parse_args([*arguments, "--max-chars", "15e6"]))
    assert figures["vocab_size"] == 4096
    assert figures["chars"] == 15_000_000
    assert figures["seconds"] < 30
    assert figures["bytes_per_token"] > 3.5


def _tokens(tokenizer: Tokenizer) -> list[bytes]:
    return [base64.b64decode(line.split()[0]) for line in tokenizer.ranks.splitlines()]


def _small_corpus(folder) -> str:
    import pyarrow as pa
    from pyarrow import parquet as pq

    folder.mkdir()
    words = random.Random(0)
    for name in ("a", "b"):
        texts = ["".join(words.choices(TEXTS, k=2)) * 9 for _ in range(5)]
        pq.write_table(pa.table({"text": texts}), folder / f"{name}.parquet")
    return str(folder)
