"""What surrounds the server: who may call, how much they may send, and what every answer carries."""

import asyncio

import pytest

from nanochat_ray.serve.http import Guard, page
from nanochat_ray.serve.schema import MAX_BODY_BYTES


def ask(headers: dict[str, str], portions: list[bytes]) -> tuple[int, dict[bytes, bytes]]:
    """Status and headers of a request to an application that reads the whole body and answers 200."""
    sent: list = []

    async def application(scope, receive, send):
        while (await receive())["more_body"]:
            pass
        await send({"type": "http.response.start", "status": 200, "headers": []})

    async def receive():
        return {"type": "http.request", "body": portions.pop(0), "more_body": bool(portions)}

    async def send(message):
        sent.append(message)

    raw = [(name.encode(), value.encode()) for name, value in headers.items()]
    asyncio.run(Guard(application)({"type": "http", "headers": raw}, receive, send))
    return sent[0]["status"], dict(sent[0]["headers"])


LOCAL = {"host": "127.0.0.1:8000"}


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
        ({**LOCAL, "content-length": str(MAX_BODY_BYTES + 1)}, 413),
    ],
)
def test_only_this_machine_and_its_own_page_are_served(headers, status):
    assert ask(headers, [b""])[0] == status


def test_a_body_without_a_length_is_cut_off_at_the_limit():
    assert ask(LOCAL, [b"x" * 600_000])[0] == 200
    assert ask(LOCAL, [b"x" * 600_000] * 2)[0] == 413


def test_every_answer_has_the_security_headers():
    for headers in (LOCAL, {}):
        answered = ask(headers, [b""])[1]
        assert answered[b"x-content-type-options"] == b"nosniff"
        assert answered[b"x-frame-options"] == b"DENY"


def test_the_page_has_no_outside_resources_and_a_policy_for_exactly_its_script_and_style():
    html, policy = page()
    assert "'unsafe" not in policy
    assert policy.count("'sha256-") == html.count("<script>") + html.count("<style>") == 2
    assert "http://" not in html.replace("http://www.w3.org/2000/svg", "")
    assert "https://" not in html
    assert "innerHTML" not in html
    assert " style=" not in html


def test_a_body_without_length_that_grows_too_large_is_named_even_if_the_app_calls_it_malformed():
    async def app(scope, receive, send):
        try:
            while (await receive()).get("more_body"):
                pass
        except Exception:  # as FastAPI does
            await send({"type": "http.response.start", "status": 400, "headers": []})
            await send({"type": "http.response.body", "body": b"malformed"})

    async def chunks():
        return {"type": "http.request", "body": b"x" * 2**20, "more_body": True}

    sent = []

    async def send(message):
        sent.append(message)

    scope = {"type": "http", "headers": [(b"host", b"localhost")]}
    asyncio.run(Guard(app)(scope, chunks, send))
    assert [message.get("status") for message in sent] == [413, None]
    assert b"larger than" in sent[1]["body"]


@pytest.mark.parametrize("header", [(b"host", b"[::1"), (b"origin", b"http://[::1")])
def test_a_malformed_address_is_refused(header):
    async def app(scope, receive, send):
        pytest.fail("the app must not see this")

    sent = []

    async def send(message):
        sent.append(message)

    headers = [header] if header[0] == b"host" else [(b"host", b"localhost"), header]
    asyncio.run(Guard(app)({"type": "http", "headers": headers}, None, send))
    assert sent[0]["status"] == 403
