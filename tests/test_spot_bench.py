"""What the benchmarks of spot machines do and say, with machines and runs that are only written down."""

import itertools

import pytest

from nanochat_ray.bench import recovery_bench, spot_bench
from nanochat_ray.bench.recovery_bench import GOES_ON, RAY_DEFAULTS_S, _Observed, recovery_lines
from nanochat_ray.bench.spot_bench import NOTICE_S, act_out, figures_of, spot_lines
from nanochat_ray.plan.spot import Change
from nanochat_ray.train.ledger import Label, Ledger


class Clock:
    def __init__(self, monkeypatch, *modules):
        self.now = 1000.0
        for module in modules:
            monkeypatch.setattr(module.time, "monotonic", lambda: self.now)
            monkeypatch.setattr(module.time, "sleep", self.sleep)

    def sleep(self, seconds):
        assert seconds >= 0
        self.now += seconds


class Machines:
    """A cluster that writes down what is done to it, and when."""

    def __init__(self, clock, number):
        self.clock, self.names, self.done = clock, itertools.count(), []
        self.machines = [next(self.names) for _ in range(number)]

    def add(self):
        self.machines.append(next(self.names))
        self.note("add", self.machines[-1])

    def kill(self, machine):
        self.machines.remove(machine)
        self.note("kill", machine)

    def drain(self, machine, notice_s):
        assert notice_s == NOTICE_S
        self.note("drain", machine)

    def note(self, what, machine):
        self.done.append((round(self.clock.now - 1000.0), what, machine))


def test_changes_happen_at_their_times_and_who_had_notice_is_taken_when_that_is_over(monkeypatch):
    clock = Clock(monkeypatch, spot_bench)
    cluster = Machines(clock, 2)
    act_out(cluster, [Change(10, "drain", 1), Change(15, "kill", 1), Change(30, "add", 2), Change(99, "kill", 1)], 60)
    assert cluster.done == [
        (10, "drain", 0),
        (15, "kill", 1),  # not the one that goes anyway
        (22, "kill", 0),
        (30, "add", 2),
        (30, "add", 3),
    ]
    assert clock.now == 1060.0


def start(time, workers, step, **more):
    return {"kind": "start", "time": time, "attempt": "a", "workers": workers, "step": step, "entered": time, **more}


def steps(times, first, workers):
    return [
        {"kind": "step", "time": time, "step": step, "seconds": 1.0, "workers": workers, "last_row": [0, step, 3]}
        for step, time in enumerate(times, start=first)
    ]


HISTORY = [
    start(0.0, 2, 0, attempt_began=-10.0),
    *steps([1, 2, 3, 4], 0, 2),
    {"kind": "leave", "time": 5.0, "step": 4, "workers": 2, "why": "growth"},
    start(8.0, 3, 4),
    *steps([9, 10], 4, 3),
]


def test_the_figures_of_a_replay_count_what_was_useful_and_what_is_wrong_in_the_history():
    ledger = Ledger(HISTORY)
    ledger.close(14.0, Label.RESTART)
    figures = figures_of(ledger, HISTORY, [Change(20, "add", 1), Change(50, "kill", 1), Change(50, "drain", 1)])
    assert (figures["changes"], figures["median_interval_s"]) == (3, 25.0)
    assert figures["goodput"] == pytest.approx(14 / 57)  # 15 s of two workers, 9 s of three
    assert figures["recoveries_s"] == {"grown": {"events": 1, "median": 5.0, "p90": 5.0}}
    assert (figures["rows_out_of_order"], figures["steps_missing"], figures["steps"]) == (0, 0, 6)
    broken = [event for event in HISTORY if event.get("step") != 2 or event["kind"] != "step"]
    broken[-1] = {**broken[-1], "last_row": [0, 1, 3]}
    figures = figures_of(Ledger(broken), broken, [])
    assert (figures["rows_out_of_order"], figures["steps_missing"]) == (1, 1)
    assert any("goal 80 %" in line.beside for line in spot_lines(figures | {"median_interval_s": 60.0}))


def test_the_time_after_the_last_event_is_accounted_for():
    ledger = Ledger(HISTORY)
    before = ledger.totals()[Label.WAITING_FOR_CAPACITY]
    ledger.close(14.0, Label.WAITING_FOR_CAPACITY)
    assert ledger.totals()[Label.WAITING_FOR_CAPACITY] == pytest.approx(before + 4 * 3)


class Run:
    """A run whose events are all there already."""

    def events(self, *kinds):
        return [event for event in HISTORY if not kinds or event["kind"] in kinds]

    def wait_for_step(self, wanted):
        pass


def test_a_standstill_lasts_from_the_last_step_before_to_the_first_step_after(monkeypatch):
    Clock(monkeypatch, recovery_bench)
    observed = _Observed(Run())
    observed.note("noticed", None, workers=3)
    observed.note("killed", 4.5, workers=3)
    observed.note("added", 1.5, workers=3)
    figures = observed.figures()
    assert {kind: seen["median_s"] for kind, seen in figures.items()} == {"noticed": 5.0, "killed": 4.5, "added": 7.5}
    assert figures["added"]["phases_s"][GOES_ON] == pytest.approx(2.5)
    for seen in figures.values():
        assert sum(seen["phases_s"].values()) == pytest.approx(seen["median_s"])
    lines = recovery_lines({"events": figures, "steps_repeated": 7})
    assert any(f"{RAY_DEFAULTS_S['killed']:g} s in a trial" in line.beside for line in lines)
