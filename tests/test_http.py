"""What surrounds the server: who may call, how much they may send and how slowly, and what every answer carries."""

import asyncio
import logging

import pytest

from nanochat_ray.serve.http import OWNER, Guard
from nanochat_ray.serve.keys import ApiKeys, add_key, read_keys
from nanochat_ray.serve.schema import MAX_BODY_BYTES
from tests.asgi import LOCAL, Answer, Client


def reading(seen: list | None = None):
    """An application that reads the whole body and answers 200."""

    async def application(scope, receive, send):
        if seen is not None:
            seen.append(scope)
        while (await receive())["more_body"]:
            pass
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"fine"})

    return application


def ask(headers: dict[str, str], portions: list[bytes], path: str = "/v1/x", app=None, **options) -> Answer:
    client = Client(Guard(app or reading(), **options), headers=None)
    return asyncio.run(client.ask(path, portions=portions, headers=headers, method="POST"))


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        (LOCAL, 200),
        ({"host": "localhost:8000", "origin": "http://localhost:8000"}, 200),
        ({"host": "[::1]:8000"}, 200),
        ({"host": "evil.example:8000"}, 403),
        ({"host": "127.0.0.1.evil.example"}, 403),
        ({}, 403),
        ({**LOCAL, "origin": "https://evil.example"}, 403),
        ({**LOCAL, "origin": "http://127.0.0.1:9999"}, 403),
        ({**LOCAL, "origin": "null"}, 403),
        ({"host": "[::1"}, 403),
        ({**LOCAL, "origin": "http://[::1"}, 403),
        ({**LOCAL, "content-length": str(MAX_BODY_BYTES + 1)}, 413),
        ({**LOCAL, "content-length": "1" + "0" * 5000}, 413),
        ({**LOCAL, "content-length": "-1"}, 200),
    ],
)
def test_only_this_machine_and_its_own_page_are_served(headers, status):
    assert ask(headers, [b""]).status == status


def test_a_server_may_be_told_more_names():
    headers = {"host": "Chat.example:80"}
    assert ask(headers, [b""], allowed_hosts=["chat.EXAMPLE"]).status == 200
    assert ask(headers, [b""], allowed_hosts=["*"]).status == 200
    assert ask(headers, [b""], allowed_hosts=["other.example"]).status == 403
    assert ask({**headers, "origin": "http://evil.example"}, [b""], allowed_hosts=["*"]).status == 403


def test_a_body_without_a_length_is_cut_off_at_the_limit():
    assert ask(LOCAL, [b"x" * 600_000]).status == 200
    answer = ask(LOCAL, [b"x" * 600_000] * 17)
    assert answer.status == 413
    assert "larger than" in answer.error["message"]


def test_a_body_that_is_too_large_is_named_even_if_the_app_calls_it_malformed():
    async def app(scope, receive, send):
        try:
            while (await receive()).get("more_body"):
                pass
        except Exception:  # as FastAPI does
            await send({"type": "http.response.start", "status": 400, "headers": []})
            await send({"type": "http.response.body", "body": b"malformed"})

    assert ask(LOCAL, [b"x" * 2**20] * 2, app=app).status == 413


def test_a_body_that_comes_too_slowly_is_given_up():
    async def dribble() -> Answer:
        client = Client(Guard(reading(), body_timeout_s=0.05))
        return await client.ask("/v1/x", portions=[b"x"] * 1000, seconds_between=0.01)

    answer = asyncio.run(dribble())
    assert answer.status == 408
    assert "longer than 0.05 seconds" in answer.error["message"]


def test_every_answer_has_the_security_headers_and_none_opens_it_to_other_sites():
    for headers in (LOCAL, {}):
        answered = ask(headers, [b""]).headers
        assert answered["x-content-type-options"] == "nosniff"
        assert answered["x-frame-options"] == "DENY"
        assert not [name for name in answered if name.startswith("access-control")]


def test_what_nobody_caught_is_answered_and_logged_without_its_message(caplog):
    async def app(scope, receive, send):
        raise KeyError("my secret diary")

    with caplog.at_level(logging.DEBUG):
        answer = ask(LOCAL, [b""], app=app)
    assert (answer.status, answer.error["type"]) == (500, "server_error")
    assert "KeyError" in caplog.text
    assert "secret" not in caplog.text + str(answer.content)


# --- keys ------------------------------------------------------------------------------------------------------------


class Clock:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def stored(tmp_path):
    """(a key with a rate, one without, the file that holds them)"""
    path = tmp_path / "keys"
    alice, bob = add_key(path, "alice", per_minute=2), add_key(path, "bob")
    line, other = path.read_text().splitlines()
    path.write_text(f"# who may ask\n\n{line}  # two a minute\n{other}\n")
    return alice, bob, path


def test_a_key_is_asked_for_where_there_is_something_to_protect(stored):
    alice, _, path = stored
    keys = ApiKeys(read_keys(path), Clock())
    seen: list = []
    bearer = {**LOCAL, "authorization": f"Bearer {alice}"}
    assert ask(bearer, [b""], keys=keys, app=reading(seen)).status == 200
    assert seen[0][OWNER] == "alice"
    for path, status in [("/v1/models", 401), ("/stats", 401), ("/metrics", 401), ("/health", 200), ("/page/x", 200)]:
        assert ask(LOCAL, [b""], path, keys=keys).status == status
        assert ask(LOCAL, [b""], f"/chat{path}", keys=keys).status == 401

    def mounted(guard):  # as Serve does with a route prefix
        async def application(scope, receive, send):
            await guard({**scope, "root_path": "/chat"}, receive, send)

        return application

    for path, status in [("/chat/v1/models", 401), ("/chat/stats", 401), ("/chat", 200), ("/chat/health", 200)]:
        client = Client(mounted(Guard(reading(), keys=keys)), headers=None)
        assert asyncio.run(client.ask(path, portions=[b""], headers=LOCAL, method="POST")).status == status


@pytest.mark.parametrize("wrong", ["", "Bearer", "Bearer ", "Bearer nr-wrong", "Basic {}", "{}", "Bearer {}x", "é"])
def test_wrong_keys_are_refused_with_a_challenge(stored, wrong):
    keys = ApiKeys(read_keys(stored[2]), Clock())
    answer = ask({**LOCAL, "authorization": wrong.format(stored[0])}, [b"x" * 3_000_000], keys=keys)
    assert answer.status == 401
    assert answer.headers["www-authenticate"] == "Bearer"
    assert (answer.error["type"], answer.error["code"]) == ("authentication_error", "invalid_api_key")


def test_a_key_above_its_rate_is_told_when_to_come_back_and_others_are_not_held_up(stored):
    alice, bob, path = stored
    clock = Clock()
    keys = ApiKeys(read_keys(path), clock)
    header = f"Bearer {alice}"
    statuses = [ask({**LOCAL, "authorization": header}, [b""], keys=keys).status for _ in range(3)]
    assert statuses == [200, 200, 429]
    refused = ask({**LOCAL, "authorization": header}, [b""], keys=keys)
    assert (refused.headers["retry-after"], refused.error["code"]) == ("30", "rate_limit_exceeded")
    assert keys.check(f"bearer {bob}") == "bob"
    assert keys.check(header, counts=False) == "alice"
    clock.now += 30
    assert keys.check(header) == "alice"
    assert ask({**LOCAL, "authorization": header}, [b""], keys=keys).status == 429
    clock.now += 3600
    assert [ask({**LOCAL, "authorization": header}, [b""], keys=keys).status for _ in range(3)] == [200, 200, 429]
