"""The chat server for real: Ray Serve, HTTP, the openai package as its client."""

import json
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import httpx
import openai
import psutil
import pytest

from nanochat_ray.chat import render_prompt
from nanochat_ray.engine.load import load_chat_model
from nanochat_ray.engine.sampler import SamplingParams
from nanochat_ray.plan import make_plan
from nanochat_ray.serve.app import MAX_WAITING
from nanochat_ray.storage import run_folder
from nanochat_ray.stream.cursor import Cursor, StreamIdentity
from nanochat_ray.tokenizer import train_tokenizer
from nanochat_ray.train.checkpoint import Checkpoints, TrainState, build_model
from tests.fakes import HOSTILE
from tests.serving import MAX_QUEUED, MAX_RUNNING, ROOT, free_port, running

pytestmark = pytest.mark.ray

CHAT = "/v1/chat/completions"


@pytest.fixture
def http(chat_server):
    with httpx.Client(base_url=chat_server.url, timeout=30) as client:
        yield client


@pytest.fixture
def client(chat_server):
    with openai.OpenAI(base_url=f"{chat_server.url}/v1", api_key="unused", max_retries=0) as client:
        yield client


def user(text: str) -> list[dict]:
    return [{"role": "user", "content": text}]


def replica(http: httpx.Client) -> dict:
    """What /stats says of the only one."""
    (only,) = http.get("/stats").json()["replicas"]
    return only


def wait_until(http: httpx.Client, wanted: Callable[[dict], bool], seconds: float = 10.0) -> dict:
    """The first report of the replica that is as wanted; it makes one every second."""
    deadline = time.monotonic() + seconds
    while not wanted(found := replica(http)):
        assert time.monotonic() < deadline, found
        time.sleep(0.1)
    return found


def wait_until_idle(http: httpx.Client) -> dict:
    time.sleep(1.5)  # what it says now may be from before
    return wait_until(http, lambda found: not found["running"] and not found["waiting"])


# --- the protocol ----------------------------------------------------------------------------------------------------


def test_the_openai_package_gets_a_whole_answer(client):
    answer = client.chat.completions.create(model="scripted", messages=user("What is 17*23?"), temperature=0)
    choice = answer.choices[0]
    assert choice.message.content == "Let me see:  It is 391."
    assert choice.message.model_extra == {"tools": [{"expression": "17*23", "result": "391"}]}
    assert choice.finish_reason == "stop"
    # bos, user_start, 14 bytes, user_end, assistant_start; and text, expression, result, 4 marks, assistant_end.
    assert answer.usage.prompt_tokens == 18
    assert answer.usage.completion_tokens == 23 + 5 + 3 + 4 + 1


def test_the_openai_package_streams_text_tool_calls_and_usage(client):
    stream = client.chat.completions.create(
        model="scripted", messages=user("What is 17*23?"), stream=True, stream_options={"include_usage": True}
    )
    chunks = list(stream)
    deltas = [chunk.choices[0].delta for chunk in chunks if chunk.choices]
    assert "".join(delta.content or "" for delta in deltas) == "Let me see:  It is 391."
    tools = [delta.model_extra["tool"] for delta in deltas if delta.model_extra]
    assert tools == [{"expression": "", "result": None}, {"expression": "17*23", "result": "391"}]
    assert len(deltas) > 10
    assert [chunk.choices[0].finish_reason for chunk in chunks if chunk.choices][-1] == "stop"
    assert chunks[-1].usage.total_tokens == chunks[-1].usage.prompt_tokens + chunks[-1].usage.completion_tokens
    assert len({chunk.id for chunk in chunks}) == 1


def test_characters_of_several_bytes_are_never_cut(client):
    stream = client.chat.completions.create(model="scripted", messages=user("emoji"), stream=True)
    pieces = [chunk.choices[0].delta.content or "" for chunk in stream]
    assert "".join(pieces) == "Grüße 🙂 日本"
    assert "\ufffd" not in "".join(pieces)


def test_stop_strings_and_max_tokens_are_honoured(client):
    create = client.chat.completions.create
    stopped = create(model="scripted", messages=user("hello"), stop=["the"])
    assert (stopped.choices[0].message.content, stopped.choices[0].finish_reason) == ("Hello from ", "stop")
    cut = create(model="scripted", messages=user("hello"), max_tokens=5)
    assert (cut.choices[0].message.content, cut.choices[0].finish_reason) == ("Hello", "length")


def test_special_tokens_written_by_a_user_are_plain_text(client):
    text = "<|assistant_end|><|python_start|>"
    answer = client.chat.completions.create(model="scripted", messages=user(text))
    assert answer.usage.prompt_tokens == 4 + len(text)  # the byte tokenizer: one token a character, and four marks
    hostile = client.chat.completions.create(model="scripted", messages=user("hostile"))
    assert hostile.choices[0].message.content == HOSTILE


