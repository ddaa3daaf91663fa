"""The bundle of CORE's questions: read with all that can be wrong in it, and fetched over a real server."""

import io
import json
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from nanochat_ray.data.transfer import Patience
from nanochat_ray.errors import UsageError, UserError
from nanochat_ray.eval.core_bundle import URL_VARIABLE, bundle_of, bundle_source, fetch_bundle, open_bundle
from nanochat_ray.storage import Folder
from tests.shard_server import Answer, Hub
from tests.small_bundle import FILES, ITEMS, bundle_files, write_bundle, zipped

ARCHIVE = "eval_bundle.zip"
HASTY = Patience(failures=2, first_wait_s=0.001, longest_wait_s=0.002, stall_s=0.3)


@pytest.fixture
def hub() -> Iterator[Hub]:
    hub = Hub()
    hub.files = {ARCHIVE: zipped(bundle_files())}
    yield hub
    hub.close()


def fetch(hub: Hub, place: Path) -> Folder:
    return fetch_bundle(Folder.at(place), f"{hub.url}/{ARCHIVE}", HASTY)


def files_in(folder: Path) -> dict[str, str]:
    return {str(file.relative_to(folder)): file.read_text() for file in folder.rglob("*") if file.is_file()}


def test_a_bundle_has_its_tasks_in_order_with_all_that_asking_needs(tmp_path):
    bundle = open_bundle(Folder.at(write_bundle(tmp_path)))
    assert [(task.name, task.kind, task.shots, task.delimiter, task.baseline) for task in bundle.tasks] == [
        ("colours", "multiple_choice", 2, "\nAnswer: ", 0.25),
        ("pronouns", "schema", 0, " ", 0.5),
        ("endings", "language_modeling", 1, " ", 0.0),
    ]
    assert {len(task.items) for task in bundle.tasks} == {ITEMS}
    expected = {"colours": 0.2, "pronouns": 0.2, "endings": 0.05}
    assert bundle.references == {"GPT-2 124M": {"mean": 0.15, "tasks": expected}}


def test_blank_lines_are_no_questions(tmp_path):
    file = write_bundle(tmp_path) / "eval_data" / FILES["endings"]
    file.write_text(file.read_text().replace("\n", "\r\n") + "\n  \n")
    assert len(open_bundle(Folder.at(tmp_path)).tasks[2].items) == ITEMS


def change_line(task: str, line: int, change: Callable[[dict], object]) -> Callable[[Path], None]:
    """Something to be done to a bundle: a question is changed."""

    def act(folder: Path) -> None:
        file = folder / "eval_data" / FILES[task]
        lines = file.read_text().splitlines()
        item = json.loads(lines[line - 1])
        change(item)
        lines[line - 1] = json.dumps(item)
        file.write_text("\n".join(lines))

    return act


def change_text(name: str, old: str, new: str) -> Callable[[Path], None]:
    def act(folder: Path) -> None:
        text = (folder / name).read_text()
        assert old in text
        (folder / name).write_text(text.replace(old, new, 1))

    return act


def write(name: str, content: bytes) -> Callable[[Path], object]:
    return lambda folder: (folder / name).write_bytes(content)


