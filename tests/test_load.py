"""The load generator: replies read as they were sent, whoever fails; figures that are what they say. No Ray."""

import asyncio
import json
import math
import time
from itertools import islice, pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nanochat_ray.bench.http_exchange import Address, Exchange, run_exchange
from nanochat_ray.bench.load import (
    Ask,
    Chunk,
    Mix,
    Record,
    Trace,
    at_once,
    closed_loop,
    one_by_one,
    open_loop,
    poisson,
    script_of,
    send,
    tokens_of_chunks,
    user,
)
from nanochat_ray.bench.load_report import (
    chunk_gaps,
    differing,
    growth_per_minute,
    percentile,
    report,
    report_lines,
    steady_tok_per_s,
    steady_window,
    token_gaps,
)
from nanochat_ray.errors import UsageError
from tests.fake_openai import Behaviour, event, fake_openai, obedient, text_event

ASK = Ask({"messages": [user("hello there")], "max_tokens": 4, "seed": 7})
HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n"


def record_of(portions: list[tuple[float, bytes]], ask: Ask = ASK) -> Record:
    return Trace(ask, 0, 0.0, Exchange(sent=0.0, portions=portions, ended=99.0)).record()


def record(times: list[float], tokens: list[float] | None = None, who: int = 0, text: str = "x") -> Record:
    """A complete reply whose chunks came at these times."""
    shares = tokens or [1.0] * len(times)
    chunks = tuple(Chunk(at, text, share) for at, share in zip(times, shares, strict=True))
    return Record(
        ask=ASK,
        user=who,
        scheduled=0.0,
        sent=0.0,
        first_byte=0.0,
        ended=times[-1] if times else 0.0,
        status=200,
        error=None,
        left=False,
        chunks=chunks,
        tokens=round(sum(shares)),
        counted="usage",
        prompt_tokens=2,
        finish="length",
        states=(),
    )


# --- reading ---------------------------------------------------------------------------------------------------------


def cut(data: bytes, places: list[int]) -> list[bytes]:
    ends = sorted({place % (len(data) + 1) for place in places} | {0, len(data)})
    return [data[a:b] for a, b in pairwise(ends)]


@given(
    st.lists(st.text(min_size=1, max_size=6), min_size=1, max_size=5),
    st.lists(st.integers(0, 10**6), max_size=12),
    st.lists(st.integers(0, 10**6), max_size=12),
    st.booleans(),
)
def test_a_reply_reads_the_same_however_its_bytes_are_cut(texts, chunk_cuts, portion_cuts, chunked):
    events = [text_event(text) for text in texts]
    states = b': state {"state":"queued","ahead":3}\n\n: state {"state":"writing"}\n\n'
    usage = event({"choices": [], "usage": {"prompt_tokens": 5, "completion_tokens": 2 * len(texts)}})
    body = states + b"".join(events) + text_event("", "stop") + usage + b"data: [DONE]\n\n"
    if chunked:
        pieces = b"".join(b"%X;x=1\r\n%b\r\n" % (len(piece), piece) for piece in cut(body, chunk_cuts))
        answer = HEAD + b"Transfer-Encoding: chunked\r\n\r\n" + pieces + b"0\r\n\r\n"
    else:
        answer = HEAD + b"\r\n" + body
    read = record_of([(float(at), portion) for at, portion in enumerate(cut(answer, portion_cuts))])
    assert (read.text, read.finish, read.error, read.complete) == ("".join(texts), "stop", None, True)
    assert [state for state, _ in read.states] == ["queued", "writing"]
    assert (read.tokens, read.counted, read.prompt_tokens) == (2 * len(texts), "usage", 5)
    assert sum(chunk.tokens for chunk in read.chunks) == pytest.approx(read.tokens)
    assert [chunk.at for chunk in read.chunks] == sorted(chunk.at for chunk in read.chunks)


def test_a_chunk_arrives_with_the_portion_that_completes_its_event():
    first, second = text_event("a"), text_event("b")
    read = record_of([(1.0, HEAD + b"\r\n" + first[:9]), (2.0, first[9:] + second[:9]), (5.0, second[9:])])
    assert read.first_byte == 1.0
    assert [(chunk.text, chunk.at) for chunk in read.chunks] == [("a", 2.0), ("b", 5.0)]
    assert (read.error, read.counted, read.tokens) == ("broken off", "chunks", 2)


@pytest.mark.parametrize(
    ("answer", "error"),
    [
        (b"", "connection lost"),
        (b"SSH-2.0-x\r\n\r\n", "connection lost"),
        (b"HTTP/1.1 503 Busy\r\nContent-Length: 2\r\n\r\n{}", "HTTP 503"),
        (HEAD + b"\r\n" + text_event("a"), "broken off"),
        (HEAD + b"\r\n" + event({"error": {"type": "server_error", "code": None}}), "error event server_error"),
        (HEAD + b"\r\ndata: {broken\n\n", "not OpenAI's protocol"),
        (HEAD + b"\r\ndata: [1]\n\n", "not OpenAI's protocol"),
    ],
)
def test_what_went_wrong_has_a_kind(answer, error):
    with fake_openai(lambda _: Behaviour(raw=answer)) as url:
        read = asyncio.run(one_by_one(Address.of(url), [ASK])).records()[0]
    assert (read.error, read.complete) == (error, False)
    assert report([[read]], 0.0)["errors"] == {error: 1}


