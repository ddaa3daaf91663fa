"""The embedded documentation corpus and the functions questions are asked about."""

from pathlib import Path

import pytest

from nanochat_ray.data import demo, docstrings
from nanochat_ray.data.corpus import open_corpus, read_unit
from nanochat_ray.data.functions import DocumentedFunction, documented_functions, first_sentence
from nanochat_ray.storage import Folder

MODULE = '''
"""Fold and unfold long lines of text, which are then easier to read on a narrow screen."""

import os

class Folder(Base, other.Mixin):
    """Folds text."""

    def fold(self, text, *, width=70):
        """Fold `text`
            at `width`."""
        def inner():
            """Invisible."""

    def undocumented(self): ...

if os.name == "nt":
    async def fetch(url: str = "x") -> bytes:
        """Get it."""
else:
    def other():
        r"""A raw \\d docstring."""
'''


def test_a_module_becomes_one_document_with_a_heading_for_every_docstring_in_source_order(tmp_path: Path) -> None:
    (tmp_path / "folding.py").write_text(MODULE)
    document = docstrings.module_document(docstrings.Source("text.folding", str(tmp_path / "folding.py")))
    assert document == (
        "module text.folding\n\n"
        "Fold and unfold long lines of text, which are then easier to read on a narrow screen.\n\n"
        "class Folder(Base, other.Mixin)\n\nFolds text.\n\n"
        "Folder.fold(self, text, *, width=70)\n\nFold `text`\nat `width`.\n\n"
        "fetch(url: str='x')\n\nGet it.\n\n"
        "other()\n\nA raw \\d docstring.\n"
    )


@pytest.mark.parametrize("content", ["x = 1\n", '"""Too short."""\n', "def broken(:\n", "# \0\n"])
def test_a_module_without_documentation_or_of_another_python_makes_no_document(tmp_path: Path, content: str) -> None:
    (tmp_path / "m.py").write_text(content)
    assert docstrings.module_document(docstrings.Source("m", str(tmp_path / "m.py"))) is None


def test_test_suites_and_vendored_projects_are_not_read() -> None:
    found = docstrings.sources()
    modules = {source.module for source in found}
    assert {"textwrap", "json", "json.decoder", "torch.nn.modules.linear", "ray.data.dataset", "numpy"} <= modules
    assert len(modules) > 3000
    for source in found:
        parts = source.module.split(".")
        assert not {"test", "tests", "thirdparty_files", "idle_test"} & set(parts)
        assert not parts[-1].startswith("test_")


def test_the_reference_topics_are_read_without_importing_them() -> None:
    topics = docstrings.pydoc_topics()
    assert len(topics) > 50
    assert any(topic.startswith('The "with" statement') for topic in topics)


@pytest.fixture
def small_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """40 modules instead of 5,000, and few topics."""
    library = tmp_path / "library"
    library.mkdir()
    sources = []
    for number in range(40):
        path = library / f"m{number:02d}.py"
        path.write_text(f'"""{f"Module {number} explains itself at some length. " * 4}"""\n')
        sources.append(docstrings.Source(path.stem, str(path)))
    sources.append(docstrings.Source("m00", sources[0].path))  # the same text twice
    monkeypatch.setattr(docstrings, "sources", lambda: sources)
    monkeypatch.setattr(docstrings, "pydoc_topics", lambda: ["a topic\n"])


def test_the_demo_corpus_is_made_once_the_same_everywhere_and_opened_like_any_other(
    small_library: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = open_corpus("demo", Folder.at(tmp_path / "a"))
    documents = [document for unit in first.train + first.validation for document in read_unit(unit)]
    assert len(documents) == 41
    assert documents != sorted(documents)
    assert len({unit.shard for unit in first.train}) == 7
    assert first.validation[0].shard.endswith("shard_00007.parquet")
    assert open_corpus("demo", Folder.at(tmp_path / "b")).fingerprint == first.fingerprint

    monkeypatch.setattr(demo, "_shuffled_documents", lambda: pytest.fail("it was made again"))
    assert open_corpus("demo", Folder.at(tmp_path / "a"), shards=3).validation == first.validation


def test_a_demo_corpus_that_was_not_finished_is_made_again(small_library: None, tmp_path: Path) -> None:
    data = Folder.at(tmp_path / "data")
    folder, names = demo.build_demo_corpus(data)
    folder.delete("_complete.json")
    folder.write(names[0], b"half")
    again, _ = demo.build_demo_corpus(data)
    assert again == folder
    assert len(open_corpus("demo", data).train) == 7


@pytest.fixture(scope="module")
def functions() -> list[DocumentedFunction]:
    return documented_functions()


def test_every_documented_function_has_a_clean_sentence_and_a_public_name(functions: list[DocumentedFunction]) -> None:
    assert len(functions) > 800
    names = [(function.module, function.qualname) for function in functions]
    assert names == sorted(set(names))
    for function in functions:
        assert 20 <= len(function.first_line) <= 120
        assert function.first_line.endswith(".")
        assert function.first_line.isascii()
        assert function.signature.startswith(function.qualname + "(")
        assert not any(part.startswith("_") for part in function.qualname.split("."))


def test_well_known_functions_are_described_under_the_name_people_use(functions: list[DocumentedFunction]) -> None:
    known = {(function.module, function.qualname): function for function in functions}
    dedent = known["textwrap", "dedent"]
    assert (dedent.signature, dedent.first_line) == (
        "dedent(text)",
        "Remove any common leading whitespace from every line in `text`.",
    )
    assert known["random", "randint"].signature == "randint(a, b)"  # a bound method of random._inst
    assert known["os.path", "exists"].first_line == "Test whether a path exists."  # lives in genericpath.py
    assert {("json", "dumps"), ("shutil", "rmtree"), ("statistics", "median"), ("pathlib", "Path.exists")} <= set(known)


@pytest.mark.parametrize(
    ("docstring", "sentence"),
    [
        ("Return the sum of all items.\n\nMore text.", "Return the sum of all items."),
        ("Return the sum\nof all items.  Slowly.", "Return the sum of all items."),
        ("Normalize path, eliminating slashes, etc.", "Normalize path, eliminating slashes, etc."),
        ("f(x) -> y\n\nReturn y.", None),
        ("Too short.", None),
        ("no capital letter at the start.", None),
        ("Return the sum of all items", None),
        ("Return the sum of " + "very " * 30 + "many items.", None),
        ("", None),
    ],
)
def test_only_clean_first_sentences_are_taken(docstring: str, sentence: str | None) -> None:
    assert first_sentence(docstring) == sentence


@pytest.mark.slow
def test_the_whole_demo_corpus_is_as_large_as_promised(tmp_path: Path) -> None:
    folder, _ = demo.build_demo_corpus(Folder.at(tmp_path))
    facts = folder.read_json("_complete.json")
    assert 2_500 < facts["documents"] < 6_000
    assert 12_000_000 < facts["characters"] < 25_000_000
    corpus = open_corpus("demo", Folder.at(tmp_path))
    assert all(unit.documents <= demo.ROW_GROUP_DOCUMENTS for unit in corpus.train)
    assert sum(len(document) for unit in corpus.train for document in read_unit(unit)) > 10_000_000
