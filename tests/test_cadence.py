"""How often to save: the interval grows with the cost and with the time between failures, within bounds."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nanochat_ray.train.cadence import (
    LEAST_S,
    MOST_S,
    PRIOR_FAILURES,
    PRIOR_S,
    checkpoint_interval_s,
    mean_time_between_failures_s,
)

UNSEEN_S = mean_time_between_failures_s([])  # what is assumed of machines that have not been seen
seconds = st.floats(0.0, 1e6)


@given(seconds, seconds, seconds, seconds)
def test_the_interval_grows_with_cost_and_reliability_within_bounds(stall, more_stall, mtbf, more_mtbf):
    interval = checkpoint_interval_s(stall, mtbf)
    assert LEAST_S <= interval <= MOST_S
    assert checkpoint_interval_s(stall + more_stall, mtbf + more_mtbf) >= interval


@given(st.floats(0.01, 10.0), st.floats(1e3, 1e5))
def test_no_other_interval_within_the_bounds_loses_less(stall, mtbf):
    """To first order the time lost per second is stall / interval for saving and interval / 2 / mtbf for repeating."""

    def lost(interval):
        return stall / interval + interval / 2 / mtbf

    best = checkpoint_interval_s(stall, mtbf)
    for other in (LEAST_S, best * 0.9, best * 1.1, MOST_S):
        assert lost(best) <= lost(min(max(other, LEAST_S), MOST_S)) * (1 + 1e-9)


def test_the_first_checkpoint_comes_soon_because_its_cost_is_not_known():
    assert checkpoint_interval_s(None, UNSEEN_S) == LEAST_S


def test_a_stall_of_a_tenth_of_a_second_on_machines_not_seen_to_fail_is_worth_a_minute():
    assert checkpoint_interval_s(0.1, UNSEEN_S) == pytest.approx(math.sqrt(2 * 0.1 * 6 * 3600))  # 66 s


def test_two_failures_in_ten_minutes_outweigh_what_was_assumed():
    history = [event("start", at, "a") for at in (0, 300, 600)]
    assert mean_time_between_failures_s(history) < 0.1 * UNSEEN_S


def event(kind, time, attempt=None):
    return {"kind": kind, "time": time, "step": 0, **({"attempt": attempt} if attempt else {})}


def test_only_starts_that_follow_neither_a_leave_nor_an_end_are_failures():
    history = [
        event("start", 0, "a"),
        event("step", 100),
        event("start", 110, "a"),  # a machine died
        event("leave", 200),
        event("start", 210, "a"),  # a notice, or a new machine
        event("finish", 300),
        event("start", 9000, "b"),  # the user came again
        event("start", 9100, "b"),  # a machine died
    ]
    assert mean_time_between_failures_s(history) == pytest.approx((PRIOR_S + 300 + 100) / (PRIOR_FAILURES + 2))


@given(st.lists(st.sampled_from(["start", "step", "leave", "finish", "eval"]), max_size=30))
def test_failures_are_those_that_a_plain_count_finds(kinds):
    history = [event(kind, 10.0 * n, "a" if kind == "start" else None) for n, kind in enumerate(kinds)]
    text = "".join({"start": "S", "leave": "E", "finish": "E"}.get(kind, "") for kind in kinds)
    failures = sum(text[n : n + 2] == "SS" for n in range(len(text)))
    first = kinds.index("start") if "start" in kinds else len(kinds) - 1
    span = 10.0 * max(0, len(kinds) - 1 - first)
    assert mean_time_between_failures_s(history) == pytest.approx((PRIOR_S + span) / (PRIOR_FAILURES + failures))


def test_a_run_from_before_attempts_were_recorded_counts_for_nothing():
    assert mean_time_between_failures_s([event("start", 0), event("start", 10), event("step", 20)]) == UNSEEN_S