def test_nobody_listening_silence_and_leaving_are_told_apart():
    with fake_openai(obedient(pause_s=0.05)) as url:
        address = Address.of(url)
        leaving = Ask({**ASK.body, "max_tokens": 1000}, leave_after_s=0.3)
        left = asyncio.run(one_by_one(address, [leaving])).records()[0]
    assert (left.left, left.error, left.complete) == (True, None, False)
    assert 0 < len(left.chunks) < 20
    nobody = asyncio.run(one_by_one(address, [ASK])).records()[0]
    assert (nobody.error, nobody.sent, nobody.status) == ("no connection", None, None)
    with fake_openai(obedient(pause_s=5.0)) as url:
        address, kept = Address.of(url), Exchange()
        asyncio.run(run_exchange(kept, address, address.post("/v1/chat/completions", ASK.encoded()), silence_s=0.1))
    assert Trace(ASK, 0, 0.0, kept).record().error == "silence"


def test_a_refusal_that_is_expected_is_no_error_and_its_absence_is_one():
    wrong = Ask({"messages": []}, expects=400)
    with fake_openai(lambda body: Behaviour(status=200 if body["messages"] else 400)) as url:
        load = asyncio.run(one_by_one(Address.of(url), [wrong, Ask(ASK.body, expects=400)]))
    refused, taken = load.records()
    assert (refused.error, refused.complete) == (None, False)
    assert taken.error == "HTTP 200"


@pytest.mark.parametrize("url", ["", "localhost:8000", "ftp://x", "http://", "http://x:port", "http://[::1"])
def test_what_is_no_url_is_refused_with_an_example(url):
    with pytest.raises(UsageError, match="for example http://127.0.0.1:8000"):
        Address.of(url)


def test_urls_with_and_without_version_and_prefix():
    assert Address.of("http://h:1/v1/") == Address.of("http://h:1") == Address("h", 1, False, "")
    assert Address.of("https://h/proxy/v1") == Address("h", 443, True, "/proxy")
    assert Address.of("https://h/proxy").post("/v1/x", b"{}").startswith(b"POST /proxy/v1/x HTTP/1.1\r\nHost: h:443")


# --- asking ----------------------------------------------------------------------------------------------------------


@given(st.integers(0, 2**31), st.floats(0.5, 50), st.floats(0.1, 20))
def test_arrivals_are_in_order_in_time_and_the_same_for_a_seed(seed, rate, seconds):
    arrivals = poisson(rate, seconds, seed)
    assert arrivals == sorted(arrivals) == poisson(rate, seconds, seed)
    assert all(0 <= at < seconds for at in arrivals)


def test_arrivals_come_at_the_rate():
    assert len(poisson(rate=5.0, seconds=2000.0, seed=3)) == pytest.approx(10_000, rel=0.03)


def test_a_mix_is_the_same_for_a_seed_and_its_conversations_are_well_formed():
    mix = Mix(prompt_words=(12, 40), turns=(1, 3), max_tokens=(8, 16))
    asks = list(islice(mix.asks(5), 60))
    assert asks == list(islice(mix.asks(5), 60)) != list(islice(mix.asks(6), 60))
    for ask in asks:
        roles = [message["role"] for message in ask.body["messages"]]
        assert roles == ["user", "assistant", "user", "assistant", "user"][-len(roles) :]
        assert len(roles) in (1, 5)
        assert ask.body["max_tokens"] in (8, 16)
        assert json.loads(ask.encoded())["stream"] is True


def test_an_open_loop_does_not_wait_and_counts_from_the_scheduled_time():
    with fake_openai(obedient(pause_s=0.05)) as url:
        began = time.monotonic()
        load = asyncio.run(open_loop(Address.of(url), [ASK] * 20, [0.0] * 10 + [0.1] * 10))
        assert time.monotonic() - began < 3  # one after the other: 4 s
    records = load.records()
    assert len(records) == 20
    assert {round(r.scheduled - records[0].scheduled, 3) for r in records} == {0.0, 0.1}
    assert all(r.sent >= r.scheduled and r.first_token_s >= 0.05 for r in records)
    assert load.cpu_s > 0


def test_a_request_that_is_sent_late_has_waited_since_it_was_due():
    with fake_openai(obedient()) as url:
        trace = asyncio.run(send(Address.of(url), ASK, scheduled=time.monotonic() - 3.0))
    assert trace.record().first_token_s > 3.0


