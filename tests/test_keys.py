"""The file of API keys: hashes only, and errors that name the line but never repeat it."""

import hashlib

import pytest

from nanochat_ray.errors import UserError
from nanochat_ray.serve.keys import StoredKey, add_key, read_keys

HASH = hashlib.sha256(b"secret").hexdigest()


def test_a_created_key_is_told_once_and_only_its_hash_is_stored(tmp_path):
    path = tmp_path / "keys"
    key = add_key(path, "alice", per_minute=60)
    assert key not in path.read_text()
    assert path.stat().st_mode & 0o777 == 0o600
    path.write_text(path.read_text().rstrip())  # as some editors leave it
    other = add_key(path, "bob")
    assert other != key
    digest = [hashlib.sha256(one.encode()).hexdigest() for one in (key, other)]
    assert read_keys(path) == [StoredKey("alice", digest[0], 60), StoredKey("bob", digest[1])]


def test_a_name_that_is_there_already_is_refused_and_the_file_stays_as_it_was(tmp_path):
    path = tmp_path / "keys"
    add_key(path, "alice")
    before = path.read_bytes()
    with pytest.raises(UserError, match="has a key of alice already"):
        add_key(path, "alice")
    assert path.read_bytes() == before


@pytest.mark.parametrize("name", ["", "a b", "a:b", "a#b", "x" * 65, "ä"])
def test_a_name_that_cannot_stand_in_the_file_is_refused(name, tmp_path):
    with pytest.raises(UserError):
        add_key(tmp_path / "keys", name)
    assert not (tmp_path / "keys").exists()


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("alice", "expected name:sha256"),
        (f"alice:{HASH}:1:2", "expected name:sha256"),
        (f":{HASH}", "a name has"),
        (f"first:{HASH}", "used by a line above"),
        ("alice:nr-plaintextkey", "never store a key itself"),
        (f"alice:{HASH.upper()}", "not a sha256"),
        *((f"alice:{HASH}:{rate}", "requests per minute") for rate in ("", "0", "-1", "1.5", "x", "²")),
    ],
)
def test_a_wrong_line_is_named_but_not_repeated(tmp_path, line, words):
    path = tmp_path / "keys"
    path.write_text(f"# keys\nfirst:{HASH}\n\n{line}\n")
    with pytest.raises(UserError, match="line 4: ") as caught:
        read_keys(path)
    assert words in str(caught.value)
    assert HASH not in str(caught.value)
    assert "plaintext" not in str(caught.value)


def test_a_file_that_is_missing_or_empty_is_an_error(tmp_path):
    with pytest.raises(UserError, match="cannot be read"):
        read_keys(tmp_path / "keys")
    (tmp_path / "keys").write_text("# nobody\n")
    with pytest.raises(UserError, match="has no key"):
        read_keys(tmp_path / "keys")
    (tmp_path / "keys").write_bytes(b"\xff")
    with pytest.raises(UserError, match="cannot be read"):
        read_keys(tmp_path / "keys")