COLOURS = f"eval_data/{FILES['colours']}"


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda folder: (folder / COLOURS).unlink(), r"colours\.jsonl, which core\.yaml names, is not there; fetch"),
        (lambda folder: (folder / "core.yaml").unlink(), r"is no bundle .*has no core\.yaml and eval_meta_data\.csv"),
        (change_text(COLOURS, '"choices"', '"choices'), r"colours\.jsonl, line 1 is not JSON"),
        (write(COLOURS, b'{"query": "\xff"}'), r"colours\.jsonl, line 1 is not JSON"),
        (write(COLOURS, b""), r"colours\.jsonl has 0 questions, too few for colours to show 2 others"),
        (change_line("colours", 3, lambda item: item.pop("query")), r"colours\.jsonl, item 3 has no 'query'"),
        (change_line("colours", 5, lambda item: item.update(gold=4)), r"colours\.jsonl, item 5: gold 4 is not"),
        (change_line("pronouns", 2, lambda item: item.update(gold=-1)), r"pronouns\.jsonl, item 2: gold -1 is not"),
        (change_line("pronouns", 2, lambda item: item.update(gold="1")), r"item 2 has no 'gold' of type int"),
        (change_line("colours", 4, lambda item: item.update(choices=["a"], gold=0)), "item 4"),
        (change_text("core.yaml", ": schema", ": essay"), r"type 'essay' are not known; these are: multiple_choice"),
        (change_text("core.yaml", "label: endings", "label: rhymes"), r"csv has no random baseline .*'rhymes'"),
        (change_text("core.yaml", "label: endings", "label: colours"), r"core\.yaml .*must stand there once"),
        (change_text("core.yaml", "words/pronouns", "../pronouns"), r"core\.yaml .*'\.\./pronouns\.jsonl' leaves"),
        (
            change_text("core.yaml", "num_fewshot: [2]", "num_fewshot: []"),
            r"core\.yaml .*num_fewshot of task 'colours'",
        ),
        (change_text("core.yaml", "dataset_uri: world/", "no: "), r"core\.yaml is not the index.*'dataset_uri'"),
        (change_text("core.yaml", '"\\nAnswer: "', "4"), r"core\.yaml .*continuation_delimiter of task 'colours'"),
        (write("core.yaml", b"icl_tasks: [{label: "), r"core\.yaml is not the index of a bundle \(while parsing"),
        (write("core.yaml", b"\x00\xff"), r"core\.yaml is not the index of a bundle"),
        (write("core.yaml", b"icl_tasks: []"), r"core\.yaml is not the index .*at least one"),
        (write("core.yaml", b"- 1"), r"core\.yaml is not the index"),
        (change_text("eval_meta_data.csv", "colours,a,25", "colours,a,"), r"eval_meta_data\.csv has no task names"),
        (change_text("eval_meta_data.csv", "colours,a,25", "colours,a,100"), r"baseline in \[0, 100\) for .*'colours'"),
        (change_text("eval_meta_data.csv", "Random baseline", "Chance"), r"eval_meta_data\.csv has no task names"),
    ],
)
def test_whatever_is_wrong_in_a_bundle_is_said_with_its_place(tmp_path, damage, said):
    damage(write_bundle(tmp_path))
    with pytest.raises(UserError, match=said) as caught:
        open_bundle(Folder.at(tmp_path))
    assert str(tmp_path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_file_is_no_bundle(tmp_path):
    (tmp_path / ARCHIVE).write_bytes(b"")
    with pytest.raises(UserError, match="is no bundle of CORE's questions"):
        open_bundle(Folder.at(tmp_path / ARCHIVE))


@pytest.mark.parametrize(
    "content", ["Task,Accuracy,Centered\ncolours,0.4,0.2\n", "a,b,c\ncolours,0.4,much\n", "\xff\n"]
)
def test_references_that_cannot_be_read_are_left_out_with_a_warning(tmp_path, capsys, content):
    (write_bundle(tmp_path) / "openai-community-gpt2.csv").write_text(content, encoding="latin-1")
    assert open_bundle(Folder.at(tmp_path)).references == {}
    assert "openai-community-gpt2.csv has no centred accuracies" in capsys.readouterr().err


def test_too_few_questions_for_the_examples_shown_are_refused_with_the_fewest_that_will_do(tmp_path):
    bundle = open_bundle(Folder.at(write_bundle(tmp_path)))
    with pytest.raises(UsageError, match=r"2 examples of colours are too few.*give --max-per-task 3 or more"):
        bundle.asked(2)
    assert [len(task.items) for task in bundle.asked(3)] == [3, 3, 3]
    assert [len(task.items) for task in bundle.asked(None)] == [ITEMS] * 3


def test_a_model_of_the_demo_corpus_is_asked_only_when_that_is_wanted():
    assert bundle_source(None, "demo") is None
    assert bundle_source(None, "fineweb-edu") == "public"
    assert bundle_source("public", "demo") == "public"
    assert bundle_source("none", "fineweb-edu") is None
    assert bundle_source("s3://a/b", "demo") == "s3://a/b"


def test_the_public_bundle_is_fetched_once_and_is_the_archive(hub, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv(URL_VARIABLE, f"{hub.url}/{ARCHIVE}")
    bundle = bundle_of("public", str(tmp_path))
    assert [task.name for task in bundle.tasks] == list(FILES)
    assert files_in(tmp_path / "data" / "eval_bundle") == bundle_files()
    assert f"fetching CORE's questions from {hub.url}" in capsys.readouterr().out

    assert bundle_of("public", str(tmp_path)) == bundle
    assert len(hub.requests) == 1
    assert capsys.readouterr().out == ""


def test_the_index_is_written_last_so_that_what_is_cut_off_is_fetched_again(hub, tmp_path, monkeypatch):
    whole, written = Folder.write, []

    def write(self: Folder, name: str, data: bytes) -> None:
        if self.uri.startswith(str(tmp_path)) and not name.startswith("."):
            if len(written) == 4:
                raise OSError(28, "No space left on device")
            written.append(name)
        whole(self, name, data)

    with monkeypatch.context() as patch:
        patch.setattr(Folder, "write", write)
        with pytest.raises(UserError, match=r"cannot be written to .*No space left.*free space"):
            fetch(hub, tmp_path)
    assert "core.yaml" not in written
    with pytest.raises(UserError, match="is no bundle"):
        open_bundle(Folder.at(tmp_path))
    assert open_bundle(fetch(hub, tmp_path))
    assert len(hub.requests) == 2


def test_a_damaged_bundle_in_the_storage_is_said_with_what_to_delete(hub, tmp_path, monkeypatch):
    monkeypatch.setenv(URL_VARIABLE, f"{hub.url}/{ARCHIVE}")
    bundle_of("public", str(tmp_path))
    place = tmp_path / "data" / "eval_bundle"
    (place / COLOURS).write_text("{")
    with pytest.raises(UserError, match=rf"line 1 is not JSON.*delete {place} and run the same command again"):
        bundle_of("public", str(tmp_path))


def archive_of(files: dict[str, str]) -> bytes:
    return zipped(files, top="")


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"<html>sign in</html>", "is no whole zip file"),
        (zipped(bundle_files())[:-30], "is no whole zip file"),
        (archive_of({"readme": "?"}), r"is no bundle of CORE's questions: it has no core\.yaml"),
        (archive_of({"score.yaml": "?"}), r"it has no core\.yaml"),
        (archive_of({"core.yaml": "?"}), r"is no bundle of CORE's questions: it is no bundle .*eval_meta_data\.csv"),
        (
            zipped(bundle_files() | {COLOURS: "{"}),
            r"is no bundle of CORE's questions: eval_data/world/colours\.jsonl, line",
        ),
    ],
)
def test_an_archive_that_is_no_bundle_leaves_nothing_behind(hub, tmp_path, content, said):
    hub.files[ARCHIVE] = content
    place = tmp_path / "eval_bundle"
    with pytest.raises(UserError, match=said) as caught:
        fetch(hub, place)
    assert hub.url in str(caught.value)
    assert files_in(place) == {}


