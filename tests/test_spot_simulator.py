"""Runs on spot machines foretold from a trace, and traces turned into events for a replay."""

import json
import math
import random
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jobs import plan as plan_job
from nanochat_ray import cli
from nanochat_ray.errors import UsageError, UserError
from nanochat_ray.plan import find_hardware, make_plan
from nanochat_ray.plan.spot import LABELS, Costs, Trace, read_trace, schedule, simulate
from nanochat_ray.plan.spot_printout import spot_figures, step_seconds
from nanochat_ray.train.ledger import Label

COSTS = Costs(
    notice_s=10, kill_s=15, grow_s=8, start_s=20, noticed_share=0.5, checkpoint_every_s=60, checkpoint_stall_s=2
)
ALWAYS_NOTICED = Costs(10, 15, 8, 20, 1.0, math.inf, 0)
NEVER_NOTICED = Costs(10, 15, 8, 20, 0.0, 60, 2)


def linear(workers: int) -> float:
    return 48 / workers


def by_the_second(trace, workers, steps, step_seconds, costs, seed):
    """Slow and obvious: one second after the other, all durations being whole seconds."""
    draw, spent = random.Random(seed), dict.fromkeys(LABELS, 0)
    second = size = done = saved = under_way = still = stall = waited = repeated = 0
    in_vain_s = 0  # of whole steps since the last checkpoint
    while True:
        there = min(trace.nodes[int(second // trace.gap_s) % len(trace.nodes)], workers[1])
        wanted = there if there >= workers[0] else 0
        if wanted != size:
            stall = 0
            if wanted > size:
                still, lost = (costs.grow_s if size else costs.start_s), False
            else:
                lost = draw.random() >= costs.noticed_share
                still = costs.kill_s if lost else costs.notice_s
            if lost:
                spent["useful"] -= in_vain_s * size
                spent["repeated_work"] += (in_vain_s + under_way) * size
                repeated += done - saved
                done = saved
            else:
                spent["restart"] += under_way * size
                saved = done
            under_way = in_vain_s = 0
            size = wanted
            spent["waiting_for_capacity"] += waited * size
            waited = waited if size == 0 else 0
        if done == steps and not stall:
            return spent, second, repeated
        if size == 0:
            waited += 1
        elif still:
            still -= 1
            spent["restart"] += size
        elif stall:
            stall -= 1
            spent["checkpoint_stall"] += size
        else:
            under_way += 1
            if under_way == step_seconds(size):
                done, in_vain_s, under_way = done + 1, in_vain_s + under_way, 0
                spent["useful"] += step_seconds(size) * size
                if in_vain_s >= costs.checkpoint_every_s or done == steps:
                    saved, stall, in_vain_s = done, costs.checkpoint_stall_s, 0
        second += 1


traces = st.lists(st.integers(0, 6), min_size=1, max_size=12).map(lambda nodes: Trace((*nodes, 4, 4, 4), 100))


@given(
    traces,
    st.integers(1, 3),
    st.integers(3, 5),
    st.integers(1, 60),
    st.sampled_from([COSTS, NEVER_NOTICED, Costs(0, 0, 0, 0, 0.3, 7, 1), Costs(250, 130, 90, 170, 0.7, 500, 30)]),
    st.integers(0, 5),
)
def test_the_simulation_is_what_happens_second_by_second(trace, least, most, steps, costs, seed):
    size = {1: 48, 2: 24, 3: 16, 4: 12, 5: 10}.__getitem__
    forecast = simulate(trace, (least, most), steps, size, costs, seed)
    spent, wall, repeated = by_the_second(trace, (least, most), steps, size, costs, seed)
    assert forecast.spent == pytest.approx(spent)
    assert (forecast.wall_s, forecast.steps_repeated) == (pytest.approx(wall), repeated)
    assert forecast.held_s <= most * forecast.wall_s + 1e-6
    assert forecast.below_min_s <= forecast.wall_s


def test_on_machines_that_stay_only_the_start_and_the_checkpoints_cost_time():
    forecast = simulate(Trace((4,), 300), (1, 4), 100, linear, COSTS)
    assert forecast.wall_s == pytest.approx(20 + 100 * 12 + 20 * 2)
    assert forecast.spent["useful"] == pytest.approx(100 * 48)
    assert forecast.held_s == pytest.approx(4 * forecast.wall_s)
    assert (forecast.notices, forecast.kills, forecast.growths, forecast.below_min_s) == (0, 0, 0, 0)


def test_a_loss_with_notice_repeats_nothing_and_one_without_at_most_a_checkpoint_interval():
    trace = Trace((4, 4, 2, 2, 2, 4, 4, 4), 300)
    noticed = simulate(trace, (1, 4), 150, linear, ALWAYS_NOTICED)
    assert (noticed.notices, noticed.kills, noticed.growths, noticed.steps_repeated) == (1, 0, 1, 0)
    assert noticed.spent["repeated_work"] == 0
    killed = simulate(trace, (1, 4), 150, linear, NEVER_NOTICED)
    assert killed.kills == 1
    assert killed.steps_repeated <= 60 / 12


def test_below_min_nobody_works_but_machines_are_paid():
    forecast = simulate(Trace((1, 1, 4, 4, 4, 4), 300), (2, 4), 40, linear, ALWAYS_NOTICED)
    assert forecast.below_min_s == 600
    assert forecast.wall_s == pytest.approx(600 + 20 + 40 * 12)
    assert forecast.spent["waiting_for_capacity"] == 600 * 4  # as the ledger counts
    assert forecast.held_s == pytest.approx(600 * 1 + 500 * 4)


def test_machines_beyond_max_change_nothing_and_are_not_paid():
    calm = simulate(Trace((4,), 300), (1, 4), 100, linear, COSTS)
    assert simulate(Trace((4, 9, 5, 4, 16), 300), (1, 4), 100, linear, COSTS) == calm


def test_a_trace_that_never_has_enough_machines_or_never_long_enough_is_refused():
    with pytest.raises(UserError, match="never has more than 3 machines; the run needs 4"):
        simulate(Trace((3, 1), 300), (4, 8), 10, linear, COSTS)
    with pytest.raises(UserError, match="after 100 passes .* only 0 of 10 steps"):
        simulate(Trace((2, 0), 300), (1, 2), 10, lambda _: 1000.0, NEVER_NOTICED)


def test_the_labels_are_those_of_the_ledger():
    assert set(LABELS) < set(Label)


def test_prices_follow_the_machines_that_were_there():
    plan, hardware = make_plan(12, steps=200), find_hardware("8xA100")
    figures = spot_figures(plan, hardware, Trace((2, 2, 1, 2), 300), (1, 2), COSTS, spot_price=2.0)
    assert figures["dollars"]["spot"] == pytest.approx(2.0 * figures["worker_hours"])
    calm_hours = 200 * step_seconds(plan, hardware, 2) / 3600
    assert figures["dollars"]["on_demand"] == pytest.approx(1.8 * 2 * calm_hours)  # the hardware's assumed price
    assert figures["wall_s"]["calm"] <= figures["wall_s"]["least"] <= figures["wall_s"]["median"]


@given(
    st.lists(st.integers(0, 16), min_size=4, max_size=60),
    st.integers(1, 4),
    st.one_of(st.none(), st.integers(1, 8)),
    st.floats(0.0, 1.0),
    st.integers(0, 9),
)
def test_a_replay_never_has_less_than_no_machine_and_ends_as_the_trace_says(nodes, samples, most, killed, seed):
    trace = Trace(tuple(nodes), 300)
    changes = schedule(trace, speedup=60, minutes=5 * samples / 60, most=most, killed_share=killed, seed=seed)
    assert changes == schedule(trace, 60, 5 * samples / 60, most, killed, seed)
    capped = [min(count, most) if most else count for count in nodes]
    windows = [capped[begin : begin + samples] for begin in range(len(nodes) - samples + 1)]
    there, counts = 0, {}
    for change in changes:
        assert change.machines > 0
        assert 0 <= change.seconds < samples * 5
        assert change.action in ("add", "drain", "kill")
        there += change.machines if change.action == "add" else -change.machines
        assert there >= 0
        counts[change.seconds] = there
    shown, now = [], 0
    for sample in range(samples):
        now = counts.get(sample * 5.0, now)
        shown.append(now)
    assert shown in windows
    assert shown == max(windows, key=lambda window: sum(a != b for a, b in pairwise(window)))
    if killed in (0.0, 1.0):
        assert {change.action for change in changes} <= {"add", "kill" if killed else "drain"}


def test_a_replay_longer_than_the_trace_is_refused_with_both_lengths():
    with pytest.raises(UsageError, match=r"10\.0 h, the trace has 1\.0 h; replay fewer minutes or more slowly"):
        schedule(Trace((1,) * 12, 300), speedup=60, minutes=10)


@pytest.mark.parametrize(
    "content",
    [
        "",
        "[]",
        "{}",
        '{"metadata": {}, "data": [1]}',
        '{"metadata": {"gap_seconds": 0}, "data": [1]}',
        '{"metadata": {"gap_seconds": 300}, "data": []}',
        '{"metadata": {"gap_seconds": 300}, "data": [1, -1]}',
        '{"metadata": {"gap_seconds": 300}, "data": ["a"]}',
        '{"metadata": {"gap_seconds": 300}, "data": 5}',
    ],
)
def test_a_file_that_is_no_trace_is_refused_with_an_example(tmp_path, content):
    (tmp_path / "trace.json").write_text(content)
    with pytest.raises(UserError, match="is no trace of machines: expected JSON like"):
        read_trace(str(tmp_path / "trace.json"))
    with pytest.raises(UserError, match="cannot be read"):
        read_trace(str(tmp_path / "absent.json"))


def test_the_plan_job_foretells_a_run_on_a_trace(tmp_path, capsys):
    file = tmp_path / "trace.json"
    file.write_text(json.dumps({"metadata": {"gap_seconds": 300}, "data": [4, 4, 4, 2, 0, 0, 3, 4] * 6}))
    flags = ["--depth", "12", "--hardware", "8xA100", "--workers", "2:4", "--trace", str(file), "--json"]
    assert cli.run(plan_job.main, plan_job.build_parser(), [*flags, "--spot-price", "1"]) == 0
    *shown, answer = capsys.readouterr().out.splitlines()
    title = next(number for number, line in enumerate(shown) if line.startswith("on spot machines"))
    rows = [line.split("  ") for line in shown[title + 1 :]]
    assert len(rows) > 10
    assert all(row[-1] for row in rows)
    spot = json.loads(answer)["plan"]["spot"]
    assert 0 < spot["goodput"] < spot["goodput_with_capacity"] < 1
    assert spot["prices"] == {"spot": 1.0, "on_demand": 1.8}
    assert cli.run(plan_job.main, plan_job.build_parser(), ["--depth", "12", "--trace", str(file)]) == 2
    assert "--trace needs --hardware" in capsys.readouterr().err