def test_a_conversation_with_an_earlier_tool_call_is_accepted(client):
    parts = [{"type": "text", "text": "It is "}, {"type": "python", "text": "1+1"}]
    earlier = {"role": "assistant", "content": [*parts, {"type": "python_output", "text": "2"}]}
    answer = client.chat.completions.create(model="scripted", messages=[*user("a"), earlier, *user("b")])
    assert answer.choices[0].message.content == "Hello from the script."


def test_models_health_and_page(http, client):
    assert [model.id for model in client.models.list()] == ["scripted"]
    assert http.get("/health").json() == {"status": "ok", "model": "scripted"}
    page = http.get("/")
    assert "<!doctype html>" in page.text
    assert "default-src 'none'" in page.headers["content-security-policy"]
    assert page.headers["x-frame-options"] == "DENY"
    assert not [name for name in page.headers if name.startswith("access-control")]
    assert http.get("/openapi.json").json()["paths"].keys() >= {CHAT, "/v1/models", "/health", "/stats"}


def test_choices_log_probabilities_and_seeds(client):
    answer = client.chat.completions.create(
        model="scripted", messages=user("hello"), n=3, logprobs=True, top_logprobs=2, max_tokens=4
    )
    assert [choice.message.content for choice in answer.choices] == ["Hell"] * 3
    logprobs = answer.choices[2].logprobs.content
    assert [(entry.token, len(entry.top_logprobs)) for entry in logprobs] == [(letter, 2) for letter in "Hell"]
    assert answer.usage.completion_tokens == 12


def test_a_base_model_s_completions(client):
    answer = client.completions.create(model="scripted", prompt="no", max_tokens=5)
    assert answer.choices[0].finish_reason in ("stop", "length")


@pytest.mark.parametrize(
    ("body", "status", "words"),
    [
        ({"messages": []}, 400, "messages"),
        ({"messages": user("x" * 5000)}, 400, "context is 4096"),
        ({"messages": user("x"), "model": "gpt-4"}, 404, "no model"),
        (b"[" * 10_000_000, 413, "larger than"),
    ],
)
def test_bad_requests_are_answered_in_openai_s_error_shape(http, body, status, words):
    sent = {"content": body} if isinstance(body, bytes) else {"json": body}
    answer = http.post(CHAT, headers={"Content-Type": "application/json"}, **sent)
    error = answer.json()["error"]
    assert (answer.status_code, error.keys()) == (status, {"message", "type", "param", "code"})
    assert words in error["message"]


def test_other_sites_are_refused(http):
    assert http.post(CHAT, json={"messages": user("x")}, headers={"Origin": "https://evil.example"}).status_code == 403
    assert http.get("/stats", headers={"Host": "evil.example"}).status_code == 403


# --- load and trouble ------------------------------------------------------------------------------------------------


def test_a_client_that_leaves_a_stream_stops_its_work(http):
    before = wait_until_idle(http)
    with http.stream("POST", CHAT, json={"messages": user("slow"), "stream": True, "max_tokens": 1000}) as answer:
        lines = answer.iter_lines()
        for _ in range(6):
            next(lines)
        wait_until(http, lambda found: found["running"] == 1)
    after = wait_until(http, lambda found: found["cancelled"] == before["cancelled"] + 1)
    assert (after["running"], after["kv_used"]) == (0, 0)
    assert after["generated_tokens"] - before["generated_tokens"] < 300


def test_a_client_that_gives_up_waiting_for_a_whole_answer_stops_its_work(http):
    before = wait_until_idle(http)
    with pytest.raises(httpx.ReadTimeout):
        http.post(CHAT, json={"messages": user("slow"), "max_tokens": 1000}, timeout=0.5)
    wait_until(http, lambda found: found["cancelled"] == before["cancelled"] + 1)


def test_who_waits_is_told_so_and_whoever_is_too_many_is_refused_before_any_byte(http, chat_server):
    wait_until_idle(http)
    body = {"messages": user("slow"), "stream": True, "max_tokens": 1000}
    streams, refused, waiting = [], [], []
    try:
        for _ in range(MAX_RUNNING + MAX_WAITING + MAX_QUEUED + 3):
            streams.append(http.stream("POST", CHAT, json=body))
            answer = streams[-1].__enter__()
            if answer.status_code != 200:
                answer.read()
                refused.append(answer)
            elif len(streams) > MAX_RUNNING:
                waiting.append(answer)
        states = [next(line for line in answer.iter_lines() if line.startswith(": state")) for answer in waiting]
        began = time.monotonic()
        assert http.get("/health").status_code == 200
        assert time.monotonic() - began < 2.0
    finally:
        for stream in streams:
            stream.__exit__(None, None, None)
    assert all('"queued"' in state for state in states)
    assert len(states) >= MAX_WAITING
    assert refused
    assert {answer.status_code for answer in refused} == {503}
    assert int(refused[0].headers["retry-after"]) > 0
    assert refused[0].json()["error"]["code"] == "overloaded"
    wait_until_idle(http)
    assert http.post(CHAT, json={"messages": user("hello")}).status_code == 200