def test_users_of_a_closed_loop_wait_for_their_reply_and_begin_nothing_after_its_time():
    with fake_openai(obedient(pause_s=0.01)) as url:
        scripts = [script_of([ASK] * 100) for _ in range(3)]
        records = asyncio.run(closed_loop(Address.of(url), scripts, seconds=0.3, think_s=0.02)).records()
    assert {r.user for r in records} == {0, 1, 2}
    assert all(r.complete for r in records)
    for who in range(3):
        own = [r for r in records if r.user == who]
        assert 1 <= len(own) <= 6
        assert all(b.scheduled - a.ended >= 0.02 for a, b in pairwise(own))


def test_a_script_hears_the_reply_before_it_asks_again():
    def conversation():
        first = (yield ASK).record()
        yield Ask({**ASK.body, "seed": int(first.text.split()[-1])})

    with fake_openai(obedient()) as url:
        texts = [r.text for r in asyncio.run(closed_loop(Address.of(url), [conversation()])).records()]
    assert texts == [" 7 8 9 10", " 10 11 12 13"]


# --- figures ---------------------------------------------------------------------------------------------------------


@given(st.lists(st.tuples(st.floats(-9, 9), st.integers(0, 5)), max_size=20), st.floats(0.1, 100))
def test_a_weighted_percentile_is_the_nearest_rank_of_the_values_written_out(values, percent):
    written = sorted(value for value, weight in values for _ in range(weight))
    expected = written[max(1, math.ceil(len(written) * percent / 100 - 1e-9)) - 1] if written else None
    assert percentile(values, percent) == expected


@given(st.lists(st.integers(1, 30), min_size=1, max_size=20), st.integers(0, 200))
def test_tokens_are_shared_among_chunks_without_loss(lengths, tokens):
    shares = tokens_of_chunks(lengths, tokens)
    assert sum(shares) == pytest.approx(tokens)
    assert min(shares) >= min(1.0, tokens / len(lengths)) - 1e-9
    if tokens == len(lengths):
        assert shares == [1.0] * tokens


def test_a_chunk_of_several_tokens_counts_as_as_many_gaps():
    read = record([0.0, 1.0, 4.0, 4.0], tokens=[1.0, 1.0, 2.0, 1.0])  # the last two in one portion
    assert chunk_gaps([read]) == [(1.0, 1.0), (3.0, 1.0)]
    assert token_gaps([read]) == [(1.0, 1.0), (1.0, 3.0)]


def test_the_steady_window_is_when_every_user_has_a_reply():
    fast = [record([1.0, 2.0, 3.0], who=0), record([4.0, 5.0, 6.0], who=0)]
    slow = [record([2.5, 4.5, 5.5], who=1)]
    assert steady_window(fast + slow) == (2.5, 5.5)
    assert steady_tok_per_s([fast + slow]) == pytest.approx(5 / 3.0)  # at 3, 4, 4.5, 5 and 5.5
    assert steady_window([record([1.0, 2.0], who=0), record([3.0, 4.0], who=1)]) is None
    assert steady_window([*fast, record([], who=1)]) is None
    assert steady_tok_per_s([[]]) is None


def test_replies_that_are_not_complete_are_never_the_same():
    same, other, none = record([1.0], text="a"), record([2.0], text="b"), record([])
    assert differing([same, same, same], [same, other, none]) == [1, 2]
    with fake_openai(lambda _: Behaviour(texts=("a",), done=False)) as url:
        broken = asyncio.run(at_once(Address.of(url), [ASK])).records()
    assert differing(broken, broken) == [0]


@given(st.floats(-5, 5), st.integers(6, 60))
def test_growth_is_the_slope_after_the_warm_up(slope, samples):
    seconds = [float(n) for n in range(samples)]
    values = [1000.0 if at < (samples - 1) / 3 else slope * at for at in seconds]
    assert growth_per_minute(seconds, values) == pytest.approx(60 * slope, abs=1e-6)
    assert growth_per_minute(seconds[:1], values[:1]) == growth_per_minute([], []) == 0.0


def test_a_report_is_json_and_reads_as_a_table():
    with fake_openai(obedient(pause_s=0.002)) as url:
        load = asyncio.run(at_once(Address.of(url), [ASK] * 8))
    figures = json.loads(json.dumps(report([load.records()], load.cpu_s)))
    assert (figures["requests"], figures["completed"], figures["errors"]) == (8, 8, {})
    assert (figures["tokens"], figures["tokens_per_chunk"], figures["tokens_counted_by"]) == (32, 1.0, ["usage"])
    assert figures["first_token_ms"]["p50"] <= figures["first_token_ms"]["p99"]
    assert figures["tok_per_s"] > 0
    assert "8 sent, 0 left by their client, no errors" in report_lines(figures)[0].beside
    assert len(report_lines(report([[]], 0.0))) == 6
