"""The engine: cached generation, tool calls, text pieces, ends, continuation from anywhere, many replies at once."""

import queue
import threading
import time

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nanochat_ray.engine import engine as engine_module
from nanochat_ray.engine.engine import Engine
from nanochat_ray.engine.reply import MAX_TOOL_CALLS, ToolCall
from nanochat_ray.engine.sampler import SamplingParams
from nanochat_ray.engine.text import Detokenizer, StopFinder
from nanochat_ray.engine.worker import Busy, EngineThread
from nanochat_ray.errors import UserError
from tests.fakes import CRASH, ByteTokenizer, ScriptedModel, script, tiny_model

TOKENIZER = ByteTokenizer()
END = TOKENIZER.special("assistant_end")
GREEDY = SamplingParams(temperature=0.0)


def prompt(question: str) -> list[int]:
    special = TOKENIZER.special
    return [
        TOKENIZER.bos,
        special("user_start"),
        *question.encode(),
        special("user_end"),
        special("assistant_start"),
    ]


def scripted(*parts: str | int, **options) -> Engine:
    ids = [i for part in parts for i in ([part] if isinstance(part, int) else script(part))]
    return Engine(ScriptedModel({"": ids}, **options), TOKENIZER)


def text(pieces) -> str:
    return "".join(piece.text for piece in pieces)


def tokens(pieces) -> list[int]:
    return [token for piece in pieces for token in piece.tokens]


# --- text ------------------------------------------------------------------------------------------------------------


@given(st.text(max_size=40))
def test_text_comes_out_whole_and_no_piece_holds_half_a_character(original):
    detokenizer = Detokenizer(TOKENIZER.decode_bytes)
    pieces = [detokenizer.push(token) for token in original.encode()]
    assert "".join(pieces) + detokenizer.flush() == original
    assert "\ufffd" not in "".join(pieces) or "\ufffd" in original


def test_bytes_that_never_become_a_character_are_shown_as_such():
    detokenizer = Detokenizer(TOKENIZER.decode_bytes)
    assert detokenizer.push(0xF0) + detokenizer.push(0x9F) == ""
    assert detokenizer.flush() == "\ufffd"


@given(st.lists(st.text("ab", max_size=4), max_size=12), st.lists(st.text("ab", min_size=1, max_size=4), max_size=4))
def test_text_is_shown_up_to_the_first_stop_string_however_it_is_cut(portions, stops):
    finder, shown, stopped = StopFinder(stops), "", False
    for portion in portions:
        more, stopped = finder.push(portion)
        shown += more
        if stopped:
            break
    shown += "" if stopped else finder.flush()
    whole = "".join(portions)
    found = [at for stop in stops if (at := whole.find(stop)) >= 0]
    assert stopped == bool(found)
    # Of two overlapping stop strings the one that is complete first counts; it may have begun later.
    ends = [whole.find(stop) + len(stop) for stop in stops if stop in whole]
    assert shown == whole if not found else min(found) <= len(shown) < min(ends)


# --- the model under it ----------------------------------------------------------------------------------------------


def test_cached_generation_is_what_the_model_says_without_a_cache():
    model, ids = tiny_model(), prompt("hello")
    generated = tokens(Engine(model, TOKENIZER).stream(ids, SamplingParams(temperature=0.0, max_tokens=30)))
    with torch.inference_mode():
        for token in generated:
            assert int(model(torch.tensor([ids]))[0, -1].argmax()) == token
            ids.append(token)
            if ids[-1] in (END, TOKENIZER.bos):
                break


@pytest.mark.parametrize("chunk", [1, 3, 7])
def test_the_reply_does_not_depend_on_how_the_prompt_is_cut_for_prefill(monkeypatch, chunk):
    engine, params = Engine(tiny_model(), TOKENIZER), SamplingParams(temperature=1.0, seed=5, max_tokens=20)
    whole = tokens(engine.stream(prompt("a longer question"), params))
    monkeypatch.setattr(engine_module, "PREFILL_CHUNK", chunk)
    assert tokens(engine.stream(prompt("a longer question"), params)) == whole


