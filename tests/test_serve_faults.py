"""What clients see when parts of the server are lost, stuck or not there yet; a server of its own for each."""

import json
import os
import signal
import socket
import threading
import time

import httpx
import psutil
import pytest

from nanochat_ray.engine.sampler import SamplingParams
from nanochat_ray.serve.client import ask
from tests.serving import SWAP, Server, scripted_server

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


def read_while(server: Server, question: str, disturb, max_tokens: int = 1000) -> tuple[str, list[dict]]:
    """The whole reply of a client that comes back, whatever happens to the server; and the states it was told."""
    text, states, disturbed = "", [], False
    params = SamplingParams(temperature=0.0, max_tokens=max_tokens)
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


def test_a_model_that_cannot_be_loaded_is_an_error_and_not_an_endless_wait():
    with scripted_server("load_that_fails", min_replicas=0) as server:
        body = {"messages": user("hello"), "stream": True}
        answer = httpx.post(server.url + CHAT, json=body, timeout=120).text
        assert "no replica can be started" in answer
        assert "cannot be used" in answer
        assert httpx.get(f"{server.url}/health", timeout=30).status_code == 503


def test_a_model_is_replaced_under_load_without_a_failed_request():
    with scripted_server(max_queued=16) as server:
        answers: list[httpx.Response] = []
        over = threading.Event()
        text = ""

        def ask_on() -> None:
            with httpx.Client(timeout=120) as http:
                while not over.is_set():
                    answers.append(http.post(server.url + CHAT, json={"messages": user("hello")}))

        headers = {"Idempotency-Key": "swap"}
        body = {"messages": user("slow"), "stream": True, "max_tokens": 1000}
        thread = threading.Thread(target=ask_on)
        with httpx.stream("POST", server.url + CHAT, json=body, headers=headers, timeout=120) as stream:
            lines = stream.iter_lines()
            last_id = next(line for line in lines if line.startswith("id: ")).removeprefix("id: ")
            thread.start()
            server.process.send_signal(SWAP)
            for line in lines:  # the old reply comes to its end, from the old model
                if line.startswith("data: {"):
                    delta = json.loads(line.removeprefix("data: "))["choices"][0]["delta"]
                    text += delta.get("content") or ""
        deadline = time.monotonic() + 60
        while "new model" not in answers[-1].text:
            assert time.monotonic() < deadline
            time.sleep(0.2)
        over.set()
        thread.join()
        assert SLOW.endswith(text)
        assert len(text) > 900
        assert {answer.status_code for answer in answers} == {200}
        refused = httpx.post(server.url + CHAT, json=body, headers={**headers, "Last-Event-ID": last_id}, timeout=60)
        assert (refused.status_code, refused.json()["error"]["code"]) == (409, "model_changed")


def test_a_replica_that_falls_silent_loses_its_reply_to_another():
    with scripted_server(max_queued=16, min_replicas=2, max_replicas=2) as server:
        stopped: list[int] = []

        def stop() -> None:
            replicas = httpx.get(f"{server.url}/stats", timeout=30).json()["replicas"]
            deadline = time.monotonic() + 10
            while not (writing := [replica["pid"] for replica in replicas if replica["running"]]):
                assert time.monotonic() < deadline
                replicas = httpx.get(f"{server.url}/stats", timeout=30).json()["replicas"]
            os.kill(writing[0], signal.SIGSTOP)  # as a machine that lost its power: no connection is closed
            stopped.extend(writing)

        try:
            text, states = read_while(server, "slow", stop)
        finally:
            for pid in stopped:
                os.kill(pid, signal.SIGKILL)
        assert text == SLOW
        assert {"state": "moved"} in states


def test_a_server_that_is_stopped_lets_replies_end_and_refuses_new_ones():
    with scripted_server(max_queued=16) as server:
        refused: list[httpx.Response] = []

        def stop() -> None:
            server.process.send_signal(signal.SIGTERM)
            while not refused or refused[-1].status_code == 200:
                refused.append(httpx.post(server.url + CHAT, json={"messages": user("hello")}, timeout=30))

        text, states = read_while(server, "slow", stop, max_tokens=400)
        assert text == SLOW[:400]
        assert states == []
        assert refused[-1].status_code == 503
        assert int(refused[-1].headers["retry-after"]) > 0
        assert server.process.wait(timeout=60) == 0


def test_a_slow_reader_hinders_nobody_and_gets_everything():
    with scripted_server(max_queued=16) as server:
        host, port = server.url.removeprefix("http://").split(":")
        body = json.dumps({"messages": user("slow"), "stream": True, "max_tokens": 1000}).encode()
        head = f"POST {CHAT} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        with socket.create_connection((host, int(port)), timeout=60) as connection:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            connection.sendall(f"{head}Content-Length: {len(body)}\r\nConnection: close\r\n\r\n".encode() + body)
            time.sleep(8)  # it reads nothing
            began = time.monotonic()
            assert httpx.post(server.url + CHAT, json={"messages": user("hello")}, timeout=30).status_code == 200
            assert time.monotonic() - began < 5
            received = b""
            while portion := connection.recv(65536):
                received += portion
        assert b"[DONE]" in received


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
        assert "replicas in a row were lost" in outcome[0]
        assert outcome[0].count('"moved"') == 2  # three replicas tried it
        deadline = time.monotonic() + 60
        while httpx.get(f"{server.url}/health", timeout=30).status_code != 200:
            assert time.monotonic() < deadline
            time.sleep(0.5)
        answer = httpx.post(server.url + CHAT, json={"messages": user("hello")}, timeout=60)
        assert answer.json()["choices"][0]["message"]["content"] == "Hello from the script."