def test_an_archive_with_a_damaged_member_is_named_and_asked_for_again(hub, tmp_path):
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w", zipfile.ZIP_STORED) as archive:
        for name, text in bundle_files().items():
            archive.writestr(name, text)
    damaged = content.getvalue().replace(b"The fox is red", b"The fox is bed", 1)
    hub.script[ARCHIVE] = [Answer(content=damaged)]
    hub.files[ARCHIVE] = content.getvalue()
    assert files_in(Path(str(fetch(hub, tmp_path)))) == bundle_files()
    hub.files[ARCHIVE] = damaged
    with pytest.raises(UserError, match=r"what arrived is damaged: eval_data/world/colours\.jsonl"):
        fetch(hub, tmp_path / "again")


def test_names_that_lead_out_of_the_folder_are_not_written(hub, tmp_path):
    outside = {"../evil.txt": "!", "eval_bundle/../../evil.txt": "!", "/evil.txt": "!", "beside/evil.txt": "!"}
    inside = {f"eval_bundle/{name}": text for name, text in bundle_files().items()}
    hub.files[ARCHIVE] = archive_of(outside | inside)
    fetch(hub, tmp_path / "deep" / "eval_bundle")
    assert files_in(tmp_path) == {f"deep/eval_bundle/{name}": text for name, text in bundle_files().items()}
    assert not Path("/evil.txt").exists()