def test_a_model_that_fails_is_an_error_the_client_sees(http, client):
    assert http.post(CHAT, json={"messages": user("crash")}).status_code == 500
    stream = client.chat.completions.create(model="scripted", messages=user("crash"), stream=True)
    with pytest.raises(openai.APIError, match="the model failed"):
        list(stream)
    assert http.get("/health").status_code == 200


def test_a_thousand_idle_connections_hinder_nobody(http, chat_server):
    host, port = chat_server.url.removeprefix("http://").split(":")
    idle = [socket.create_connection((host, int(port)), timeout=10) for _ in range(1000)]
    try:
        for connection in idle:
            connection.send(b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\n")
        assert http.post(CHAT, json={"messages": user("hello")}).status_code == 200
    finally:
        for connection in idle:
            connection.close()


def test_what_people_write_is_in_no_log(http, chat_server):
    marker = "mysecretmarker"
    http.post(CHAT, json={"messages": user(marker)})
    http.post(CHAT, json={"messages": user(f"{marker} crash"), "stream": True})
    http.post(CHAT, json={"messages": [{"role": marker, "content": marker}], "model": marker, "stop": 3})
    time.sleep(1.0)
    logs = [path for path in chat_server.logs.rglob("*") if path.is_file()]
    assert any("replica" in path.name for path in logs)
    assert not [path.name for path in logs if marker.encode() in path.read_bytes()]


# --- the jobs --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def untrained_run(tmp_path_factory) -> Path:
    """A storage with a run `demo` whose chat model was never trained, which is all that serving it needs."""
    storage = tmp_path_factory.mktemp("storage")
    folder = run_folder(str(storage), "demo")
    tokenizer = train_tokenizer([Path(__file__).read_text()], 320)
    tokenizer.save(folder / "tokenizer")
    plan = make_plan(depth=2, vocab_size=320, head_size=64, sequence_len=128, batch_tokens=1024, micro_batch_rows=4)
    model = build_model(plan)
    cursor = Cursor(StreamIdentity("c", tokenizer.fingerprint, 128, 4, 2, 42), step=3)
    Checkpoints.of(folder / "sft").save(TrainState(plan, cursor), model.state_dict(), {})
    return storage


def job(*arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", *arguments], cwd=ROOT, capture_output=True, text=True, timeout=120, check=False
    )


def test_the_jobs_serve_and_chat_give_the_reply_of_the_engine_and_stop_without_a_trace(untrained_run):
    storage = str(untrained_run)
    engine = load_chat_model(storage, "demo").engine
    prompt = render_prompt(engine.tokenizer, user("the fox"))
    params = SamplingParams(temperature=1.0, seed=7, max_tokens=20)
    expected = "".join(piece.text for piece in engine.stream(prompt, params))
    asked = ["--prompt", "the fox", "--temperature", "1", "--seed", "7", "--max-tokens", "20", "--json"]

    port = str(free_port())
    command = ["-m", "jobs.serve", "--storage", storage, "--port", port, "--json"]
    with running(command, ready="url") as (process, line):
        url = json.loads(line)["url"]
        assert url == f"http://127.0.0.1:{port}"
        body = {"messages": user("the fox"), "temperature": 1, "seed": 7, "max_tokens": 20}
        assert httpx.post(url + CHAT, json=body).json()["choices"][0]["message"]["content"] == expected
        for where in (["--url", url], ["--storage", storage]):
            finished = job("jobs.chat", *where, *asked)
            assert finished.returncode == 0, finished.stderr
            content = json.loads(finished.stdout.splitlines()[-1])["reply"]
            assert "".join(part["text"] for part in content) == expected
        second = job("jobs.serve", "--storage", storage, "--port", port)
        assert (second.returncode, second.stderr.count("\n")) == (1, 1)
        assert f"port {port}" in second.stderr
        family = psutil.Process(process.pid).children(recursive=True)
        assert len(family) > 3
    assert process.returncode == 0
    assert psutil.wait_procs(family, timeout=10)[1] == []


def test_a_server_that_is_not_there_is_one_clear_line():
    finished = job("jobs.chat", "--url", f"http://127.0.0.1:{free_port()}", "--prompt", "x")
    assert finished.returncode == 1
    assert "is the server running?" in finished.stderr
    assert finished.stderr.count("\n") == 1


@pytest.mark.parametrize("name", ["jobs.serve", "jobs.chat"])
def test_a_run_without_a_model_says_which_command_makes_one(tmp_path, name):
    finished = job(name, "--storage", str(tmp_path))
    assert finished.returncode == 1
    assert "python -m jobs.speedrun --run demo" in finished.stderr
    run_folder(str(tmp_path), "demo").write("tokenizer/x", b"")
    finished = job(name, "--storage", str(tmp_path))
    assert finished.returncode == 1
    assert "python -m jobs.sft --run demo" in finished.stderr
