"""The serving benchmark: its flags, how it tells processes apart, and its scenarios against a fake server."""

import itertools
import json
import os
import subprocess
import sys
import time
from dataclasses import replace

import psutil
import pytest

from jobs import bench
from nanochat_ray import cli
from nanochat_ray.bench import bare_engine, serve_bench, serve_speed, serve_trials
from nanochat_ray.bench.bare_engine import BareSpeed, bare_speeds
from nanochat_ray.bench.http_exchange import Address
from nanochat_ray.bench.load import Mix
from nanochat_ray.bench.serve_options import SCENARIOS, ServeSettings
from nanochat_ray.bench.served import ChatServer, Usage, role_of
from nanochat_ray.engine.load import ChatModel
from nanochat_ray.errors import UsageError, UserError
from tests.fake_openai import Behaviour, fake_openai, obedient
from tests.fakes import tiny_engine
from tests.small_corpus import write_corpus


def settings(*flags: str) -> ServeSettings:
    return ServeSettings.of(bench.build_parser().parse_args(["serve", "--quick", *flags]))


# --- flags -----------------------------------------------------------------------------------------------------------


def test_numbers_of_chats_are_sorted_and_full_adds_64():
    assert settings("--streams", "4,1,4").streams == (1, 4)
    assert settings("--full").streams == (1, 4, 64)
    assert settings("--scenario", "scale").replicas == (1, 3)
    assert settings("--scenario", "failover").replicas == (2, 2)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--streams", "1,x"], "numbers of chats"),
        (["--streams", "0"], "numbers of chats"),
        (["--replicas", "3:1"], "--replicas '3:1'"),
        (["--seconds", "0"], "more than 0"),
        (["--url", "http://x", "--run", "demo"], "does not go with --run"),
        (["--url", "http://x", "--scenario", "failover"], "does not go with --scenario failover"),
    ],
)
def test_flags_that_cannot_be_meant_are_refused(flags, words):
    with pytest.raises(UsageError, match=words):
        settings(*flags)


def test_every_scenario_is_measured_and_printed():
    assert serve_bench.MEASURE.keys() == serve_bench.LINES.keys() == SCENARIOS.keys()


# --- processes -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("command", "role"),
    [
        (["ray::ServeReplica:chat:ChatServer"], "replica ChatServer"),
        (["ray::ProxyActor", "", ""], "ProxyActor"),
        (["ray::ServeController.run_control_loop"], "ServeController"),
        (["/x/python", "-u", "-m", "jobs.serve", "--json"], "jobs.serve"),
        (["/x/python", "-u", "/x/ray/dashboard/dashboard.py", "--host=h"], "dashboard"),
        (["/x/raylet/raylet", "--a=b"], "raylet"),
        ([], "unknown"),
    ],
)
def test_a_process_has_the_role_that_its_title_says(command, role):
    assert role_of(command) == role


def test_cpu_is_counted_by_role_without_the_engine_s():
    before = Usage(0.0, {1: ("proxy", 1.0, 10, 5), 2: ("replica Engine", 1.0, 10, 5), 3: ("replica Api", 2.0, 7, 1)})
    after = Usage(1.0, {1: ("proxy", 1.5, 20, 6), 2: ("replica Engine", 9.0, 10, 5), 4: ("replica Api", 0.25, 9, 2)})
    assert after.cpu_since(before, without=[2]) == {"proxy": 0.5, "replica Api": 0.25}
    assert after.memory() == {"proxy": 20, "replica Engine": 10, "replica Api": 9}


def test_usage_is_that_of_a_process_and_its_descendants():
    usage = ChatServer("http://127.0.0.1:1", os.getpid()).usage()
    _, cpu_s, rss, files = usage.processes[os.getpid()]
    assert cpu_s > 0
    assert rss > 10**6
    assert files > 2
    assert ChatServer("http://127.0.0.1:1").usage().processes == {}
    assert ChatServer("http://127.0.0.1:1").stats() == {}


# --- scenarios -------------------------------------------------------------------------------------------------------


def printed(scenario: str, figures: dict) -> str:
    """As people read it; and the figures survive JSON."""
    lines = serve_bench.serving_lines({"scenario": scenario, **json.loads(json.dumps(figures))})
    return "\n".join(f"{line.what} | {line.figure} | {line.beside}" for line in lines)


def test_prompts_have_the_tokens_that_the_server_counts():
    with fake_openai(obedient()) as url:
        prompts = serve_speed.Prompts.of(Address.of(url), seed=1)
    assert (prompts.tokens_per_word, prompts.tokens_around) == (1.0, 4.0)
    texts = [prompts.text(50) for _ in range(3)]
    assert [len(text.split()) for text in texts] == [46] * 3
    assert len({text[:60] for text in texts}) == 3


