"""Corpora and shards: what is read, in which order, under which fingerprint, and what each kind of bad shard says."""

import json
import logging
import shutil
from pathlib import Path

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pyarrow import parquet as pq

from jobs import data as data_job
from nanochat_ray import cli
from nanochat_ray.data.corpus import Corpus, open_corpus, read_unit
from nanochat_ray.data.shards import MAX_DOCUMENT_CHARACTERS, Unit, cut_document, inspect_shard
from nanochat_ray.errors import UsageError, UserError
from nanochat_ray.storage import Folder


def write_shard(path: Path, texts: list[str | None], row_group_size: int = 2, kind: pa.DataType | None = None) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    table = pa.table({"id": range(len(texts)), "text": pa.array(texts, kind or pa.string())})
    pq.write_table(table, path, row_group_size=row_group_size)
    return path


def make_folder(folder: Path, shards: int = 3, documents: int = 5) -> Path:
    for shard in range(shards):
        write_shard(folder / f"part-{shard}.parquet", [f"shard {shard} document {i}" for i in range(documents)])
    return folder


def open_local(folder: Path, shards: int | None = None) -> Corpus:
    return open_corpus(str(folder), Folder.at(folder.parent / "data"), shards)


def test_units_are_the_row_groups_in_order_and_the_last_shard_validates(tmp_path: Path) -> None:
    corpus = open_local(make_folder(tmp_path / "texts"))
    assert corpus.name == "texts"
    assert [(Path(unit.shard).name, unit.row_group, unit.documents) for unit in corpus.train] == [
        (f"part-{shard}.parquet", group, rows) for shard in (0, 1) for group, rows in enumerate((2, 2, 1))
    ]
    assert {Path(unit.shard).name for unit in corpus.validation} == {"part-2.parquet"}
    assert read_unit(corpus.train[4]) == ["shard 1 document 2", "shard 1 document 3"]
    assert all(Path(unit.shard).is_absolute() and unit.bytes > 0 for unit in corpus.train)


def test_shards_n_takes_the_first_n_and_keeps_the_same_validation_shard(tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "texts", shards=4)
    few, every = open_local(folder, shards=2), open_local(folder)
    assert few.train == every.train[: len(few.train)]
    assert len({unit.shard for unit in few.train}) == 2
    assert few.validation == every.validation
    assert few.fingerprint != every.fingerprint


@pytest.mark.parametrize("shards", [0, -1, 3])
def test_a_number_of_shards_the_corpus_does_not_have_is_a_usage_error(tmp_path: Path, shards: int) -> None:
    with pytest.raises(UsageError, match=f"--shards {shards}"):
        open_local(make_folder(tmp_path / "texts"), shards)


def test_the_fingerprint_ignores_the_place_and_notices_content_order_and_name(tmp_path: Path) -> None:
    here = make_folder(tmp_path / "here")
    fingerprint = open_local(here).fingerprint
    copy = shutil.copytree(here, tmp_path / "elsewhere" / "copy")
    assert open_local(copy).fingerprint == fingerprint
    assert open_corpus(copy.as_uri(), Folder.at(tmp_path)).fingerprint == fingerprint

    write_shard(copy / "part-1.parquet", [f"Shard 1 dokument {i}" for i in range(5)], row_group_size=3)
    rewritten = open_local(copy).fingerprint
    (here / "part-1.parquet").rename(here / "part-1b.parquet")
    assert len({fingerprint, rewritten, open_local(here).fingerprint}) == 3


def test_a_corpus_survives_json(tmp_path: Path) -> None:
    corpus = open_local(make_folder(tmp_path / "texts"))
    assert Corpus.from_dict(json.loads(json.dumps(corpus.to_dict()))) == corpus


def test_a_corpus_behind_an_fsspec_uri_is_read_in_place(tmp_path: Path) -> None:
    folder = Folder.at("memory://corpora/texts")
    for path in sorted(make_folder(tmp_path / "texts").iterdir()):
        folder.write(path.name, path.read_bytes())
    corpus = open_corpus(str(folder), Folder.at(tmp_path))
    assert corpus.fingerprint == open_local(tmp_path / "texts").fingerprint
    assert read_unit(corpus.validation[0]) == ["shard 2 document 0", "shard 2 document 1"]


