"""A run ends when groups of workers fail again and again at one step, and never because machines were lost."""

import pytest

from nanochat_ray.train.restarts import why_to_give_up


def starts(*steps: int, attempt: str = "now", machines: tuple[str, ...] = ("a", "b")) -> list[dict]:
    return [{"kind": "start", "attempt": attempt, "step": step, "machines": [*machines]} for step in steps]


def judged(events: list[dict], error: str = "KeyError: 3", usable: set[str] = frozenset("abc")) -> str | None:
    return why_to_give_up(events, "now", 40, error, lambda: usable)


def test_the_third_failure_at_a_step_ends_the_run_with_the_last_error():
    assert judged(starts(0, 40, 40), "KeyError: 3") is None
    said = "the workers failed 3 times at step 40; the last error: KeyError: 3"
    assert judged(starts(0, 40, 40, 40), "KeyError: 3") == said


@pytest.mark.parametrize("events", [starts(10, 20, 30, 40), starts(*[40] * 9, attempt="before"), starts(), []])
def test_progress_and_earlier_attempts_do_not_count(events):
    assert judged(events, "KeyError: 3") is None


def test_lost_machines_restart_a_run_for_ever():
    lost = starts(*[40] * 20, machines=("a", "gone"))
    assert judged(lost) is None
    assert judged([*lost, *starts(40, 40)]) is None
    assert judged([*lost, *starts(40, 40, 40)]) is not None


def test_the_machines_are_looked_at_only_when_it_matters():
    def must_not_be_asked():
        raise AssertionError

    assert why_to_give_up(starts(40, 40), "now", 40, "KeyError: 3", must_not_be_asked) is None
