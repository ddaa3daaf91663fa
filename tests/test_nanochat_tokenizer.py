"""A public tokenizer comes in with the ids of its source, and whatever its pickle says, nothing runs."""

import copyreg
import io
import os
import pickle
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest
import tiktoken
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from nanochat_ray.errors import UserError
from nanochat_ray.exchange.nanochat_tokenizer import read_tokenizer, tokenizer_of
from nanochat_ray.storage import Folder
from nanochat_ray.tokenizer import SPECIAL_TOKENS, train_tokenizer
from tests.public_nanochat import PATTERN, make_encoding, with_pattern, write_tokenizer
from tests.public_nanochat import SPECIAL_TOKENS as PUBLIC_SPECIALS
from tests.test_import_nanochat import Calls

ENCODING = make_encoding(390)
TOKENIZER = tokenizer_of(vars(ENCODING))


@given(st.text())
@example("<|bos|> is text\u3000\r\n  123456 don't stop  ")
def test_every_text_has_the_ids_of_the_source(text):
    ids = TOKENIZER.encode(text)
    assert ids == ENCODING.encode_ordinary(text)
    assert TOKENIZER.decode(ids) == ENCODING.decode(ids)


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_pickles_of_every_protocol_are_read(tmp_path, protocol):
    write_tokenizer(tmp_path, ENCODING, protocol)
    tokenizer = read_tokenizer(Folder.at(tmp_path))
    assert tokenizer == TOKENIZER
    assert tokenizer.fingerprint == TOKENIZER.fingerprint
    assert [tokenizer.special(name) for name in SPECIAL_TOKENS] == list(range(381, 390))


def test_a_folder_of_ours_is_read_too(tmp_path):
    tokenizer = train_tokenizer(["some text, some more text"] * 3, 270)
    tokenizer.save(Folder.at(tmp_path))
    assert read_tokenizer(Folder.at(tmp_path)) == tokenizer


def test_no_tokenizer_is_an_error_that_says_what_to_give(tmp_path):
    with pytest.raises(UserError, match=r"neither tokenizer.pkl nor tokenizer.json; give the folder"):
        read_tokenizer(Folder.at(tmp_path))


# Pickles that are programs


def refusal(tmp_path, data: bytes) -> str:
    (tmp_path / "tokenizer.pkl").write_bytes(data)
    with pytest.raises(UserError) as refused:
        read_tokenizer(Folder.at(tmp_path))
    assert "\n" not in str(refused.value)
    return str(refused.value)


def in_an_encoding(value, protocol=4) -> bytes:
    """A pickle of an Encoding whose state has the value in its midst."""

    class Pickler(pickle.Pickler):
        def reducer_override(self, thing):
            if isinstance(thing, tiktoken.Encoding):
                state = {"name": "x", "pat_str": PATTERN, "mergeable_ranks": value, "special_tokens": {}}
                return copyreg.__newobj__, (tiktoken.Encoding,), state
            return NotImplemented

    file = io.BytesIO()
    Pickler(file, protocol).dump(ENCODING)
    return file.getvalue()


@pytest.mark.parametrize("protocol", range(6))
def test_code_in_a_pickle_does_not_run(tmp_path, protocol):
    ran = str(tmp_path / "ran")
    attacks = [
        Calls(os.system, f"touch {ran}"),
        Calls(eval, f"open({ran!r}, 'w')"),
        Calls(exec, f"open({ran!r}, 'w')"),
        Calls(open, ran, "w"),
        Calls(getattr, ENCODING, "encode"),
        Calls(__import__, "antigravity"),
        [Calls(os.mkdir, ran)],
        {"a": (Calls(subprocess.Popen, ["touch", ran]),)},
    ]
    for attack in attacks:
        for data in (pickle.dumps(attack, protocol), in_an_encoding(attack, protocol)):
            message = refusal(tmp_path, data)
            assert "which would run as code" in message or "instruction" in message
            assert "On a machine where you trust that file" in message
    assert not (tmp_path / "ran").exists()
    assert "antigravity" not in sys.modules