def test_other_files_hidden_files_and_subfolders_are_not_shards(tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "texts", shards=2)
    (folder / "README.md").write_text("about")
    (folder / "z.parquet.0123.partial").write_bytes(b"")
    (folder / ".z.parquet").write_bytes(b"")
    (folder / "sub").mkdir()
    assert open_local(folder).validation[0].shard.endswith("part-1.parquet")


def test_a_missing_corpus_is_told_with_the_names_there_are(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no such corpus: .*nope .*demo, fineweb-edu, climbmix"):
        open_local(tmp_path / "nope")


@pytest.mark.parametrize("shards", [0, 1])
def test_a_folder_without_a_shard_to_train_on_is_refused(tmp_path: Path, shards: int) -> None:
    folder = tmp_path / "texts"
    folder.mkdir()
    with pytest.raises(UserError, match=f"has {shards} .*validation"):
        open_local(make_folder(folder, shards=shards))


def test_a_file_instead_of_a_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="give a folder of parquet shards"):
        open_local(write_shard(tmp_path / "one.parquet", ["a"]))


def test_a_scheme_nobody_knows_is_one_clear_line(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="nosuch://bucket/x cannot be opened"):
        open_corpus("nosuch://bucket/x", Folder.at(tmp_path))


def test_a_truncated_shard_is_found_when_the_corpus_is_opened(tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "texts")
    shard = folder / "part-1.parquet"
    shard.write_bytes(shard.read_bytes()[:-20])
    with pytest.raises(UserError, match=r"part-1\.parquet is not a whole parquet file.*copy it again") as caught:
        open_local(folder)
    assert "\n" not in str(caught.value)


def test_a_zero_byte_shard_is_named(tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "texts")
    (folder / "part-0.parquet").write_bytes(b"")
    with pytest.raises(UserError, match=r"part-0\.parquet is not a whole parquet file"):
        open_local(folder)


def test_a_shard_without_documents_is_an_error_with_a_remedy(tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "texts")
    write_shard(folder / "part-0.parquet", [])
    with pytest.raises(UserError, match=r"part-0\.parquet is an empty shard.*remove it"):
        open_local(folder)


def test_an_empty_row_group_between_others_makes_no_unit(tmp_path: Path) -> None:
    path = tmp_path / "gap.parquet"
    table = pa.table({"text": ["a", "b"]})
    with pq.ParquetWriter(path, table.schema) as writer:
        writer.write_table(table)
        writer.write_batch(pa.record_batch({"text": pa.array([], pa.string())}), row_group_size=1)
        writer.write_table(table)
    units = inspect_shard(str(path)).units
    assert all(unit.documents == 2 for unit in units)
    assert [text for unit in units for text in read_unit(unit)] == ["a", "b", "a", "b"]


def test_a_shard_without_a_text_column_lists_the_columns_it_has(tmp_path: Path) -> None:
    path = tmp_path / "x.parquet"
    pq.write_table(pa.table({"content": ["a"], "url": ["b"]}), path)
    with pytest.raises(UserError, match=r"x\.parquet has no column `text` \(columns: content, url\)"):
        inspect_shard(str(path))


@pytest.mark.parametrize("kind", [pa.binary(), pa.int64(), pa.list_(pa.string())])
def test_a_text_column_of_another_type_is_refused(tmp_path: Path, kind: pa.DataType) -> None:
    path = write_shard(tmp_path / "x.parquet", [None], kind=kind)
    with pytest.raises(UserError, match=r"x\.parquet: column `text` is of type"):
        inspect_shard(str(path))


@pytest.mark.parametrize("kind", [pa.large_string(), pa.dictionary(pa.int32(), pa.string())])
def test_every_kind_of_string_column_is_read(tmp_path: Path, kind: pa.DataType) -> None:
    path = write_shard(tmp_path / "x.parquet", ["one", "two"], kind=kind)
    assert read_unit(inspect_shard(str(path)).units[0]) == ["one", "two"]


def test_the_text_column_is_found_beside_nested_columns(tmp_path: Path) -> None:
    path = tmp_path / "x.parquet"
    pq.write_table(pa.table({"meta": [{"text": 1, "url": "u" * 999}], "text": ["hello"]}), path)
    (unit,) = inspect_shard(str(path)).units
    assert read_unit(unit) == ["hello"]
    assert unit.bytes < 200


def test_null_documents_are_skipped_and_counted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = write_shard(tmp_path / "x.parquet", ["a", None, "b", None], row_group_size=4)
    with caplog.at_level(logging.WARNING):
        assert read_unit(inspect_shard(str(path)).units[0]) == ["a", "b"]
    assert "row group 0: skipped 2 null documents of 4" in caplog.text


