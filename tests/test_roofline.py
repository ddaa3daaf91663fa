"""The predicted step: it adds up, obeys the limits it names, and gets slower with every resource that shrinks."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nanochat_ray.plan import duration, explain, find_hardware, make_plan
from nanochat_ray.plan.roofline import training_step

GPUS = ("1xA100", "8xH100", "8xH200", "4xB200")
depths, hardwares = st.integers(2, 32), st.sampled_from([find_hardware(name) for name in (*GPUS, "cpu2", "cpu64")])


@given(depths, hardwares)
def test_the_parts_add_up_and_the_peak_is_never_passed(depth, hardware):
    plan = make_plan(depth)
    step = training_step(plan, hardware)
    assert step.seconds == pytest.approx(sum(part.seconds for part in step.parts))
    assert all(part.seconds > 0 and part.limit for part in step.parts)
    assert step.tokens_per_s * step.seconds == pytest.approx(plan.batch_tokens)
    reached = step.mfu * hardware.peak_flops * hardware.workers
    assert reached == pytest.approx(plan.flops_per_token * step.tokens_per_s)
    assert 0 < step.mfu < hardware.reached.products


@given(depths, hardwares, st.sampled_from(["peak_flops", "bandwidth", "link_bytes_per_s"]), st.floats(0.1, 1.0))
def test_less_of_anything_is_never_faster(depth, hardware, what, share):
    plan, less = make_plan(depth), replace(hardware, **{what: share * getattr(hardware, what)})
    assert training_step(plan, less).seconds >= training_step(plan, hardware).seconds * (1 - 1e-9)


@given(depths, st.integers(1, 40))
def test_workers_take_micro_batches_in_whole_rounds(depth, workers):
    plan, hardware = make_plan(depth), find_hardware("1xH100")
    products = {n: training_step(plan, hardware, n).parts[0].seconds for n in (1, workers)}
    assert products[workers] == pytest.approx(products[1] * -(-plan.micro_batches // workers) / plan.micro_batches)


def test_products_of_a_large_model_take_their_flops_over_what_is_reached():
    plan, hardware = make_plan(26), find_hardware("1xH100")
    layers = plan.parameters.matrices - sum(12 * plan.model.n_kv_head for _ in plan.model.value_embedding_layers)
    expected = 6 * layers * plan.batch_tokens / (989e12 * 0.70)
    parts = {part.name: part.seconds for part in training_step(plan, hardware).parts}
    assert parts["products of the layers"] == pytest.approx(expected)
    in_fp8 = {part.name: part.seconds for part in training_step(plan, hardware, fp8=True).parts}
    assert in_fp8["products of the layers"] == pytest.approx(6 * layers * plan.batch_tokens / (1979e12 * 0.50))
    assert in_fp8["head and loss"] == parts["head and loss"]


def test_a_tiny_model_on_a_gpu_waits_for_its_kernels_to_be_started():
    plan = make_plan(preset="tiny")
    names = [part.name for part in training_step(plan, find_hardware("1xH100")).parts]
    assert "waiting for the CPU" in names
    assert "waiting for the CPU" not in [part.name for part in training_step(plan, find_hardware("cpu2")).parts]


def test_one_worker_exchanges_nothing():
    plan = make_plan(12)
    exchange = {
        n: [part for part in training_step(plan, find_hardware("1xH100"), n).parts if part.name == "exchange"]
        for n in (1, 2)
    }
    assert not exchange[1]
    moved = 2 * 4 * plan.parameters.total / 2
    assert exchange[2][0].seconds == pytest.approx(moved / (450e9 * 0.75))


def test_time_and_money_follow_from_the_stated_assumptions():
    rows = {name: value for name, value, _ in explain(make_plan(26), find_hardware("8xH100"))}
    plan = make_plan(26)
    step = training_step(plan, find_hardware("8xH100"))
    hours = plan.steps * step.seconds / 3600
    assert rows["a step"] == duration(step.seconds)
    assert rows["MFU"] == f"{step.mfu:.1%}"
    assert rows["time"] == duration(hours * 3600)
    assert rows["money, on demand"] == f"${hours * 24:,.2f}"