def encoding_then(body: bytes) -> bytes:
    """Instructions that make an Encoding, then these."""
    return b"\x80\x04ctiktoken.core\nEncoding\n)\x81" + body + b"."


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b".",
        b"\x80\x04.",
        b"garbage",
        b"\x80\x04N.",
        b"\x80\x09N.",
        encoding_then(b""),
        encoding_then(b"0"),
        encoding_then(b"}b}b"),
        encoding_then(b"N" * 9),
        b"ctiktoken.core\nEncoding\n.",
        b"ctiktoken.core\nEncoding\n)R.",
        b"ctiktoken.core\nEncoding.__init__.__globals__\n.",
        b"\x80\x04c_codecs\nencode\nX\x01\x00\x00\x00aX\x04\x00\x00\x00utf7\x86R.",
        b"\x80\x04c_codecs\nencode\n}b.",
        b"\x80\x04cos\nsystem\n.",
        b"\x80\x04ccopyreg\n_reconstructor\nctiktoken.core\nEncoding\nc__builtin__\nint\nN\x87R.",
        b"\x80\x04\x8c\x02os\x8c\x06system\x93.",
        b"(i__main__\nX\n.",
        b"\x80\x02\x82\x01.",
        b"Pid\n.",
        b"\x80\x04r\xff\xff\xff\xff.",
        b"\x80\x04Nr\xff\xff\xff\xff.",
        b"\x80\x04B\xff\xff\xff\xff.",
        b"\x80\x04\x8e" + b"\xff" * 8 + b".",
        b"\x80\x04)" + b"\x85" * 100_000 + b".",
        encoding_then(b")" + b"\x85" * 100_000 + b"b"),
        encoding_then(b"}(" + b")" + b"\x85" * 100_000 + b"Nub"),
        b"(" * 100_000 + b".",
        b"\x80\x04" + b"}" * 100_000 + b".",
        b"\x80\x04]" + b"2a" * 64 + b".",
        b"I" + b"9" * 10_000 + b"\n.",
    ],
)
def test_strange_pickles_are_refused_and_hurt_nothing(tmp_path, data):
    assert "tokenizer.pkl" in refusal(tmp_path, data)


@given(st.binary(max_size=200), st.integers(0, 400), st.binary(max_size=4))
def test_damaged_pickles_are_refused_and_never_crash(tmp_path_factory, noise, place, patch):
    whole = pickle.dumps(ENCODING)
    cut, patched = whole[: -1 - 5 * place], whole[:place] + patch + whole[place + len(patch) :]
    folder = tmp_path_factory.mktemp("damaged")
    for data in (noise, cut):
        assert "tokenizer.pkl" in refusal(folder, data)
    (folder / "tokenizer.pkl").write_bytes(patched)
    with suppress(UserError):  # a patch may be harmless
        assert read_tokenizer(Folder.at(folder)).vocab_size == 390


def test_a_file_of_no_tokenizers_size_is_not_read(tmp_path):
    with open(tmp_path / "tokenizer.pkl", "wb") as file:
        file.truncate(10**9)
    with pytest.raises(UserError, match="1,000,000,000 bytes, more than any tokenizer"):
        read_tokenizer(Folder.at(tmp_path))


@pytest.mark.slow
def test_the_way_out_that_a_refusal_names_works(tmp_path):
    message = refusal(tmp_path, pickle.dumps(Calls(os.getpid)))
    command = message.partition("python -c ")[2].partition('"')[2].partition('"')[0]
    write_tokenizer(tmp_path, ENCODING)
    root = str(Path(__file__).parents[1])
    subprocess.run([sys.executable, "-c", command], cwd=tmp_path, env={**os.environ, "PYTHONPATH": root}, check=True)
    assert read_tokenizer(Folder.at(tmp_path / "tokenizer_data")) == TOKENIZER


# Encodings that are not ours


