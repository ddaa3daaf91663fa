"""What clients see when parts of the server are lost, stuck or not there yet; a server of its own for each."""

import os
import signal
import threading
import time

import httpx
import psutil
import pytest

from nanochat_ray.engine.sampler import SamplingParams
from nanochat_ray.serve.client import ask
from tests.serving import Server, scripted_server

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(300)]

CHAT = "/v1/chat/completions"
SLOW = "tick " * 200


def user(text: str) -> list[dict]:
    return [{"role": "user", "content": text}]


def pid_of(server: Server, deployment: str) -> int:
    """A process of a deployment's replica; Ray writes its name into the process's title."""
    for process in psutil.Process(server.process.pid).children(recursive=True):
        if process.is_running() and f"ServeReplica:chat:{deployment}" in " ".join(process.cmdline()):
            return process.pid
    raise AssertionError(f"no {deployment} runs")


def read_while(server: Server, question: str, disturb) -> tuple[str, list[dict]]:
    """The whole reply of a client that comes back, whatever happens to the server; and the states it was told."""
    text, states, disturbed = "", [], False
    params = SamplingParams(temperature=0.0, max_tokens=1000)
    for delta in ask(server.url, user(question), params, on_state=states.append):
        text += delta.get("content") or ""
        if len(text) > 50 and not disturbed:
            disturbed = True
            disturb()
    return text, states


def test_a_lost_ingress_and_a_lost_replica_are_pauses_to_a_client_that_comes_back():
    with scripted_server(max_queued=16) as server:
        text, states = read_while(server, "slow", lambda: os.kill(pid_of(server, "Ingress"), signal.SIGKILL))
        assert text == SLOW
        assert any(state["state"] == "reconnecting" for state in states)
        text, states = read_while(server, "slow", lambda: os.kill(pid_of(server, "EngineReplica"), signal.SIGKILL))
        assert text == SLOW
        assert {"state": "moved"} in states
        assert not any(state["state"] == "reconnecting" for state in states)


def test_from_no_replica_the_first_message_waits_honestly_for_one():
    with scripted_server(min_replicas=0) as server, httpx.Client(base_url=server.url, timeout=120) as http:
        health = http.get("/health")
        assert health.status_code == 503
        assert int(health.headers["retry-after"]) > 0
        states: list[dict] = []
        deltas = ask(server.url, user("hello"), SamplingParams(temperature=0.0), on_state=states.append)
        assert "".join(delta.get("content") or "" for delta in deltas) == "Hello from the script."
        assert states[0] == {"state": "starting"}
        deadline = time.monotonic() + 10
        while http.get("/health").status_code != 200:
            assert time.monotonic() < deadline
            time.sleep(0.2)


def test_a_stuck_engine_is_replaced_and_a_reply_that_sticks_every_engine_is_given_up():
    with scripted_server("load_that_hangs", max_queued=16) as server:
        outcome: list[str] = []

        def hang() -> None:
            body = {"messages": user("hang"), "stream": True}
            with httpx.stream("POST", server.url + CHAT, json=body, timeout=280) as answer:
                outcome.append(answer.read().decode())

        thread = threading.Thread(target=hang)
        thread.start()
        thread.join(timeout=240)
        assert "the model failed" in outcome[0]
        assert outcome[0].count('"moved"') == 2  # three replicas tried it
        deadline = time.monotonic() + 60
        while httpx.get(f"{server.url}/health", timeout=30).status_code != 200:
            assert time.monotonic() < deadline
            time.sleep(0.5)
        answer = httpx.post(server.url + CHAT, json={"messages": user("hello")}, timeout=60)
        assert answer.json()["choices"][0]["message"]["content"] == "Hello from the script."
