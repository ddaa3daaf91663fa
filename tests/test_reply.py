"""What a reply's tokens mean: calculator calls, the end, text that is held back, and the same again from any token."""

import numpy as np
import pytest

from nanochat_ray.engine.engine import Engine
from nanochat_ray.engine.reply import MAX_TOOL_CALLS, Piece, Reply, ToolCall
from nanochat_ray.engine.sampler import SamplingParams, TokenLogprob
from tests.fakes import ByteTokenizer, ScriptedModel, script, tiny_engine

TOKENIZER = ByteTokenizer()
END = TOKENIZER.special("assistant_end")
GREEDY = SamplingParams(temperature=0.0)


def prompt(question: str = "q") -> list[int]:
    special = TOKENIZER.special
    return [TOKENIZER.bos, special("user_start"), *question.encode(), special("user_end"), special("assistant_start")]


def scripted(*parts: str | int, **options) -> Engine:
    ids = [i for part in parts for i in ([part] if isinstance(part, int) else script(part))]
    return Engine(ScriptedModel({"": ids}, **options), TOKENIZER)


def text(pieces) -> str:
    return "".join(piece.text for piece in pieces)


def tokens(pieces) -> list[int]:
    return [token for piece in pieces for token in piece.tokens]


def test_a_reply_with_a_tool_call_is_continued_from_any_token_with_the_same_pieces():
    params = SamplingParams(temperature=0.0, stop=("STOP",), logprobs=1)
    parts = ("Grüße: ", "=12*7", " is it. STOP here")
    pieces = list(scripted(*parts).stream(prompt(), params))
    said = tokens(pieces)
    assert text(pieces) == "Grüße:  is it. "
    assert len(said) == len(pieces) == 31
    for cut in range(len(said)):
        assert list(scripted(*parts).stream(prompt(), params, said[:cut])) == pieces[cut:]


# --- tools -----------------------------------------------------------------------------------------------------------


def test_a_tool_call_is_run_and_its_result_is_forced_into_the_sequence():
    pieces = list(scripted("It is ", "=17*23", ".").stream(prompt(), GREEDY))
    assert [piece.tool for piece in pieces if piece.tool] == [ToolCall(), ToolCall("17*23", "391")]
    assert text(pieces) == "It is ."
    assert tokens(pieces) == [*script("It is ", "=17*23", "."), END]


def test_the_model_reads_a_tool_result_in_one_step():
    engine = scripted("=17*23")
    pieces = list(engine.stream(prompt(), GREEDY))
    sampled = len("17*23") + 3  # python_start, the expression, python_end, assistant_end
    assert engine.model.steps == sampled
    assert len(tokens(pieces)) == sampled + len("391") + 2


def test_a_tool_call_does_not_hold_up_the_replies_beside_it():
    scripts = {"sum": script("=2+2", "done"), "": script("x" * 20)}
    engine = Engine(ScriptedModel(scripts), TOKENIZER)
    caller, other = engine.add(prompt("sum"), GREEDY), engine.add(prompt("else"), GREEDY)
    pieces = {caller: [], other: []}
    while not caller.finished:
        for reply, outcome in engine.step():
            pieces[reply] += outcome
    sampled = len("2+2") + 2 + len("done") + 1
    assert engine.model.steps == sampled
    assert len(tokens(pieces[other])) == sampled, "the other reply missed a step"
    assert len(tokens(pieces[caller])) == sampled + len("4") + 2


def test_an_expression_that_cannot_be_computed_gives_the_model_an_error_to_read():
    pieces = list(scripted("=9**9**9", "Too big.").stream(prompt(), GREEDY))
    assert ToolCall("9**9**9", "error: too large") in [piece.tool for piece in pieces]
    assert text(pieces) == "Too big."


def test_endless_tool_calls_come_to_an_end():
    pieces = list(scripted(*["=1+1"] * (MAX_TOOL_CALLS + 5)).stream(prompt(), SamplingParams(max_tokens=2000)))
    assert pieces[-1].finish == "tool_limit"
    assert sum(piece.tool == ToolCall("1+1", "2") for piece in pieces) == MAX_TOOL_CALLS