def encoding_with(**changes):
    state = {"pat_str": PATTERN, "mergeable_ranks": dict(ENCODING._mergeable_ranks)}
    return {**state, "special_tokens": dict(ENCODING._special_tokens), **changes}


RANKS = ENCODING._mergeable_ranks


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"pat_str": "(" * 3}, "no regular expression"),
        ({"pat_str": ""}, "no pattern"),
        ({"pat_str": b"x"}, "no pattern"),
        ({"mergeable_ranks": []}, "not a dictionary of bytes to numbers"),
        ({"mergeable_ranks": {"a": 1}}, "not a dictionary of bytes to numbers"),
        ({"mergeable_ranks": {**RANKS, b"zz": 500}}, "ranks are not 0 to 381, each once"),
        ({"mergeable_ranks": {**RANKS, b"zz": 380}}, "ranks are not 0 to 381, each once"),
        ({"mergeable_ranks": {**RANKS, b"": 381}}, "ranks are not"),
        ({"mergeable_ranks": {bytes([n, n]): n for n in range(256)}}, "no token for 256 of the 256 bytes"),
        ({"special_tokens": {}}, "other special tokens .*: none instead of <|bos|> 381"),
        ({"special_tokens": {"<|bos|>": 381}}, r"other special tokens .*: <\|bos\|> 381 instead"),
        ({"special_tokens": {name: 400 + n for n, name in enumerate(PUBLIC_SPECIALS)}}, "bos|> 400, "),
        ({"special_tokens": {name: 381 + n for n, name in enumerate(reversed(PUBLIC_SPECIALS))}}, "output_end|> 381"),
    ],
)
def test_an_encoding_that_cannot_be_ours_is_refused_with_the_reason(changes, reason):
    with pytest.raises(UserError, match=reason.replace("|>", r"\|>").replace(r"\\|", r"\|").replace("<|", r"<\|")):
        tokenizer_of(encoding_with(**changes))


def test_tiktokens_own_encodings_are_refused(tmp_path):
    message = refusal(tmp_path, encoding_then(b"X\x04\x00\x00\x00gpt2b"))
    assert "tiktoken's own 'gpt2', which has no tokens for chats" in message


def test_the_pattern_of_the_source_is_kept():
    encoding = with_pattern(ENCODING, r"\w|\W+")
    assert tokenizer_of(vars(encoding)).encode("the tea") == encoding.encode_ordinary("the tea")
    assert tokenizer_of(vars(encoding)).encode("the") != TOKENIZER.encode("the")


@pytest.mark.parametrize("lengths", ["raw", "text"])
def test_both_ways_to_count_bytes_belong_to_the_tokenizer(tmp_path, lengths):
    """The public trainer's: of the text, where a byte that is no character reads U+FFFD, which has three."""
    write_tokenizer(tmp_path, ENCODING)
    counted = TOKENIZER.token_bytes()
    if lengths == "text":
        counted[128:256] = 3
    torch.save(torch.tensor(counted), tmp_path / "token_bytes.pt")
    assert read_tokenizer(Folder.at(tmp_path)) == TOKENIZER


def test_lengths_of_another_tokenizer_are_refused(tmp_path):
    counted = torch.tensor(TOKENIZER.token_bytes())
    other = counted.clone()
    other[300] = 7
    for content, reason in (
        (other, "of 1 ids the length differs, the first is 300, .* of 7 bytes"),
        (counted[:-1], "not one number for each of the 390 ids"),
        (counted.float().expand(390, 390), "not one number for each"),
        ({"a": 1}, "cannot be read as a tensor"),
        (torch.ones(1).expand(10**9), "not one number for each"),
        (Calls(os.getpid), "cannot be read as a tensor"),
    ):
        write_tokenizer(tmp_path, ENCODING)
        torch.save(content, tmp_path / "token_bytes.pt")
        with pytest.raises(UserError, match=reason):
            read_tokenizer(Folder.at(tmp_path))
