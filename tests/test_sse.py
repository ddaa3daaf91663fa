"""Server-sent events: what is framed is parsed back, however the bytes are cut."""

import itertools
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nanochat_ray.serve.sse import DONE, KEEP_ALIVE, Comment, Event, Parser, frame, state_comment

values = st.dictionaries(st.text(max_size=5), st.text(max_size=20), max_size=3)
ids = st.none() | st.from_regex(r"[0-9a-z.-]{1,9}", fullmatch=True)
cuttings = st.lists(st.integers(0, 300), max_size=10)


def parse(data: bytes, cuts: list[int]) -> list[Event | Comment]:
    edges = [0, *sorted(min(cut, len(data)) for cut in cuts), len(data)]
    parser = Parser()
    return [item for a, b in itertools.pairwise(edges) for item in parser.push(data[a:b])]


@given(st.lists(st.tuples(values, ids, st.none() | values), max_size=5), cuttings)
def test_events_ids_and_states_survive_any_cutting_of_the_bytes(sent, cuts):
    frames, expected, last_id = b"", [], ""
    for value, event_id, state in sent:
        if state is not None:
            frames += state_comment(state) + KEEP_ALIVE
            expected += [state, None]
        frames += frame(value, event_id)
        last_id = event_id or last_id
        expected.append((value, last_id))
    items = parse(frames + DONE, cuts)
    assert items[-1] == Event("[DONE]", last_id)
    read = [(json.loads(item.data), item.last_id) if isinstance(item, Event) else item.state for item in items[:-1]]
    assert read == expected


@given(cuttings)
def test_the_whole_format_is_understood_however_it_is_cut(cuts):
    data = (
        "\ufeffdata: ü\r\n\r\n: comment\n:\ndata:a\ndata: b\nid: 7\n\nevent: x\rdata\rdata:  two\r\r\n"
        "id: a\0b\nid\ndata: x\n\nid: 8\n\ndata: y\n\ndata: cut off"
    ).encode()
    comments = [Comment("comment"), Comment("")]
    assert parse(data, cuts) == [
        Event("ü"), *comments, Event("a\nb", "7"), Event("\n two", "7"), Event("x"), Event("y", "8")
    ]  # fmt: skip


def test_a_frame_is_one_line_of_data_behind_its_id():
    assert frame({"a": "x\ny\u2028🙂"}) == '{"a":"x\\ny\u2028🙂"}'.join(["data: ", "\n\n"]).encode()
    assert frame({}, "7-1") == b"id: 7-1\ndata: {}\n\n"


def test_only_comments_of_ours_are_states():
    assert Comment('state {"state":"queued","ahead":3}').state == {"state": "queued", "ahead": 3}
    assert [Comment(text).state for text in ("", "hello", "state", "state {", "state [1]")] == [None] * 5


@given(st.binary(max_size=80))
def test_no_bytes_make_it_fail(data):
    assert all(isinstance(item, (Event, Comment)) for item in Parser().push(data))


@pytest.mark.parametrize("end", [b"\n", b"\r\n", b"\r"])
def test_each_line_end_works_byte_by_byte(end):
    parser = Parser()
    data = b"data: x" + end + end + b"data: y" + end + end + b":"
    assert [item for byte in data for item in parser.push(bytes([byte]))] == [Event("x"), Event("y")]