@settings(max_examples=15)
@given(st.integers(0, 2**32), st.data())
def test_a_reply_continued_from_any_token_is_the_same_reply(seed, data):
    engine, params = Engine(MODEL, TOKENIZER), SamplingParams(temperature=1.0, top_k=None, seed=seed, max_tokens=24)
    pieces = list(engine.stream(prompt("hi"), params))
    reply = tokens(pieces)
    cut = data.draw(st.integers(0, len(reply) - 1))
    rest = SamplingParams(temperature=1.0, top_k=None, seed=seed, max_tokens=24 - cut)
    assert tokens(engine.stream(prompt("hi") + reply[:cut], rest)) == reply[cut:]


MODEL = tiny_model()


@pytest.mark.parametrize("cut", range(31))
def test_a_reply_with_a_tool_call_is_continued_from_any_token_with_the_same_text(cut):
    engine = scripted("Grüße: ", "=12*7", " is it. STOP here")
    params = SamplingParams(temperature=0.0, stop=("STOP",))
    pieces = list(engine.stream(prompt("q"), params))
    reply = tokens(pieces)
    assert len(reply) == 31
    rest = list(engine.stream(prompt("q") + reply[:cut], params))
    assert tokens(rest) == reply[cut:]
    assert text(pieces).endswith(text(rest))
    assert text(pieces) == "Grüße:  is it. "


def test_replies_differ_by_seed():
    engine = Engine(MODEL, TOKENIZER)
    replies = {tuple(tokens(engine.stream(prompt("hi"), SamplingParams(seed=seed, max_tokens=8)))) for seed in range(5)}
    assert len(replies) == 5


# --- tools -----------------------------------------------------------------------------------------------------------


def test_a_tool_call_is_run_and_its_result_is_forced_into_the_sequence():
    pieces = list(scripted("It is ", "=17*23", ".").stream(prompt("q"), GREEDY))
    assert [piece.tool for piece in pieces if piece.tool] == [ToolCall(), ToolCall("17*23", "391")]
    assert text(pieces) == "It is ."
    assert tokens(pieces) == [*script("It is ", "=17*23", "."), END]


def test_the_model_reads_a_tool_result_in_one_step():
    engine = scripted("=17*23")
    pieces = list(engine.stream(prompt("q"), GREEDY))
    sampled = len("17*23") + 3  # python_start, the expression, python_end, assistant_end
    assert engine.model.steps == sampled
    assert len(tokens(pieces)) == sampled + len("391") + 2


def test_an_expression_that_cannot_be_computed_gives_the_model_an_error_to_read():
    pieces = list(scripted("=9**9**9", "Too big.").stream(prompt("q"), GREEDY))
    assert ToolCall("9**9**9", "error: too large") in [piece.tool for piece in pieces]
    assert text(pieces) == "Too big."


def test_endless_tool_calls_come_to_an_end():
    pieces = list(scripted(*["=1+1"] * (MAX_TOOL_CALLS + 5)).stream(prompt("q"), SamplingParams(max_tokens=2000)))
    assert pieces[-1].finish == "tool_limit"
    assert sum(piece.tool == ToolCall("1+1", "2") for piece in pieces) == MAX_TOOL_CALLS


@pytest.mark.parametrize("name", ["bos", "user_start", "user_end", "assistant_start", "output_start", "python_end"])
def test_a_special_token_out_of_place_ends_the_reply(name):
    pieces = list(scripted("ok", TOKENIZER.special(name), "more").stream(prompt("q"), GREEDY))
    assert text(pieces) == "ok"
    assert pieces[-1].finish == "stop"


# --- ends ------------------------------------------------------------------------------------------------------------


def test_max_tokens_ends_a_reply_with_the_text_that_was_held_back():
    pieces = list(scripted("abcSTabc").stream(prompt("q"), SamplingParams(max_tokens=5, stop=("STOP",))))
    assert text(pieces) == "abcST"
    assert pieces[-1].finish == "length"


def test_max_tokens_counts_tool_results_too():
    pieces = list(scripted("=2*3", "after").stream(prompt("q"), SamplingParams(max_tokens=6)))
    assert len(tokens(pieces)) == 6
    assert pieces[-1].finish == "length"


def test_generation_ends_when_the_context_is_full():
    pieces = list(scripted("x" * 50, context=20).stream(prompt("12345"), GREEDY))
    assert len(prompt("12345")) + len(tokens(pieces)) == 20
    assert pieces[-1].finish == "length"


def test_a_prompt_that_fills_the_context_is_refused_with_both_numbers():
    engine = scripted("x", context=20)
    assert engine.start(prompt("x" * 15), GREEDY).prompt_tokens == 19
    with pytest.raises(UserError, match=r"20 tokens.*context is 20"):
        engine.start(prompt("x" * 16), GREEDY)
    with pytest.raises(UserError, match="empty"):
        engine.start([], GREEDY)


