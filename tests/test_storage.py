"""Folders: names are joined before a URI's query, files appear whole, pieces and whole contents are the same."""

import pytest

from nanochat_ray.errors import UsageError, UserError
from nanochat_ray.storage import READ_BYTES, Folder, retrying, run_folder


def test_names_are_joined_before_the_query_of_a_uri():
    folder = Folder.at("s3://bucket/path/?region=eu-west-1&scheme=http")
    assert str(folder / "runs" / "a") == "s3://bucket/path/runs/a?region=eu-west-1&scheme=http"
    assert str(Folder.at("s3://bucket") / "a") == "s3://bucket/a"


def test_a_question_mark_in_a_local_path_is_a_name(tmp_path):
    folder = Folder.at(tmp_path / "what?") / "runs"
    folder.write("a", "x")
    assert (tmp_path / "what?" / "runs" / "a").read_text() == "x"


def test_pieces_are_written_and_read_one_at_a_time(tmp_path):
    folder, data = Folder.at(tmp_path), bytes(range(256)) * (READ_BYTES // 128)
    folder.write("a", (data[start : start + 1000] for start in range(0, len(data), 1000)))
    pieces = list(folder.read_pieces("a"))
    assert [len(piece) for piece in pieces] == [READ_BYTES, READ_BYTES]
    assert b"".join(pieces) == data == folder.read("a")


def test_a_write_that_breaks_off_leaves_the_old_content_and_nothing_else(tmp_path):
    folder = Folder.at(tmp_path)
    folder.write("a", "old")

    def breaking_off():
        yield b"new"
        raise OSError("the disk is full")

    with pytest.raises(OSError, match="full"):
        folder.write("a", breaking_off())
    assert folder.read("a") == b"old"
    assert folder.list() == ["a"]


@pytest.mark.parametrize(("when_full", "pauses"), [(True, [0.5, 1.0]), (False, [])])
def test_a_full_disk_is_waited_for_only_where_that_is_wanted(when_full, pauses):
    outcomes = iter([OSError(28, "No space left on device")] * 2)
    slept: list[float] = []

    def act() -> str:
        if (error := next(outcomes, None)) is not None:
            raise error
        return "done"

    def attempt() -> str:
        return retrying(act, Folder.at("out"), lambda message: None, sleep=slept.append, when_full=when_full)

    if when_full:
        assert attempt() == "done"
    else:
        with pytest.raises(UserError, match="no room is left on the disk"):
            attempt()
    assert slept == pauses


@pytest.mark.parametrize("run", ["", "../up", "a/b", ".hidden", "a b"])
def test_a_run_cannot_leave_the_storage(run):
    with pytest.raises(UsageError, match="--run"):
        run_folder("out", run)


def test_an_unknown_scheme_is_named():
    with pytest.raises(UserError, match="nosuch://x"):
        Folder.at("nosuch://x").exists("a")