def test_bytes_that_are_not_utf8_are_refused_by_file_and_row_group(tmp_path: Path) -> None:
    offsets = pa.py_buffer(b"".join(n.to_bytes(4, "little") for n in (0, 3, 6)))
    texts = pa.StringArray.from_buffers(2, offsets, pa.py_buffer(b"ok \xff\xfe\xfa"))
    path = tmp_path / "x.parquet"
    pq.write_table(pa.table({"text": texts}), path, row_group_size=1)
    first, second = inspect_shard(str(path)).units
    assert read_unit(first) == ["ok "]
    with pytest.raises(UserError, match=r"x\.parquet, row group 1 holds text that is not UTF-8"):
        read_unit(second)


def test_damaged_pages_under_a_good_footer_are_refused_by_file_and_row_group(tmp_path: Path) -> None:
    path = write_shard(tmp_path / "x.parquet", ["some text " * 500], row_group_size=1)
    unit = inspect_shard(str(path)).units[0]
    content = bytearray(path.read_bytes())
    content[8:300] = b"\xff" * 292
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"x\.parquet, row group 0 is corrupt"):
        read_unit(unit)


def test_a_shard_that_vanished_or_shrank_since_the_corpus_was_opened_is_named(tmp_path: Path) -> None:
    path = write_shard(tmp_path / "x.parquet", ["a", "b", "c"])
    with pytest.raises(UserError, match=r"x\.parquet, row group 7 does not exist any more"):
        read_unit(Unit(str(path), 7, 2, 10))
    path.unlink()
    with pytest.raises(UserError, match=r"x\.parquet does not exist"):
        read_unit(Unit(str(path), 0, 2, 10))


def test_a_document_of_50_megabytes_comes_in_pieces_and_loses_nothing(tmp_path: Path) -> None:
    text = "many words, " * (50_000_000 // 12)
    path = write_shard(tmp_path / "x.parquet", ["before", text, "after"], row_group_size=3)
    documents = read_unit(inspect_shard(str(path)).units[0])
    assert documents[0] == "before"
    assert documents[-1] == "after"
    assert "".join(documents[1:-1]) == text
    assert max(map(len, documents)) <= MAX_DOCUMENT_CHARACTERS
    assert all(piece.endswith(" ") for piece in documents[1:-1])


@given(st.text(alphabet="ab \n\té\u3000", max_size=80), st.integers(1, 20))
def test_cut_pieces_join_to_the_document_and_end_at_whitespace_where_there_is_any(text: str, limit: int) -> None:
    pieces = list(cut_document(text, limit))
    assert "".join(pieces) == text
    assert all(0 < len(piece) <= limit for piece in pieces[:-1])
    for piece in pieces[:-1]:
        assert piece[-1].isspace() or not any(character.isspace() for character in piece)


def test_the_job_prints_the_table_and_one_json_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["--corpus", str(make_folder(tmp_path / "texts")), "--storage", str(tmp_path), "--json"]
    assert cli.run(data_job.main, data_job.build_parser(), argv) == 0
    lines = capsys.readouterr().out.splitlines()
    figures = json.loads(lines[-1])
    assert figures["train"] | {"bytes": 0} == {"shards": 2, "units": 6, "documents": 10, "bytes": 0}
    assert figures["validation_shard"].endswith("part-2.parquet")
    assert figures["artifacts"]["corpus"] == str(tmp_path / "texts")
    assert figures["fingerprint"] in lines[0]


def test_the_job_ends_with_code_1_for_no_such_corpus(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["--corpus", str(tmp_path / "nope"), "--storage", str(tmp_path)]
    assert cli.run(data_job.main, data_job.build_parser(), argv) == 1
    assert capsys.readouterr().err.count("\n") == 1


def test_the_real_corpus_has_the_published_figures(shared_data: Path) -> None:
    corpus = open_local(shared_data / "pretrain")
    units = corpus.train + corpus.validation
    assert sum(unit.documents for unit in units) == 19_724
    assert len(corpus.train) == 21
    assert len(corpus.validation) == 3
    documents = [document for unit in units for document in read_unit(unit)]
    assert len(documents) == 19_724
    assert sum(map(len, documents)) == 75_689_267
    assert sum(len(document.encode()) for document in documents) == 76_318_357
