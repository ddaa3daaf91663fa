"""The goodput ledger: every worker-second has one label, whatever the history of the run."""

from dataclasses import dataclass, field
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nanochat_ray.train.events import without_repeated
from nanochat_ray.train.ledger import Label, Ledger, Recovery

MODES = ("eager", "compiled")


def start(time, workers=2, step=0, attempt="a", **fields):
    return {"kind": "start", "time": time, "step": step, "workers": workers, "attempt": attempt, **fields}


def step(time, number, seconds, workers=2, **fields):
    return {"kind": "step", "time": time, "step": number, "seconds": seconds, "workers": workers, **fields}


def shown(ledger: Ledger) -> dict[str, float]:
    """The labels that took time."""
    return {label: pytest.approx(seconds) for label, seconds in ledger.totals().items() if seconds > 1e-6}


def test_a_calm_run_is_start_up_steps_data_wait_evaluation_and_stalls():
    ledger = Ledger(
        [
            start(110.0, attempt_began=100.0),
            {"kind": "eval", "time": 113.0, "step": 0, "seconds": 2.0},
            step(120.0, 0, seconds=6.0, data_wait_s=4.0),  # of the first step's wait the new readers are the cause
            step(124.0, 1, seconds=3.0, data_wait_s=0.5, stall_s=1.0),
            {"kind": "checkpoint", "time": 124.5, "step": 1, "stall_s": 1.0, "seconds": 9.0},
            step(127.0, 2, seconds=3.0),
            {"kind": "eval", "time": 129.0, "step": 3, "seconds": 1.5},
            {"kind": "samples", "time": 129.25, "step": 3, "samples": [], "seconds": 0.25},
            {"kind": "finish", "time": 130.25, "step": 3},
        ]
    )
    assert {label: seconds / 2 for label, seconds in ledger.totals().items() if seconds} == {
        "restart": 10 + 1 + 5,
        "evaluation": 2 + 1.5 + 0.25,
        "useful": 2 + 2.5 + 3,
        "data_wait": 0.5,
        "checkpoint_stall": 1 + 1,
        "other": 0.5,
    }
    assert ledger.goodput == pytest.approx(7.5 / 30.25)
    assert (ledger.steps_lost, ledger.restarts, ledger.recoveries) == (0, 0, [])


def test_a_killed_group_costs_its_lost_steps_the_wait_and_the_restart_at_the_size_that_follows():
    events = [
        start(10.0, workers=4, attempt_began=10.0),
        *(step(11.0 + n, n, seconds=1.0, workers=4) for n in range(8)),  # the checkpoint is of step 5
        start(48.0, workers=2, step=5, waited_for_capacity_s=20.0),
        step(50.0, 5, seconds=1.5, workers=2),
    ]
    ledger = Ledger([*without_repeated(events[:9], 5), *events[9:]])
    assert shown(ledger) == {
        "useful": 4 * 5 + 2 * 1.5,
        "repeated_work": 4 * 3,
        "waiting_for_capacity": 2 * 20,
        "restart": 2 * 10.5,
    }
    assert (ledger.steps_lost, ledger.restarts) == (3, 1)
    assert ledger.recoveries == [Recovery("killed", 32.0 - 20.0)]


def test_the_reason_of_a_recovery_is_told_from_how_the_group_ended_and_how_large_the_next_one_is():
    ledger = Ledger()
    for group, (workers, ends) in enumerate([(2, "leave"), (3, "leave"), (2, ""), (3, "leave"), (3, "finish")]):
        began = group * 100.0
        ledger.add(start(began + 10, workers, step=group))
        ledger.add(step(began + 20, group, seconds=1.0, workers=workers))
        if ends:
            ledger.add({"kind": ends, "time": began + 22, "step": group + 1})
    assert [recovery.kind for recovery in ledger.recoveries] == ["grown", "notice", "killed", "notice"]
    assert {recovery.seconds for recovery in ledger.recoveries} == {100.0}


def test_a_group_that_never_did_a_step_is_part_of_one_recovery():
    ledger = Ledger([start(0.0), step(5.0, 0, 1.0), {"kind": "leave", "time": 6.0, "step": 1}])
    ledger.add(start(16.0, step=1, workers=3))
    ledger.add(start(36.0, step=1, workers=1, waited_for_capacity_s=15.0))
    ledger.add(step(40.0, 1, seconds=2.0, workers=1))
    assert ledger.recoveries == [Recovery("killed", 35.0 - 15.0)]
    assert ledger.restarts == 2
    assert ledger.totals()[Label.RESTART] == 2 * 4 + 3 * 10 + 1 * (5 + 2)
    assert ledger.totals()[Label.WAITING_FOR_CAPACITY] == 15


