"""What became of each question: kept as it comes, found again, never of another exam."""

import dataclasses
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nanochat_ray.errors import UserError
from nanochat_ray.eval import results as results_module
from nanochat_ray.eval.core import CoreTask
from nanochat_ray.eval.question import Verdict
from nanochat_ray.eval.results import Results, aligned, by_task, read_results
from nanochat_ray.storage import Folder


def verdict(task: str, index: int, correct: bool = True, asked: str = "") -> Verdict:
    return Verdict(task, index, asked or f"hash of {task} {index}", "1", (0.5, 0.25), correct)


SOME = [verdict("b", 1), verdict("a", 7, correct=False), verdict("b", 0)]
REPLY = Verdict("c", 0, "0123", "7", (), True, text="It is 7.\n日", tool_calls=2)


def names(folder: Path) -> list[str]:
    return sorted(file.name for file in folder.iterdir())


def parts(folder: Path) -> list[Path]:
    return sorted(folder.glob("part_*.parquet"), key=lambda file: file.stat().st_mtime_ns)


def test_two_at_once_keep_both_their_parts(tmp_path):
    first, second = Results(Folder.at(tmp_path)), Results(Folder.at(tmp_path))
    for results, verdicts in ((first, SOME[:1]), (second, SOME[1:])):
        results.add(verdicts)
        results.flush()
    assert len(Results(Folder.at(tmp_path)).done) == 3
    first.finish()
    second.add([REPLY])
    assert len(second.finish()) == 3  # what it knows, whoever else has been there
    assert names(tmp_path) == ["results.parquet"]


def test_storage_that_fails_is_asked_again_and_nothing_is_called_damaged(tmp_path, monkeypatch):
    Results(Folder.at(tmp_path)).finish()
    results = Results(Folder.at(tmp_path))
    results.add(SOME)
    failures = iter([OSError("connection reset")] * 2)
    write, read = Folder.write, Folder.read
    monkeypatch.setattr("nanochat_ray.storage.FIRST_PAUSE_S", 0.0)

    def sometimes(act):
        def acting(*args):
            if (failure := next(failures, None)) is not None:
                raise failure
            return act(*args)

        return acting

    with monkeypatch.context() as patch:
        patch.setattr(Folder, "write", sometimes(write))
        results.flush()
    failures = iter([OSError("connection reset")] * 2)
    with monkeypatch.context() as patch:
        patch.setattr(Folder, "read", sometimes(read))
        assert len(read_results(Folder.at(tmp_path))) == 3


def test_what_was_written_is_there_when_the_driver_was_killed(tmp_path):
    killed = Results(Folder.at(tmp_path))
    killed.add(SOME[:2])
    killed.flush()
    killed.add([SOME[2]])  # not written
    again = Results(Folder.at(tmp_path))
    assert again.done == {("b", 1), ("a", 7)}
    again.add([SOME[2], REPLY])
    again.flush()
    assert len(parts(tmp_path)) == 2
    assert Results(Folder.at(tmp_path)).done == {("b", 1), ("a", 7), ("b", 0), ("c", 0)}


def test_it_is_written_every_few_seconds_as_it_comes(tmp_path, monkeypatch):
    results = Results(Folder.at(tmp_path))
    results.add(SOME[:1])
    assert names(tmp_path) == []
    monkeypatch.setattr(results_module, "WRITE_EVERY_S", 0.0)
    results.add(SOME[1:])
    assert len(read_results(Folder.at(tmp_path))) == 3


def test_in_the_end_there_is_one_file_in_order(tmp_path):
    results = Results(Folder.at(tmp_path))
    for each in [*SOME, REPLY]:
        results.add([each])
        results.flush()
    finished = results.finish()
    assert finished == [SOME[1], SOME[2], SOME[0], REPLY]
    assert names(tmp_path) == ["results.parquet"]
    assert read_results(Folder.at(tmp_path)) == finished
    written = (tmp_path / "results.parquet").stat().st_mtime_ns
    assert Results(Folder.at(tmp_path)).finish() == finished
    assert (tmp_path / "results.parquet").stat().st_mtime_ns == written


def test_parts_that_outlived_the_end_are_no_second_answers(tmp_path):
    results = Results(Folder.at(tmp_path))
    results.add(SOME)
    results.flush()
    (part,) = parts(tmp_path)
    content = part.read_bytes()
    finished = results.finish()
    part.write_bytes(content)  # as if the driver had died before it deleted them
    assert Results(Folder.at(tmp_path)).finish() == finished
    assert names(tmp_path) == ["results.parquet"]


