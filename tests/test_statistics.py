"""Intervals and comparisons of accuracies, against resampling done slowly and obviously, and against what is known."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nanochat_ray.eval.statistics import Interval, centred, interval, mean_centred, paired, paired_mean
from nanochat_ray.eval.summary import TaskResult, compare, comparison_table, reference_mean, summarise, table

answers = st.lists(st.booleans(), min_size=1, max_size=60).map(lambda values: np.array(values, bool))
pairs = st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1, max_size=60).map(
    lambda rows: np.array(rows, bool)
)
baselines = st.sampled_from([0.0, 0.25, 0.5])


def slow_ends(statistic, examples: int, resamples: int = 4000, seed: int = 0) -> tuple[float, float]:
    """The 95 % interval of a statistic of indices, by really drawing indices."""
    generator = np.random.default_rng(seed)
    found = [statistic(generator.integers(0, examples, examples)) for _ in range(resamples)]
    return tuple(np.quantile(found, (0.025, 0.975)))


def share(right: int, examples: int) -> np.ndarray:
    return np.arange(examples) < right


@settings(max_examples=10)
@given(answers.filter(lambda correct: 0 < correct.sum() < len(correct)))
def test_an_interval_is_the_one_that_resampling_indices_gives(correct):
    found = interval(correct)
    low, high = slow_ends(lambda drawn: correct[drawn].mean(), len(correct))
    step = 1.01 / len(correct)  # accuracies are multiples of it: two samples of draws may end one apart
    assert found.value == correct.mean()
    assert found.low == pytest.approx(low, abs=step)
    assert found.high == pytest.approx(high, abs=step)


@settings(max_examples=10)
@given(pairs, baselines)
def test_a_paired_interval_is_the_one_that_resampling_examples_gives(rows, baseline):
    a, b = rows.T
    found = paired(a, b, baseline=baseline)
    difference = (a.astype(float) - b) / (1 - baseline)
    low, high = slow_ends(lambda drawn: difference[drawn].mean(), len(a))
    step = 1.01 / len(a) / (1 - baseline)
    assert found.value == pytest.approx(difference.mean())
    assert found.low == pytest.approx(low, abs=step)
    assert found.high == pytest.approx(high, abs=step)


def test_the_interval_of_a_mean_is_the_one_of_tasks_resampled_for_themselves():
    tasks = {"small": (share(12, 20), 0.25), "large": (share(300, 1000), 0.0), "none": (share(0, 50), 0.5)}
    found = mean_centred(tasks)
    generator, means = np.random.default_rng(1), []
    for _ in range(4000):
        drawn = {
            name: correct[generator.integers(0, len(correct), len(correct))] for name, (correct, _) in tasks.items()
        }
        means.append(np.mean([(drawn[name].mean() - base) / (1 - base) for name, (_, base) in tasks.items()]))
    low, high = np.quantile(means, (0.025, 0.975))
    assert found.value == pytest.approx(((0.6 - 0.25) / 0.75 + 0.3 - 1.0) / 3)
    assert (found.low, found.high) == (pytest.approx(low, abs=0.006), pytest.approx(high, abs=0.006))


@given(pairs.filter(lambda rows: len(rows) <= 8))
def test_p_is_the_share_of_all_sign_flips_that_give_as_much(rows):
    a, b = rows.T
    difference = a.astype(int) - b
    flips = [abs(np.dot(signs, difference)) for signs in itertools.product((1, -1), repeat=len(a))]
    assert paired(a, b).p == pytest.approx(np.mean(np.array(flips) >= abs(difference.sum())))


@given(pairs, baselines)
def test_the_mean_over_one_task_is_that_task(rows, baseline):
    a, b = rows.T
    one, mean = paired(a, b, name="t", baseline=baseline), paired_mean({"t": (a, b, baseline)})
    assert (mean.value, mean.low, mean.high) == pytest.approx((one.value, one.low, one.high))
    assert mean.p == pytest.approx(one.p, abs=0.03)


@given(pairs)
def test_swapping_the_models_changes_the_sign_and_not_the_p_value(rows):
    a, b = rows.T
    assert paired(a, b).value == -paired(b, a).value
    assert paired(a, b).p == paired(b, a).p


@given(pairs, baselines)
def test_ends_enclose_the_value_and_centring_is_affine(rows, baseline):
    for correct in rows.T:
        found = interval(correct)
        assert 0 <= found.low <= found.value <= found.high <= 1
        shown = found.centred(baseline)
        assert shown.value == pytest.approx((correct.mean() - baseline) / (1 - baseline))
        assert shown.high - shown.low == pytest.approx((found.high - found.low) / (1 - baseline))
    difference = paired(*rows.T)
    assert -1 <= difference.low <= difference.value + 1e-12
    assert difference.value - 1e-12 <= difference.high <= 1
    assert 0 < difference.p <= 1


@pytest.mark.parametrize(("examples", "accuracy"), [(100, 0.3), (500, 0.5), (2000, 0.05)])
def test_about_95_of_100_intervals_hold_the_true_accuracy(examples, accuracy):
    generator = np.random.default_rng(0)
    held = 0
    for trial in range(400):
        found = interval(generator.random(examples) < accuracy, resamples=2000, seed=trial)
        held += found.low <= accuracy <= found.high
    assert 0.91 <= held / 400 <= 0.98


@pytest.mark.slow
def test_about_5_of_100_equal_models_are_told_apart():
    generator = np.random.default_rng(0)
    told_apart = 0
    for trial in range(300):
        tasks = {}
        for task in range(4):
            hard = generator.random(150)
            a, b = (hard + generator.normal(0, 0.2, 150) < 0.4 for _ in range(2))
            tasks[str(task)] = (a, b, 0.25)
        told_apart += paired_mean(tasks, resamples=1000, seed=trial).p < 0.05
    assert 0.02 <= told_apart / 300 <= 0.085


def test_answers_that_agree_mostly_are_told_apart_where_separate_intervals_overlap():
    a, b = share(520, 1000), share(500, 1000)
    assert interval(b).high > interval(a).low
    assert paired(a, b).low > 0
    assert paired(a, b).p < 1e-5


@pytest.mark.parametrize("examples", [1, 7, 32])
def test_all_right_or_all_wrong_is_not_certainty(examples):
    right, wrong = interval(share(examples, examples)), interval(share(0, examples))
    assert right == Interval(1.0, pytest.approx(0.025 ** (1 / examples)), 1.0)
    assert (wrong.low, wrong.high) == (0.0, pytest.approx(1 - right.low))


def test_the_same_answers_of_both_models_are_no_difference():
    same = paired(share(3, 9), share(3, 9))
    assert (same.value, same.low, same.high, same.p) == (0, 0, 0, 1)
    assert paired_mean({"t": (share(3, 9), share(3, 9), 0.0)}).p == 1


def test_without_examples_there_is_no_figure():
    with pytest.raises(ValueError, match="'piqa' has no examples"):
        interval(share(0, 0), name="piqa")
    with pytest.raises(ValueError, match="'piqa' has no examples"):
        mean_centred({"piqa": (share(0, 0), 0.5)})
    with pytest.raises(ValueError, match="no task"):
        mean_centred({})
    with pytest.raises(ValueError, match="no task"):
        paired_mean({})
    with pytest.raises(ValueError, match="3 examples of one model and 4 of the other"):
        paired(share(1, 3), share(1, 4))


def test_ten_thousand_examples_that_differ_have_an_exact_p_value_too():
    p = paired(share(5100, 10_000), ~share(5100, 10_000)).p
    assert p == pytest.approx(0.0466, abs=2e-4)  # the normal approximation, with continuity correction: z = 99.5 / 50


def test_a_seed_decides_and_neither_order_nor_company_of_tasks_matters():
    one, two = (share(30, 90), 0.25), (share(20, 40), 0.0)
    assert mean_centred({"one": one, "two": two}) == mean_centred({"two": two, "one": one})
    assert interval(one[0], seed=1, name="one") != interval(one[0], seed=2, name="one")
    both = summarise({"one": TaskResult("schema", 0, 0.25, one[0]), "two": TaskResult("schema", 0, 0.0, two[0])})
    assert both["tasks"]["one"] == summarise({"one": TaskResult("schema", 0, 0.25, one[0])})["tasks"]["one"]


def results(**right: int) -> dict[str, TaskResult]:
    return {name: TaskResult("multiple choice", 10, 0.25, share(count, 400)) for name, count in right.items()}


def test_a_summary_has_accuracies_centred_ones_and_their_mean():
    found = summarise(results(piqa=200, boolq=100))
    assert list(found["tasks"]) == ["piqa", "boolq"]
    piqa = found["tasks"]["piqa"]
    assert (piqa["type"], piqa["shots"], piqa["examples"], piqa["baseline"]) == ("multiple choice", 10, 400, 0.25)
    assert piqa["accuracy"]["value"] == 0.5
    assert piqa["centred"]["low"] == pytest.approx(centred(piqa["accuracy"]["low"], 0.25))
    assert found["mean"]["value"] == pytest.approx((1 / 3 + 0) / 2)
    assert found["mean"]["low"] < 1 / 6 < found["mean"]["high"]


def test_the_mean_of_a_comparison_is_the_mean_of_its_tasks():
    found = compare(results(piqa=220, boolq=100), results(piqa=200, boolq=110))
    assert found["tasks"]["piqa"]["value"] == pytest.approx(20 / 400 / 0.75)
    assert found["tasks"]["piqa"]["examples"] == 400
    assert found["mean"]["value"] == pytest.approx(np.mean([task["value"] for task in found["tasks"].values()]))
    with pytest.raises(ValueError, match="only one of the two models has done boolq"):
        compare(results(piqa=1, boolq=1), results(piqa=1))
    with pytest.raises(ValueError, match="baselines 0.25 and 0.5"):
        compare(results(piqa=1), {"piqa": TaskResult("multiple choice", 10, 0.5, share(1, 400))})


def test_the_table_has_a_line_for_each_task_and_ends_with_the_mean():
    summary = summarise(results(piqa=200, boolq=100))
    lines = table(summary).splitlines()
    assert lines[0].split() == ["task", "examples", "accuracy", "95", "%", "interval", "centred"]
    assert lines[1].split() == ["piqa", "400", "0.500", "[0.450,", "0.550]", "+0.333"]
    assert lines[-1].split()[:2] == ["mean", "800"]
    assert lines[-1].endswith("+0.167")
    summary |= {"name": "CORE", "references": {"GPT-2 124M": {"mean": 0.2, "tasks": {"piqa": 0.25, "boolq": -0.18}}}}
    lines = table(summary).splitlines()
    assert lines[2].endswith("+0.000      -0.180")
    assert lines[-1].startswith("CORE")
    assert lines[-1].endswith("+0.200")


def test_a_reference_is_compared_over_the_same_tasks_or_not_at_all():
    summary = {
        **summarise(results(piqa=200)),
        "references": {"more": {"mean": 0.9, "tasks": {"piqa": 0.3, "copa": 0.5}}},
    }
    assert reference_mean(summary, "more") == 0.3
    summary["references"] = {"fewer": {"mean": 0.9, "tasks": {}}}
    assert reference_mean(summary, "fewer") is None
    assert table(summary).splitlines()[1].endswith("+0.333")


def test_the_table_of_a_comparison_shows_differences_and_p_values():
    shown = comparison_table(compare(results(piqa=220, boolq=101), results(piqa=200, boolq=100)))
    assert "+0.067" in shown
    assert "< 0.001" in shown
    assert "1.000" in shown
