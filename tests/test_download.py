"""Shards over HTTP, against a real server on the loopback that misbehaves in every way named in a test."""

import email.utils
import errno
import hashlib
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nanochat_ray.data import download, transfer
from nanochat_ray.data.corpus import open_corpus, read_unit
from nanochat_ray.data.download import PUBLIC_SETS, PublicSet, fetch_shards
from nanochat_ray.data.transfer import Patience
from nanochat_ray.errors import UserError
from nanochat_ray.storage import Folder
from tests.shard_server import SET, SHARD, Answer, Hub, parquet_bytes

HASTY = Patience(failures=3, first_wait_s=0.005, longest_wait_s=0.02, stall_s=0.3)


@pytest.fixture
def hub() -> Iterator[Hub]:
    hub = Hub()
    yield hub
    hub.close()


def fetch(hub: Hub, folder: Path, *names: str, patience: Patience = HASTY) -> Path:
    fetch_shards(SET, names or ["shard_00000.parquet"], Folder.at(folder), hub_url=hub.url, patience=patience)
    return folder / (names or ["shard_00000.parquet"])[0]


def leftovers(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.name != ".download.lock")


def test_shards_are_fetched_once_and_whole(hub: Hub, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    names = SET.shard_names()
    hub.files = {name: parquet_bytes(seed) for seed, name in enumerate(names)}
    fetch(hub, tmp_path, *names)
    assert {name: (tmp_path / name).read_bytes() for name in names} == hub.files
    assert leftovers(tmp_path) == names
    assert "someone/texts: 4/4 shards" in capsys.readouterr().err

    fetch(hub, tmp_path, *names)
    assert len(hub.requests) == len(names)


def test_the_public_sets_pin_their_last_published_shard_for_validation(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = ["shard_00000.parquet", "shard_00001.parquet", "shard_01822.parquet"]
    hub.files = {name: parquet_bytes(seed) for seed, name in enumerate(names)}
    monkeypatch.setenv("NANOCHAT_RAY_HUB_URL", hub.url + "/")
    corpus = open_corpus("fineweb-edu", Folder.at(tmp_path), shards=2)
    assert [Path(unit.shard).name for unit in corpus.train] == names[:2]
    assert read_unit(corpus.validation[0])[0] == "document of seed 2"
    assert leftovers(tmp_path / "fineweb-edu") == names
    assert open_corpus("fineweb-edu", Folder.at(tmp_path), shards=1).validation == corpus.validation


@pytest.mark.parametrize(
    ("corpus", "url"),
    [
        ("fineweb-edu", "https://h/datasets/karpathy/fineweb-edu-100b-shuffle/resolve/main/shard_01822.parquet"),
        ("climbmix", "https://h/datasets/karpathy/climbmix-400b-shuffle/resolve/main/shard_06542.parquet"),
    ],
)
def test_the_last_shard_of_each_public_set_has_the_published_address(corpus: str, url: str) -> None:
    public_set = PUBLIC_SETS[corpus]
    assert public_set.url("https://h", public_set.shard_names()[-1]) == url


def test_a_dropped_connection_is_resumed_where_it_broke(hub: Hub, tmp_path: Path) -> None:
    hub.script["shard_00000.parquet"] = [Answer(send=30_000), Answer(send=40_000)]
    assert fetch(hub, tmp_path).read_bytes() == SHARD
    assert hub.ranges_asked("shard_00000.parquet") == [None, "bytes=30000-", "bytes=70000-"]


@settings(max_examples=15)
@given(st.lists(st.tuples(st.integers(0, len(SHARD) - 1), st.booleans()), max_size=5), st.booleans())
def test_whatever_breaks_the_file_is_the_published_one(breaks: list[tuple[int, bool]], etags: bool) -> None:
    hub = Hub(etags=etags)
    hub.script["shard_00000.parquet"] = [Answer(send=send, ranges=ranges) for send, ranges in breaks]
    patient = Patience(failures=9, first_wait_s=0.001, longest_wait_s=0.002, stall_s=1)
    try:
        with tempfile.TemporaryDirectory() as folder:
            assert fetch(hub, Path(folder), patience=patient).read_bytes() == SHARD
            assert leftovers(Path(folder)) == ["shard_00000.parquet"]
    finally:
        hub.close()


@pytest.mark.parametrize("status", [429, 500, 502, 503])
def test_a_busy_server_is_asked_again(hub: Hub, tmp_path: Path, status: int) -> None:
    hub.script["shard_00000.parquet"] = [Answer(status=status), Answer(status=status)]
    assert fetch(hub, tmp_path).read_bytes() == SHARD
    assert len(hub.requests) == 3


@pytest.mark.parametrize("status", [429, 503])
def test_retry_after_is_honoured(hub: Hub, tmp_path: Path, capsys: pytest.CaptureFixture[str], status: int) -> None:
    hub.script["shard_00000.parquet"] = [Answer(status=status, headers={"Retry-After": "1"})]
    start = time.monotonic()
    assert fetch(hub, tmp_path).read_bytes() == SHARD
    assert time.monotonic() - start >= 1
    assert re.search(rf"shard_00000\.parquet: the server answers {status} .*again in 1 s", capsys.readouterr().err)


def test_a_retry_after_of_an_hour_ends_the_job_instead_of_hanging_it(hub: Hub, tmp_path: Path) -> None:
    hub.always = Answer(status=429, headers={"Retry-After": "3600"})
    with pytest.raises(UserError, match=r"429.*asks to wait 3600 s"):
        fetch(hub, tmp_path)
    assert len(hub.requests) == 1


def test_retry_after_may_be_a_date() -> None:
    assert transfer._retry_after_s("17") == 17
    assert 50 < transfer._retry_after_s(email.utils.formatdate(time.time() + 60, usegmt=True)) <= 60
    assert transfer._retry_after_s(email.utils.formatdate(time.time() - 60, usegmt=True)) == 0
    assert transfer._retry_after_s("soon") == transfer._retry_after_s("") == 0


def test_waits_double_up_to_the_longest_and_are_spread_at_random() -> None:
    patience = Patience(first_wait_s=1, longest_wait_s=10)
    waits = {failure: [patience.wait_s(failure) for _ in range(200)] for failure in (1, 3, 9)}
    for failure, nominal in ((1, 1), (3, 4), (9, 10)):
        assert nominal / 2 <= min(waits[failure]) < max(waits[failure]) <= nominal


@pytest.mark.parametrize("status", [401, 403, 404, 410])
def test_a_refusal_fails_at_once_and_names_url_and_remedy(hub: Hub, tmp_path: Path, status: int) -> None:
    hub.always = Answer(status=status)
    with pytest.raises(UserError, match=rf"{hub.url}/datasets/someone/texts/.*answers {status}.*NANOCHAT_RAY_HUB_URL"):
        fetch(hub, tmp_path)
    assert len(hub.requests) == 1
    assert leftovers(tmp_path) == []


def test_a_server_that_never_recovers_ends_in_one_line_and_keeps_the_partial_file(hub: Hub, tmp_path: Path) -> None:
    hub.script["shard_00000.parquet"] = [Answer(send=30_000)] + [Answer(status=503)] * 9
    with pytest.raises(UserError, match=r"shard_00000\.parquet could not be fetched: .*503.*continues where") as caught:
        fetch(hub, tmp_path)
    assert "\n" not in str(caught.value)
    assert [re.sub(r"\.[0-9a-f]{12}\.", ".*.", name) for name in leftovers(tmp_path)] == [
        "shard_00000.parquet.*.partial"
    ]
    hub.script.clear()
    assert fetch(hub, tmp_path).read_bytes() == SHARD
    assert hub.ranges_asked("shard_00000.parquet")[-1] == "bytes=30000-"


@pytest.mark.parametrize("announce", [1_000, -1_000, -len(SHARD) + 1])
def test_a_wrong_length_is_noticed_and_asked_for_again(hub: Hub, tmp_path: Path, announce: int) -> None:
    hub.script["shard_00000.parquet"] = [Answer(announce=announce)]
    assert fetch(hub, tmp_path).read_bytes() == SHARD


@pytest.mark.parametrize("announce", [1_000, -1_000])
def test_a_length_that_stays_wrong_leaves_nothing_under_the_final_name(hub: Hub, tmp_path: Path, announce: int) -> None:
    hub.always = Answer(announce=announce)
    with pytest.raises(UserError, match="could not be fetched"):
        fetch(hub, tmp_path)
    assert not any(name.endswith(".parquet") for name in leftovers(tmp_path))
    assert len(hub.requests) < 10


def test_a_file_that_is_no_parquet_is_not_kept(hub: Hub, tmp_path: Path) -> None:
    hub.files["shard_00000.parquet"] = b"<html>sign in to the hotel's network</html>"
    with pytest.raises(UserError, match="what arrived is not a whole parquet file"):
        fetch(hub, tmp_path)
    assert leftovers(tmp_path) == []


def test_a_stalled_connection_is_given_up_and_resumed(hub: Hub, tmp_path: Path) -> None:
    hub.script["shard_00000.parquet"] = [Answer(send=30_000, stall=True)]
    assert fetch(hub, tmp_path).read_bytes() == SHARD
    assert hub.ranges_asked("shard_00000.parquet") == [None, "bytes=30000-"]


def test_a_server_that_ignores_ranges_is_read_from_the_start_and_not_spliced(hub: Hub, tmp_path: Path) -> None:
    hub.script["shard_00000.parquet"] = [Answer(send=30_000), Answer(ranges=False)]
    assert fetch(hub, tmp_path).read_bytes() == SHARD
    assert hub.ranges_asked("shard_00000.parquet") == [None, "bytes=30000-"]


def test_a_server_that_ignores_ranges_and_always_breaks_is_given_up(hub: Hub, tmp_path: Path) -> None:
    hub.always = Answer(send=30_000, ranges=False)
    with pytest.raises(UserError, match="could not be fetched"):
        fetch(hub, tmp_path)
    assert len(hub.requests) == HASTY.failures + 1


def test_a_file_that_changed_between_two_requests_is_never_spliced(hub: Hub, tmp_path: Path) -> None:
    other = parquet_bytes(1)
    assert len(other) == len(SHARD)
    hub.script["shard_00000.parquet"] = [Answer(send=30_000)]
    hub.script["shard_00000.parquet"] += [Answer(content=other)] * 5
    assert fetch(hub, tmp_path).read_bytes() == other
    assert hub.ranges_asked("shard_00000.parquet") == [None, "bytes=30000-", None]


def test_a_file_that_became_shorter_than_what_was_fetched_is_read_from_the_start(hub: Hub, tmp_path: Path) -> None:
    short = parquet_bytes(1, size=10_000)
    hub.script["shard_00000.parquet"] = [Answer(send=30_000)] + [Answer(content=short)] * 5
    assert fetch(hub, tmp_path).read_bytes() == short


def linked_hub() -> Hub:
    hub = Hub(redirect=True)
    hub.linked = {"X-Linked-Etag": f'"{hashlib.sha256(SHARD).hexdigest()}"', "X-Linked-Size": str(len(SHARD))}
    return hub


def test_the_hubs_redirect_is_followed_and_its_checksum_is_checked(tmp_path: Path) -> None:
    hub = linked_hub()
    damaged = bytearray(SHARD)
    damaged[50_000] ^= 1  # in the middle of a page: length and footer are right
    hub.script["shard_00000.parquet"] = [Answer(content=bytes(damaged)), Answer(send=60_000)]
    try:
        assert fetch(hub, tmp_path).read_bytes() == SHARD
    finally:
        hub.close()
    assert hub.ranges_asked("shard_00000.parquet") == [None, None, "bytes=60000-"]


def test_a_checksum_that_stays_wrong_is_said(tmp_path: Path) -> None:
    hub = linked_hub()
    hub.always = Answer(content=parquet_bytes(1))
    try:
        with pytest.raises(UserError, match=r"SHA-256 is .* where the server promises"):
            fetch(hub, tmp_path)
    finally:
        hub.close()
    assert leftovers(tmp_path) == []


def test_a_size_other_than_the_hubs_is_not_even_read(tmp_path: Path) -> None:
    hub = linked_hub()
    hub.linked["X-Linked-Size"] = "12345"
    try:
        with pytest.raises(UserError, match=f"announces {len(SHARD)} bytes of a file of 12345"):
            fetch(hub, tmp_path)
    finally:
        hub.close()


def test_one_lost_shard_stops_the_others(hub: Hub, tmp_path: Path) -> None:
    public_set = PublicSet("someone/texts", 400)
    hub.files = {name: SHARD for name in public_set.shard_names() if name != "shard_00000.parquet"}
    with pytest.raises(UserError, match=r"shard_00000\.parquet cannot be fetched"):
        fetch_shards(public_set, public_set.shard_names(), Folder.at(tmp_path), hub_url=hub.url, patience=HASTY)
    assert len(hub.requests) < 200


def test_a_server_that_is_not_there_is_one_clear_line(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"could not be fetched: ConnectError.*check the network"):
        fetch_shards(SET, ["shard_00000.parquet"], Folder.at(tmp_path), hub_url="http://127.0.0.1:9", patience=HASTY)


@pytest.mark.parametrize("hub_url", ["ftp://example", "example", "http://host:port"])
def test_a_hub_url_that_is_none_fails_at_once(tmp_path: Path, hub_url: str) -> None:
    with pytest.raises(UserError, match=r"cannot be fetched.*NANOCHAT_RAY_HUB_URL"):
        fetch_shards(SET, ["shard_00000.parquet"], Folder.at(tmp_path), hub_url=hub_url)


def test_a_full_disk_is_one_clear_line(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(transfer.os, "fsync", full)
    monkeypatch.setattr(Folder, "require_writable", lambda _: None)
    with pytest.raises(UserError, match=r"shard_00000\.parquet cannot be written .*No space left.*--storage"):
        fetch(hub, tmp_path)


def test_an_object_store_receives_whole_shards_through_a_local_folder(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(download.tempfile, "gettempdir", lambda: str(tmp_path))
    hub.script["shard_00001.parquet"] = [Answer(send=30_000)] + [Answer(status=503)] * 3
    folder = Folder.at("memory://bucket/texts")
    names = ["shard_00000.parquet", "shard_00001.parquet"]
    with pytest.raises(UserError, match="503"):
        fetch_shards(SET, names, folder, hub_url=hub.url, patience=HASTY)
    assert "shard_00001.parquet" not in folder.list()

    fetch_shards(SET, names, folder, hub_url=hub.url, patience=HASTY)
    assert [folder.read(name) for name in names] == [SHARD, SHARD]
    assert "bytes=30000-" in hub.ranges_asked("shard_00001.parquet")
    assert not list(tmp_path.rglob("*.parquet*"))


def test_two_downloads_into_one_folder_take_turns(hub: Hub, tmp_path: Path) -> None:
    failures: list[BaseException] = []

    def run() -> None:
        try:
            fetch(hub, tmp_path, *SET.shard_names())
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=run) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    assert sorted(name for name, _ in hub.requests) == SET.shard_names()


def test_kill_9_in_the_middle_leaves_no_half_file_and_the_next_run_goes_on(hub: Hub, tmp_path: Path) -> None:
    hub.script["shard_00000.parquet"] = [Answer(send=60_000, stall=True)]
    program = (
        "import sys\n"
        "from nanochat_ray.data.download import PublicSet, fetch_shards\n"
        "from nanochat_ray.storage import Folder\n"
        "fetch_shards(PublicSet('someone/texts', 3), ['shard_00000.parquet'], Folder.at(sys.argv[1]), "
        "hub_url=sys.argv[2])\n"
    )
    process = subprocess.Popen([sys.executable, "-c", program, str(tmp_path), hub.url], stderr=subprocess.PIPE)
    try:
        deadline = time.monotonic() + 30
        while not any(path.stat().st_size for path in tmp_path.glob("*.partial")):
            assert process.poll() is None, process.stderr.read() if process.stderr else ""
            assert time.monotonic() < deadline, "nothing arrived in 30 s"
            time.sleep(0.01)
    finally:
        process.send_signal(signal.SIGKILL)
        process.communicate()
    (partial,) = tmp_path.glob("*.partial")
    assert not (tmp_path / "shard_00000.parquet").exists()
    received = partial.stat().st_size

    assert fetch(hub, tmp_path).read_bytes() == SHARD
    assert leftovers(tmp_path) == ["shard_00000.parquet"]
    assert hub.ranges_asked("shard_00000.parquet") == [None, f"bytes={received}-"]
