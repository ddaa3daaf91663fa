"""A head start changes who makes the first items of a sequence, and nothing else."""

import threading
import time
from itertools import count, islice

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nanochat_ray.stream.head_start import with_head_start


@given(length=st.integers(0, 30), slow=st.integers(0, 30), pause=st.sampled_from([0.0, 0.0005]))
def test_the_sequence_is_the_pipelines_whenever_that_catches_up(length, slow, pause):
    def pipeline():
        for item in range(length):
            if item < slow:
                time.sleep(pause)
            yield item

    got = list(islice(with_head_start(pipeline(), count()), length))
    assert got == list(range(length))


def test_local_items_are_taken_until_the_pipeline_has_caught_up_and_none_after():
    gate, made = threading.Event(), []

    def local():
        for item in count():
            made.append(item)
            time.sleep(0.0005)
            yield item

    def pipeline():
        gate.wait(10)
        yield from range(1000)

    items = with_head_start(pipeline(), local())
    assert list(islice(items, 5)) == [0, 1, 2, 3, 4]
    assert made == [0, 1, 2, 3, 4]
    gate.set()
    got = list(islice(items, 900))
    assert got == list(range(5, 905))
    assert len(made) < 900


def test_the_end_of_the_pipeline_is_the_end():
    assert list(with_head_start(iter(()), iter(()))) == []
    assert list(with_head_start(iter([7]), iter([7]))) == [7]


def test_what_the_pipeline_raises_is_raised():
    def broken():
        yield 0
        raise ValueError("a damaged shard")

    items = with_head_start(broken(), count())
    with pytest.raises(ValueError, match="a damaged shard"):
        list(islice(items, 10**6))