# --- many at once ----------------------------------------------------------------------------------------------------


class Collected:
    """One reply's pieces, with the order in which all replies got theirs."""

    def __init__(self, name: str, order: list[str]) -> None:
        self.name, self.order, self.pieces = name, order, []
        self.done: queue.Queue = queue.Queue()

    def __call__(self, outcome) -> None:
        if isinstance(outcome, Exception):
            self.done.put(outcome)
            return
        self.pieces += outcome
        self.order.append(self.name)
        if outcome and outcome[-1].finish:
            self.done.put(None)


@pytest.fixture
def threads():
    started: list[EngineThread] = []

    def start(engine: Engine, **options) -> EngineThread:
        started.append(EngineThread(engine, **options))
        return started[-1]

    yield start
    for thread in started:
        thread.close()


def test_interleaved_replies_are_the_replies_of_each_alone(threads):
    engine = Engine(MODEL, TOKENIZER)
    wanted = [SamplingParams(temperature=1.0, seed=seed, max_tokens=20) for seed in range(4)]
    alone = [tokens(engine.stream(prompt(f"q{i}"), params)) for i, params in enumerate(wanted)]
    thread, order = threads(engine), []
    collected = [Collected(str(i), order) for i in range(4)]
    for i, params in enumerate(wanted):
        thread.submit(prompt(f"q{i}"), params, collected[i])
    for one in collected:
        assert one.done.get(timeout=20) is None
    assert [tokens(one.pieces) for one in collected] == alone


def test_replies_take_turns(threads):
    gate = threading.Event()
    engine = scripted("x" * 30)
    extend = engine.model.extend
    engine.model.extend = lambda *args: gate.wait(10) and extend(*args)
    thread, order = threads(engine), []
    collected = [Collected(name, order) for name in "abc"]
    for one in collected:
        thread.submit(prompt("q"), GREEDY, one)
    gate.set()
    for one in collected:
        one.done.get(timeout=20)
    assert all(set(order[i : i + 3]) == set("abc") for i in range(0, 90, 3))


def test_a_cancelled_reply_gets_no_further_step_and_frees_its_cache(threads):
    engine = scripted("x" * 1000, seconds_per_step=0.002)
    thread, one = threads(engine), Collected("a", [])
    ticket = thread.submit(prompt("q"), SamplingParams(max_tokens=1000), one)
    while len(one.pieces) < 3:
        time.sleep(0.001)
    thread.cancel(ticket)
    deadline = time.monotonic() + 5
    while thread.active and time.monotonic() < deadline:
        time.sleep(0.001)
    steps = engine.model.steps
    time.sleep(0.05)
    assert engine.model.steps == steps < 100
    assert ticket.generation._cache is None
    assert thread.counters.cancelled == 1


def test_too_many_replies_are_refused_before_anything_begins(threads):
    thread = threads(scripted("x" * 500, seconds_per_step=0.005), max_replies=2)
    tickets = [thread.submit(prompt("q"), GREEDY, Collected("a", [])) for _ in range(2)]
    with pytest.raises(Busy, match="2 replies"):
        thread.submit(prompt("q"), GREEDY, Collected("a", []))
    for ticket in tickets:
        thread.cancel(ticket)
    deadline = time.monotonic() + 5
    while thread.active and time.monotonic() < deadline:
        time.sleep(0.001)
    thread.submit(prompt("q"), GREEDY, Collected("a", []))
    assert thread.counters.refused == 1


def test_a_model_that_fails_fails_one_reply_and_the_others_go_on(threads):
    scripts = {"bad": [*script("ab"), CRASH], "": script("fine " * 5)}
    thread = threads(Engine(ScriptedModel(scripts), TOKENIZER))
    bad, good = Collected("bad", []), Collected("good", [])
    thread.submit(prompt("bad"), GREEDY, bad)
    thread.submit(prompt("good"), GREEDY, good)
    assert isinstance(bad.done.get(timeout=10), RuntimeError)
    assert good.done.get(timeout=10) is None
    assert text(good.pieces) == "fine " * 5
    assert text(bad.pieces) == "ab"
    assert thread.healthy()
    assert (thread.counters.failed, thread.counters.completed) == (1, 1)