def test_columns_are_what_a_reader_needs(tmp_path):
    results = Results(Folder.at(tmp_path))
    results.add([SOME[1], REPLY])
    results.finish()
    rows = pq.read_table(tmp_path / "results.parquet").to_pylist()
    assert rows[0] == dict(
        task="a", index=7, prompt_hash="hash of a 7", prediction="1", scores=[0.5, 0.25], correct=False, text="",
        tool_calls=0, detail="", walls=[], cut=False,
    )  # fmt: skip
    assert (rows[1]["text"], rows[1]["tool_calls"], rows[1]["scores"]) == ("It is 7.\n日", 2, [])


@pytest.mark.parametrize("name", ["part", "results"])
@pytest.mark.parametrize("damage", ["cut off", "no parquet", "other columns", "a hole"])
def test_a_damaged_file_is_named_and_once_deleted_its_questions_are_open_again(tmp_path, name, damage):
    results = Results(Folder.at(tmp_path))
    for each in SOME[:2]:
        results.add([each])
        results.flush()
    if name == "results":
        results.finish()
    file = tmp_path / "results.parquet" if name == "results" else parts(tmp_path)[0]
    table = pq.read_table(file)
    if damage == "cut off":
        file.write_bytes(file.read_bytes()[:-20])
    elif damage == "no parquet":
        file.write_bytes(b"PAR1")
    elif damage == "other columns":
        pq.write_table(table.drop_columns(["scores"]), file)
    else:
        empty = pa.nulls(len(table), pa.list_(pa.float32()))
        pq.write_table(table.set_column(table.column_names.index("scores"), "scores", empty), file)
    with pytest.raises(
        UserError, match=rf"{file.name} is damaged .*delete it, and its questions are asked again"
    ) as caught:
        Results(Folder.at(tmp_path))
    assert "\n" not in str(caught.value)

    file.unlink()
    again = Results(Folder.at(tmp_path))
    assert ("b", 1) not in again.done
    kept = again.done
    again.add([verdict("z", 0)])
    again.flush()  # under a name that is free
    assert Results(Folder.at(tmp_path)).done == {*kept, ("z", 0)}


def test_a_full_disk_is_one_clear_line(tmp_path, monkeypatch):
    def full(self: Folder, name: str, data: bytes) -> None:
        raise OSError(28, "No space left on device")

    results = Results(Folder.at(tmp_path))
    results.add(SOME)
    with monkeypatch.context() as patch:
        patch.setattr(Folder, "write", full)
        with pytest.raises(UserError, match=r"no room is left on the disk of .*run the same command"):
            results.flush()
    results.flush()  # nothing was forgotten
    assert len(read_results(Folder.at(tmp_path))) == 3


def task(name: str, count: int) -> CoreTask:
    return CoreTask(name, "multiple_choice", 3, " ", 0.25, ({},) * count)


def test_answers_are_counted_by_task_in_the_order_of_tasks():
    found = by_task([task("b", 2), task("a", 1)], [*SOME, verdict("not asked for", 0)])
    assert list(found) == ["b", "a"]
    assert (found["b"].type, found["b"].shots, found["b"].baseline) == ("multiple choice", 3, 0.25)
    assert [list(found[name].correct) for name in found] == [[True, True], [False]]


@given(st.permutations(SOME), st.permutations(SOME))
def test_two_models_answers_stand_side_by_side_whatever_their_order(ours, theirs):
    theirs = [dataclasses.replace(each, correct=not each.correct) for each in theirs]
    first, second = aligned(ours, theirs)
    assert first == [SOME[1], SOME[2], SOME[0]]
    assert [(each.task, each.index) for each in second] == [("a", 7), ("b", 0), ("b", 1)]
    assert all(a.correct is not b.correct for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("other", [SOME[:2], [*SOME[:2], verdict("b", 0, asked="otherwise")], [*SOME, verdict("b", 2)]])
def test_models_that_were_not_asked_the_same_are_not_compared(other):
    with pytest.raises(UserError, match=r"not asked the same: question [02] of b differs or is missing"):
        aligned(SOME, other)
    with pytest.raises(UserError, match="not asked the same"):
        aligned(other, SOME)
