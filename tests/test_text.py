"""Text while it arrives: whole characters, and nothing from behind a stop string."""

from hypothesis import given
from hypothesis import strategies as st

from nanochat_ray.engine.text import Detokenizer, StopFinder
from tests.fakes import ByteTokenizer

TOKENIZER = ByteTokenizer()


@given(st.text(max_size=40))
def test_text_comes_out_whole_and_no_piece_holds_half_a_character(original):
    detokenizer = Detokenizer(TOKENIZER.decode_bytes)
    pieces = [detokenizer.push(token) for token in original.encode()]
    assert "".join(pieces) + detokenizer.flush() == original
    assert "\ufffd" not in "".join(pieces) or "\ufffd" in original


@given(st.binary(max_size=12))
def test_any_bytes_come_out_as_python_decodes_them_together(whole):
    detokenizer = Detokenizer(TOKENIZER.decode_bytes)
    pieces = [detokenizer.push(token) for token in whole]
    assert "".join(pieces) + detokenizer.flush() == whole.decode(errors="replace")
    assert detokenizer.flush() == ""


def test_bytes_that_never_become_a_character_are_shown_as_such():
    detokenizer = Detokenizer(TOKENIZER.decode_bytes)
    assert detokenizer.push(0xF0) + detokenizer.push(0x9F) == ""
    assert detokenizer.flush() == "\ufffd"


def test_tokens_without_text_add_none():
    detokenizer = Detokenizer(TOKENIZER.decode_bytes)
    assert detokenizer.push(TOKENIZER.special("python_start")) == ""


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


@given(st.text("abc", max_size=30), st.lists(st.text("ab", min_size=1, max_size=5), max_size=4))
def test_no_more_is_held_back_than_may_begin_a_stop_string(text, stops):
    finder, shown = StopFinder(stops), ""
    for end, letter in enumerate(text, 1):
        more, stopped = finder.push(letter)
        if stopped:
            return
        shown += more
        held = text[len(shown) : end]
        assert held == "" or any(stop.startswith(held) for stop in stops)