def test_a_server_that_refuses_a_plain_request_is_one_clear_error():
    with fake_openai(lambda _: Behaviour(status=401)) as url, pytest.raises(UserError, match="HTTP 401"):
        serve_speed.Prompts.of(Address.of(url), seed=1)


def test_speed_is_measured_and_stands_beside_the_bare_engine():
    wanted = replace(settings("--seconds", "0.1", "--streams", "4"), repeats=1)
    with fake_openai(obedient(pause_s=0.002)) as url:
        figures = serve_speed.measure_speed(ChatServer(url), wanted)
    one, four = figures["streams"]["1"], figures["streams"]["4"]
    assert four["requests"] % 4 == 0
    assert four["errors"] == {}
    assert four["overhead_ms_per_token"] is None
    assert figures["second_turn"]["prompt_tokens"] == [200, 200 + 16 + 12]
    bare = [{1: BareSpeed(0.002, 500.0), 4: BareSpeed(0.004, 1000.0)}, {1: BareSpeed(0.002, 500.0)}]
    beside = serve_speed.beside_bare(figures, bare)["streams"]
    assert beside["4"]["of_bare"] == pytest.approx(four["tok_per_s"] / 1000, abs=1e-3)
    assert beside["4"]["of_sequential"] == pytest.approx(four["tok_per_s"] / one["tok_per_s"], abs=1e-2)
    assert beside["4"]["first_token_of_bare"] == pytest.approx(four["first_token_ms"]["p95"] / 4, rel=0.01)
    text = printed("speed", serve_speed.beside_bare(figures, bare))
    assert "4 chats at once" in text
    assert "of the bare engine's 1,000 (goal ≥ 85%)" in text
    assert "(goal ≤ 15%)" in text
    assert "one at a time" in printed("speed", serve_speed.beside_bare(figures, []))


def test_the_bare_engine_writes_several_replies_at_once_and_keeps_nothing(monkeypatch):
    engine = tiny_engine()
    monkeypatch.setattr(bare_engine, "load_chat_model", lambda *_, **__: ChatModel(engine, "tiny", {}))
    speeds = bare_speeds("storage", "run", None, (1, 3), prompt_tokens=20, new_tokens=8, repeats=2)
    assert speeds.keys() == {1, 3}
    assert all(speed.first_token_s > 0 and speed.tok_per_s > 0 for speed in speeds.values())
    assert not engine.busy


def test_the_bare_engine_goes_on_with_other_replies_where_the_model_ends_one_early(monkeypatch):
    engine, wanted = tiny_engine(), []
    add = engine.add

    def add_short(prompt, params):
        wanted.append(params.max_tokens)
        return add(prompt, replace(params, max_tokens=min(3, params.max_tokens)))

    monkeypatch.setattr(engine, "add", add_short)
    monkeypatch.setattr(bare_engine, "load_chat_model", lambda *_, **__: ChatModel(engine, "tiny", {}))
    bare_speeds("storage", "run", None, (1,), prompt_tokens=20, new_tokens=8, repeats=1)
    assert wanted == [8, 5, 2] * 2  # the first time to warm up


def test_the_mixed_load_reports_what_came():
    with fake_openai(obedient()) as url:
        figures = serve_speed.measure_mixed(ChatServer(url), replace(settings("--rate", "40"), seconds=0.5))
    assert figures["requests"] == figures["completed"] > 5
    assert "requests completed" in printed("mixed", figures)


def test_replies_that_depend_on_the_others_are_found():
    wanted = settings("--streams", "4")
    with fake_openai(obedient()) as url:
        good = serve_speed.measure_check(ChatServer(url), wanted)
        again = serve_speed.measure_check(ChatServer(url), wanted)
    assert good == again
    assert good["differing"] == []
    counter = itertools.count()
    with fake_openai(lambda body: Behaviour(texts=(str(next(counter)),))) as url:
        bad = serve_speed.measure_check(ChatServer(url), wanted)
    assert bad["differing"] == [0, 1, 2, 3]
    assert "0 of 4" in printed("check", bad)


def test_scaling_is_timed_both_ways_without_a_failed_request(monkeypatch):
    monkeypatch.setattr(serve_trials, "LOOK_EVERY_S", 0.02)

    def stats(active: int) -> dict:
        return {"replicas": [{"generated_tokens": 1}] * (3 if active > 10 else 1)}

    with fake_openai(obedient(pause_s=0.002), stats) as url:
        figures = serve_trials.measure_scale(ChatServer(url), settings("--scenario", "scale"))
    assert figures["errors"] == {}
    assert figures["grown_s"] is not None
    assert figures["shrunk_s"] is not None
    assert "1 → 3 replicas" in printed("scale", figures)