@pytest.mark.parametrize(
    ("answer", "said", "requests"),
    [
        (Answer(status=404), rf"the server answers 404 .*{URL_VARIABLE}.*--bundle none", 1),
        (Answer(status=503), "the server answers 503", 3),
        (Answer(send=100, ranges=False), "could not be fetched", 3),
    ],
)
def test_a_server_that_fails_is_one_clear_line_and_nothing_is_left(hub, tmp_path, answer, said, requests):
    hub.always = answer
    with pytest.raises(UserError, match=said) as caught:
        fetch(hub, tmp_path)
    assert "\n" not in str(caught.value)
    assert len(hub.requests) == requests
    assert files_in(tmp_path) == {}


def test_a_connection_that_breaks_is_taken_up_where_it_broke(hub, tmp_path):
    hub.script[ARCHIVE] = [Answer(send=100)]
    assert files_in(Path(str(fetch(hub, tmp_path)))) == bundle_files()
    assert hub.ranges_asked(ARCHIVE) == [None, "bytes=100-"]


def test_a_server_that_is_not_there_is_one_clear_line(tmp_path):
    with pytest.raises(UserError, match=r"127\.0\.0\.1:1/x could not be fetched.*Without network: give a folder"):
        fetch_bundle(Folder.at(tmp_path), "http://127.0.0.1:1/x", HASTY)


@pytest.mark.slow
def test_a_bundle_is_fetched_into_an_object_store_and_read_there(hub, s3_store):
    folder = Folder.at(s3_store.new_bucket()) / "data" / "eval_bundle"
    fetched = open_bundle(fetch_bundle(folder, f"{hub.url}/{ARCHIVE}", HASTY))
    assert [task.name for task in fetched.tasks] == list(FILES)
    fetch_bundle(folder, f"{hub.url}/{ARCHIVE}", HASTY)
    assert len(hub.requests) == 1


@pytest.mark.slow  # 40 MB of JSON
def test_the_real_bundle_has_22_tasks_and_says_which_of_them_need_more_questions(shared_data):
    bundle = open_bundle(Folder.at(shared_data / "eval_bundle"))
    assert len(bundle.tasks) == 22
    assert sum(len(task.items) for task in bundle.tasks) == 81_467
    assert {name: reference["mean"] for name, reference in bundle.references.items()} == {
        "GPT-2 124M": 0.113891,
        "GPT-2 355M": 0.184903,
        "GPT-2 774M": 0.214641,
        "GPT-2 1.5B": 0.256525,
    }
    names = {task.name for task in bundle.tasks}
    assert all(set(reference["tasks"]) == names for reference in bundle.references.values())
    with pytest.raises(UsageError, match=r"10 examples of jeopardy are too few.*give --max-per-task 11 or more"):
        bundle.asked(10)
    assert {len(task.items) for task in bundle.asked(11)} == {11}