def test_text_from_before_a_call_is_shown_before_the_call():
    pieces = list(scripted("abST", "=1+1", "OP").stream(prompt(), SamplingParams(stop=("STOP",))))
    at = next(i for i, piece in enumerate(pieces) if piece.tool)
    assert text(pieces[: at + 1]) == "abST"
    assert text(pieces) == "abSTOP"


@pytest.mark.parametrize("name", ["bos", "user_start", "user_end", "assistant_start", "output_start", "python_end"])
def test_a_special_token_out_of_place_ends_the_reply(name):
    pieces = list(scripted("ok", TOKENIZER.special(name), "more").stream(prompt(), GREEDY))
    assert text(pieces) == "ok"
    assert pieces[-1].finish == "stop"


def test_tokens_that_are_forced_can_only_be_these():
    reply = Reply(TOKENIZER)
    call = script("=6*7")
    for token in call[:5]:
        reply.push(token)
    assert reply.forced == call[5:]
    with pytest.raises(ValueError, match="was forced"):
        reply.replay([*call[5:7], END])


# --- ends ------------------------------------------------------------------------------------------------------------


def test_max_tokens_ends_a_reply_with_the_text_that_was_held_back():
    pieces = list(scripted("abcSTabc").stream(prompt(), SamplingParams(max_tokens=5, stop=("STOP",))))
    assert text(pieces) == "abcST"
    assert pieces[-1].finish == "length"


def test_max_tokens_counts_tool_results_too():
    pieces = list(scripted("=2*3", "after").stream(prompt(), SamplingParams(max_tokens=6)))
    assert len(tokens(pieces)) == 6
    assert pieces[-1].finish == "length"


def test_generation_ends_when_the_context_is_full():
    pieces = list(scripted("x" * 50, context=20).stream(prompt("12345"), GREEDY))
    assert len(prompt("12345")) + len(tokens(pieces)) == 20
    assert pieces[-1].finish == "length"


def test_half_a_character_at_the_end_is_shown_as_such():
    pieces = list(scripted("a🙂").stream(prompt(), SamplingParams(max_tokens=3)))
    assert text(pieces) == "a\ufffd"


# --- log-probabilities and penalties ---------------------------------------------------------------------------------


def test_sampled_tokens_have_log_probabilities_and_forced_ones_have_none():
    pieces = list(scripted("=2*3", ".").stream(prompt(), SamplingParams(logprobs=2)))
    forced = script("=2*3")[-3:]
    for piece in pieces:
        assert len(piece.tokens) == 1
        if piece.tokens[0] in forced:
            assert piece.logprobs == ()
        else:
            [logprob] = piece.logprobs
            assert (logprob.token, logprob.top[0]) == (piece.tokens[0], (piece.tokens[0], 0.0))
            assert len(logprob.top) == 2
    assert all(piece.logprobs == () for piece in scripted("ab").stream(prompt(), GREEDY))


def test_penalties_see_what_the_reply_has_already_and_log_probabilities_do_not_see_them():
    engine = tiny_engine()
    plain = tokens(engine.stream(prompt(), SamplingParams(temperature=0.0, max_tokens=30)))
    assert len(set(plain)) < len(plain), "this model does not repeat itself; choose another seed"
    penalised = SamplingParams(temperature=0.0, max_tokens=30, presence_penalty=2.0, frequency_penalty=2.0, logprobs=1)
    pieces = list(engine.stream(prompt(), penalised))
    assert max(np.bincount(tokens(pieces))) < max(np.bincount(plain))
    assert any(logprob.token != logprob.top[0][0] for piece in pieces for logprob in piece.logprobs)


def test_a_piece_keeps_the_log_probability_it_is_given():
    logprob = TokenLogprob(97, -0.5)
    assert Reply(TOKENIZER).push(97, (logprob,)) == Piece((97,), text="a", logprobs=(logprob,))