def test_a_replica_is_killed_in_the_middle_and_the_replies_are_compared(monkeypatch):
    monkeypatch.setattr(serve_trials, "LOOK_EVERY_S", 0.02)
    sleep = [sys.executable, "-c", "import time; time.sleep(60)"]
    sleepers = [subprocess.Popen(sleep) for _ in range(3)]
    first, asked, reply = sleepers[0].pid, [0], obedient(pause_s=0.001)

    def behave(body: dict) -> Behaviour:
        asked[0] += 1
        return reply(body)

    def stats(_: int) -> dict:
        living = [sleeper.pid for sleeper in sleepers if sleeper.poll() is None]
        return {"replicas": [{"pid": pid, "generated_tokens": asked[0] * (pid == first)} for pid in living[:2]]}

    try:
        with fake_openai(behave, stats) as url:
            figures = serve_trials.measure_failover(ChatServer(url, os.getpid()), settings("--scenario", "failover"))
        assert sleepers[0].wait(5) < 0
    finally:
        for sleeper in sleepers:
            sleeper.kill()
            sleeper.wait()
    assert figures["going_on_when_killed"] == figures["replies"] == 4
    assert (figures["errors"], figures["differing"], figures["moved"]) == ({}, [], 0)
    assert figures["replica_back_s"] is not None
    assert "4 of 4" in printed("failover", figures)


def test_a_soak_says_what_grew_leaked_and_failed(monkeypatch):
    monkeypatch.setattr(serve_trials, "SAMPLE_EVERY_S", 0.05)
    monkeypatch.setattr(serve_trials, "LEAVE_WITHIN_S", 0.05)
    good = obedient(pause_s=0.001)

    def behave(body: dict) -> Behaviour:
        bad = [status for wrong, status in serve_trials.BAD_BODIES if wrong["messages"] == body["messages"]]
        return Behaviour(status=bad[-1] if "model" in body else bad[0]) if bad else good(body)

    def stats(active: int) -> dict:
        return {"replicas": [{"running": active, "waiting": 0, "kv_used": 3 + 2 * active}]}

    wanted = replace(settings("--scenario", "soak"), minutes=0.015)
    with fake_openai(behave, stats) as url:
        figures = serve_trials.measure_soak(ChatServer(url, os.getpid()), wanted)
    assert figures["errors"] == {}
    assert figures["left"] > 0
    assert figures["refused_as_expected"] > 0
    assert figures["completed"] > 0
    assert figures["blocks_held_when_idle"] == 3
    assert figures["busiest"]["kv_used"] >= 5
    role = role_of(psutil.Process().cmdline())
    assert figures["memory_mb"][role] > 10
    assert figures["files"][role] > 2
    assert f"memory of {role}" in printed("soak", figures)


def test_misuse_is_seeded_and_has_a_part_of_each_kind():
    mix = Mix(prompt_words=(12,), turns=(1,), max_tokens=(8,))
    asks = list(itertools.islice(serve_trials.misuse(mix, seed=3), 1000))
    assert asks == list(itertools.islice(serve_trials.misuse(mix, seed=3), 1000))
    bad, leaving = [a for a in asks if a.expects != 200], [a for a in asks if a.leave_after_s is not None]
    assert 50 < len(bad) < 150 < len(leaving) + 50 < 300


# --- the whole command -----------------------------------------------------------------------------------------------


def run_serve(capsys: pytest.CaptureFixture[str], *flags: str) -> dict:
    assert cli.run(bench.main, bench.build_parser(), ["serve", "--quick", "--json", *flags]) == 0
    *_, table, last = capsys.readouterr().out.strip().splitlines()
    assert "cores busy with other programs" in table
    return json.loads(last)


def test_the_command_measures_a_server_that_runs_already(capsys):
    with fake_openai(obedient()) as url:
        figures = run_serve(capsys, "--url", url, "--streams", "2", "--seconds", "0.1")
    assert (figures["benchmark"], figures["scenario"], figures["url"]) == ("serve", "speed", url)
    assert figures["streams"].keys() == {"1", "2"}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    folder = tmp_path_factory.mktemp("serve_bench") / "corpus"
    write_corpus(folder, documents=120)
    return folder


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.parametrize("scenario", ["speed", "check"])
def test_the_command_serves_an_untrained_model_and_measures_it(corpus, capsys, scenario):
    where = ["--corpus", str(corpus), "--storage", str(corpus.parent), "--vocab-size", "300", "--sequence-len", "512"]
    began = time.monotonic()
    figures = run_serve(capsys, *where, "--scenario", scenario)
    assert time.monotonic() - began < 120
    if scenario == "check":
        assert figures["differing"] == []
        return
    assert figures["ready_s"] > 0
    for level in figures["streams"].values():
        assert level["errors"] == {}
        assert level["of_bare"] > 0
        assert level["overhead_ms_per_token"] > 0
        assert len(level["bare"]) == 2
    assert figures["second_turn"]["ratio"] > 0