def test_the_time_between_two_attempts_does_not_count():
    ledger = Ledger([start(10.0, attempt_began=5.0), step(12.0, 0, 1.0)])
    ledger.add(start(9010.0, attempt="b", attempt_began=9000.0, step=1))
    ledger.add(step(9012.0, 1, 1.0))
    assert sum(ledger.totals().values()) == 2 * (7 + 12)
    assert ledger.restarts == 0
    assert [(a.end, b.begin) for a, b in pairwise(ledger.segments()) if a.end != b.begin] == [(12.0, 9000.0)]


def test_what_compiles_is_the_excess_of_the_first_two_steps_over_the_later_ones():
    ledger = Ledger([start(0.0, mode="compiled")])
    seconds, time = [30.0, 8.0, 1.0, 1.2, 0.8], 0.0
    seen = []
    for number, length in enumerate(seconds):
        time += length
        ledger.add(step(time, number, length))
        seen.append(ledger.totals()[Label.COMPILE] / 2)
    assert seen == pytest.approx([0, 22, 29 + 7, 28.9 + 6.9, 29 + 7])
    assert shown(ledger) == {"compile": 2 * 36, "useful": 2 * 5}
    ledger.add(start(time + 10, mode="compiled", step=5))  # settled
    assert ledger.totals()[Label.COMPILE] == pytest.approx(2 * 36)


def test_a_step_that_knows_how_long_it_compiled_is_believed():
    ledger = Ledger([start(0.0, mode="compiled"), step(10.0, 0, 10.0, compile_s=4.0), step(11.0, 1, 1.0)])
    assert shown(ledger) == {"compile": 8, "useful": 14}


def test_an_eager_group_does_not_compile():
    ledger = Ledger([start(0.0, mode="eager"), step(10.0, 0, 10.0), step(11.0, 1, 1.0), step(12.0, 2, 1.0)])
    assert shown(ledger) == {"useful": 24}


def test_events_of_older_versions_are_understood_as_far_as_they_go():
    ledger = Ledger(
        [
            {"kind": "start", "time": 10.0, "step": 0, "workers": 2, "mode": "eager"},
            {"kind": "eval", "time": 11.0, "step": 0, "val_bpb": 3.0},
            step(13.0, 0, 2.0, data_wait_s=0.0),
            {"kind": "checkpoint", "time": 14.0, "step": 1, "seconds": 0.8},  # the run stopped to write it
            {"kind": "warning", "time": 15.0},
            {"kind": "start", "time": 500.0, "step": 1, "workers": 2},  # another attempt, or not: nobody knows
            step(502.0, 1, 2.0),
            {"kind": "unheard of"},
        ]
    )
    assert shown(ledger) == {"restart": 2, "useful": 8, "checkpoint_stall": 1.6, "other": 0.4}
    assert Ledger([step(50.0, 7, 2.0), step(52.5, 8, 2.0)]).totals()[Label.USEFUL] == 8
    assert Ledger([{"kind": "step", "step": 1}, {"kind": "eval", "time": 3.0}]).goodput is None


def test_clocks_that_disagree_never_count_a_second_twice():
    ledger = Ledger([start(10.0), step(20.0, 0, 5.0), start(19.0, step=1), step(21.0, 1, 9.0), step(20.5, 2, 1.0)])
    assert sum(ledger.totals().values()) == 2 * 11
    assert all(a.end <= b.begin for a, b in pairwise(ledger.segments()))


