"""Server-sent events: what is framed is parsed back, however the bytes are cut."""

import itertools
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nanochat_ray.serve.sse import DONE, Parser, frame

values = st.dictionaries(st.text(max_size=5), st.text(max_size=20), max_size=3)


def parse(data: bytes, cuts: list[int]) -> list[str]:
    edges = [0, *sorted(min(cut, len(data)) for cut in cuts), len(data)]
    parser = Parser()
    return [event for a, b in itertools.pairwise(edges) for event in parser.push(data[a:b])]


@given(st.lists(values, max_size=5), st.lists(st.integers(0, 300), max_size=10))
def test_events_survive_any_cutting_of_the_bytes(objects, cuts):
    events = parse(b"".join(map(frame, objects)) + DONE, cuts)
    assert [json.loads(event) for event in events[:-1]] == objects
    assert events[-1] == "[DONE]"


@given(st.lists(st.integers(0, 80), max_size=10))
def test_the_whole_format_is_understood_however_it_is_cut(cuts):
    data = "\ufeffdata: ü\r\n\r\n: comment\ndata:a\ndata: b\n\nevent: x\rdata\rdata:  two\r\r\n\ndata: cut off".encode()
    assert parse(data, cuts) == ["ü", "a\nb", "\n two"]


def test_a_frame_is_one_line_of_data():
    assert frame({"a": "x\ny\u2028🙂"}) == '{"a":"x\\ny\u2028🙂"}'.join(["data: ", "\n\n"]).encode()


@given(st.binary(max_size=80))
def test_no_bytes_make_it_fail(data):
    assert all(isinstance(event, str) for event in Parser().push(data))


@pytest.mark.parametrize("end", [b"\n", b"\r\n", b"\r"])
def test_each_line_end_works_byte_by_byte(end):
    parser = Parser()
    events = [e for byte in b"data: x" + end + end + b"data: y" + end + end + b":" for e in parser.push(bytes([byte]))]
    assert events == ["x", "y"]