@dataclass
class History:
    """A run that is acted out second by second, with what every second was spent on."""

    now: float = 1.7e9
    step: int = 0
    saved: int = 0
    events: list[dict] = field(default_factory=list)
    spent: dict[str, float] = field(default_factory=dict)  # worker-seconds by label
    since_saved: list[tuple[str, float]] = field(default_factory=list)  # what a kill makes repeated work
    lost: int = 0
    kinds: list[str] = field(default_factory=list)

    def pass_time(self, label: str, seconds: float, workers: int, in_vain_if_killed: bool = True) -> None:
        self.now += seconds
        self.spent[label] = self.spent.get(label, 0.0) + seconds * workers
        if in_vain_if_killed:
            self.since_saved.append((label, seconds * workers))

    def emit(self, kind: str, **fields) -> None:
        numbers = {name: round(value, 4) if isinstance(value, float) else value for name, value in fields.items()}
        self.events.append({"kind": kind, "time": round(self.now, 3), **numbers})

    def save(self) -> None:
        self.saved = self.step
        self.since_saved.clear()

    def kill(self) -> None:
        for label, worker_seconds in self.since_saved:
            self.spent[label] -= worker_seconds
            self.spent["repeated_work"] = self.spent.get("repeated_work", 0.0) + worker_seconds
        self.since_saved.clear()
        self.lost += self.step - self.saved
        self.step = self.saved


durations = st.floats(0.0, 40.0)


@st.composite
def histories(draw) -> History:
    run = History()
    for attempt in range(draw(st.integers(1, 3))):
        run.now += draw(durations) * 100  # nobody ran
        attempt_began, silence = run.now, 0.0
        for _ in range(draw(st.integers(1, 4))):
            workers, compiled = draw(st.integers(1, 16)), draw(st.booleans())
            usual = draw(st.floats(0.3, 5.0))  # seconds of work of this group's steps
            waited = min(draw(durations), draw(durations))
            run.pass_time("waiting_for_capacity", waited, workers, False)
            run.pass_time("restart", silence + draw(durations), workers, False)  # what a killed group did is not known
            run.events = without_repeated(run.events, run.step)
            run.emit(
                "start",
                step=run.step,
                workers=workers,
                mode=MODES[compiled],
                attempt=str(attempt),
                attempt_began=round(attempt_began, 3),
                waited_for_capacity_s=waited,
            )
            if run.step == 0:
                seconds = draw(durations)
                run.pass_time("evaluation", seconds, workers, False)
                run.emit("eval", step=0, seconds=seconds)
            run.since_saved.clear()
            stall = 0.0
            for number in range(draw(st.integers(3, 12))):
                waits = draw(st.floats(0.0, 3.0))
                compiles = draw(durations) if compiled and number < 2 else 0.0
                run.pass_time("restart" if number == 0 else "data_wait", waits, workers, number > 0)
                run.pass_time("compile", compiles, workers)
                run.pass_time("useful", usual, workers)
                seconds = waits + compiles + usual
                run.emit("step", step=run.step, workers=workers, seconds=seconds, data_wait_s=waits, stall_s=stall)
                run.step, stall = run.step + 1, 0.0
                if draw(st.booleans()):
                    seconds = draw(durations)
                    run.pass_time("evaluation", seconds, workers)
                    run.emit("eval", step=run.step, seconds=seconds)
                if number >= 4 and draw(st.integers(0, 3)) == 0:
                    run.save()
                    stall = draw(st.floats(0.0, 2.0))
                    run.pass_time("checkpoint_stall", stall, workers)
            end = draw(st.sampled_from(["leave", "killed"]))
            if end == "leave":
                # A stall that no step tells of is told by the event of leaving.
                run.pass_time("checkpoint_stall", draw(durations), workers)
                run.save()
                run.emit("leave", step=run.step)
                silence = 0.0
            else:
                # The stall after a save and before the kill is in no event: it belongs to the silence.
                if stall:
                    run.since_saved.clear()
                    run.spent["checkpoint_stall"] -= stall * workers
                    run.now -= stall
                run.kill()
                silence = draw(durations)
        run.since_saved.clear()
    run.events = without_repeated(run.events, run.step)
    return run


@given(histories())
def test_every_worker_second_of_any_history_gets_its_label_once(history):
    ledger = Ledger(history.events)
    segments, totals = ledger.segments(), ledger.totals()
    everything = sum(history.spent.values())
    assert sum(totals.values()) == pytest.approx(everything, rel=0.01)
    assert sum(segment.worker_seconds for segment in segments) == pytest.approx(sum(totals.values()))
    assert all(segment.begin < segment.end for segment in segments)
    assert all(a.end <= b.begin for a, b in pairwise(segments))
    for label, seconds in totals.items():
        assert seconds == pytest.approx(history.spent.get(label, 0.0), abs=0.01 * everything), label
    assert ledger.steps_lost == history.lost
    assert sorted(e["step"] for e in history.events if e["kind"] == "step") == list(range(history.step))
