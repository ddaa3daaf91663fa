"""The predicted step: it adds up, obeys the limits it names, and gets slower with every resource that shrinks."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nanochat_ray.errors import UsageError
from nanochat_ray.plan import duration, explain, find_hardware, make_plan
from nanochat_ray.plan.hardware import Hardware, Reached
from nanochat_ray.plan.roofline import training_step
from nanochat_ray.plan.shape import attended_pairs

GPUS = ("1xA100", "8xH100", "8xH200", "4xB200")
depths, hardwares = st.integers(2, 32), st.sampled_from([find_hardware(name) for name in (*GPUS, "cpu2", "cpu64")])


# Two layers of width 128 with key/value width 64, context 1024 (windows 256 and 1024), vocabulary 512, on 2 workers
# that take 2 of 4 micro-batches of one row each. What follows is counted by hand, for one worker and step.
SMALL = {"depth": 2, "head_size": 32, "kv_heads": 2, "sequence_len": 1024, "vocab_size": 512, "window_pattern": "S"}
BATCH = {"micro_batch_rows": 1, "batch_tokens": 4096, "steps": 1}
ROUND_FIGURES = Hardware(
    name="round figures",
    workers=2,
    machine_workers=2,
    peak_flops=1e13,
    fp8_flops=4e13,
    bandwidth=1e12,
    link_bytes_per_s=1e10,
    network_bytes_per_s=1e9,
    launch_s=0.0,
    reached=Reached(products=0.5, attention=0.25, bandwidth=0.5, link=0.1, fp8_products=0.25),
    memory_bytes=2**40,
    reserved_bytes=0,
    on_demand_per_hour=2.0,
    spot_per_hour=1.0,
)
WEIGHTS, MATRICES = 524_342, 360_472  # all; those of the layers: 2 · 180,224 and a gate of 12 · 2
FLOPS = {
    # 3 products · 2 · 1,024 tokens · (2 · 128² + 2 · 128 · 64 + 8 · 128² = 180,224 weights) · 2 layers · 2 rounds
    "products of the layers": 4_429_185_024,
    # 14 · 128 channels · (256 · 257 / 2 + 768 · 257 = 230,272 and 1,024 · 1,025 / 2 = 524,800 pairs) · 2 rounds
    "attention": 2_706_178_048,
    # 3 products · 2 · 1,024 tokens · 128 · 512 · 2 rounds
    "head and loss": 805_306_368,
    # 5 steps · 2 layers · Σ (4 s² l + 2 s³): 2 of 128 × 128 12,582,912; 2 of 64 × 128 2,621,440; 2 of 128 × 512
    # 37,748,736; shared by 2 workers
    "update": 529_530_880,
}
BYTES = {
    # 3 products · 2 bytes · 1,024 tokens · (in + out) + in · out: 2 · 278,528 + 2 · 204,800 + 2 · 720,896; · 2 · 2
    "products of the layers": 57_802_752,
    # 6 widths of 128 and 6 of 64, 2 bytes, 1,024 tokens; · 2 · 2
    "attention": 9_437_184,
    # 63 widths of 128 and 15 of 64, 2 bytes, 1,024 tokens; · 2 · 2
    "between the products": 73_924_608,
    # 3 · 2 bytes · (1,024 · 128 + 1,024 · 512 + 128 · 512), and 3 passes over 1,024 · 512 logits of 2 bytes; · 2
    "head and loss": 14_942_208,
    "casts and gradients": 16 * WEIGHTS * 2,
    # Polar Express: 5 steps · 2 layers · 2 bytes · Σ (3 s l + 4 s²): 2 · 114,688 + 2 · 40,960 + 2 · 262,144; 194 bytes
    # per matrix weight, 36 per other; shared by 2 workers. On each: 20 per matrix weight
    "update": (16_711_680 + 194 * MATRICES + 36 * (WEIGHTS - MATRICES)) // 2 + 20 * MATRICES,
}


def seconds_of(hardware: Hardware, fp8: bool = False) -> dict[str, float]:
    return {part.name: part.seconds for part in training_step(make_plan(**SMALL, **BATCH), hardware, fp8=fp8).parts}


def test_the_small_shape_has_the_weights_that_were_counted():
    plan = make_plan(**SMALL, **BATCH)
    assert (plan.model.n_embd, plan.model.kv_width, plan.model.windows) == (128, 64, (256, 1024))
    assert (plan.parameters.total, plan.parameters.matrices, plan.micro_batches) == (WEIGHTS, MATRICES, 4)


def test_where_memory_is_fast_every_part_takes_its_flops_by_hand_over_what_is_reached():
    seconds = seconds_of(replace(ROUND_FIGURES, bandwidth=1e40))
    rates = dict.fromkeys(FLOPS, 5e12) | {"attention": 2.5e12}
    assert {name: seconds[name] for name in FLOPS} == pytest.approx({name: FLOPS[name] / rates[name] for name in FLOPS})
    in_fp8 = seconds_of(replace(ROUND_FIGURES, bandwidth=1e40), fp8=True)
    assert in_fp8["products of the layers"] == pytest.approx(FLOPS["products of the layers"] / 1e13)
    assert {**in_fp8, "products of the layers": 0} == {**seconds, "products of the layers": 0}


def test_where_products_are_fast_every_part_takes_its_bytes_by_hand_over_what_is_reached():
    seconds = seconds_of(replace(ROUND_FIGURES, peak_flops=1e40))
    assert seconds.pop("exchange") == pytest.approx(2 * 4 * WEIGHTS / 2 / 1e9)
    assert seconds == pytest.approx({name: moved / 5e11 for name, moved in BYTES.items()})


def test_each_part_names_the_limit_that_it_meets_with_its_figure():
    plan = make_plan(**SMALL, **BATCH)
    limits = {part.name: part.limit for part in training_step(plan, ROUND_FIGURES).parts}
    assert limits["products of the layers"] == "compute, 5 TFLOP/s"
    assert limits["attention"].startswith("compute, 2.5 TFLOP/s; assumed to compute at 25% of the peak")
    assert limits["between the products"] == "memory, 500 GB/s"
    assert limits["exchange"].startswith("link, 10% of 10 GB/s inside a machine")
    limits = {part.name: part.limit for part in training_step(plan, replace(ROUND_FIGURES, peak_flops=1e15)).parts}
    assert limits["products of the layers"] == "memory, 500 GB/s"
    assert limits["attention"].startswith("memory, 500 GB/s")


def test_a_part_that_meets_both_limits_names_the_share_of_the_lesser():
    parts = training_step(make_plan(**SMALL, **BATCH), ROUND_FIGURES).parts
    head = next(part for part in parts if part.name == "head and loss")
    logits = 2 * 3 * 1024 * 512 * 2 / 5e11
    assert head.seconds == pytest.approx(FLOPS["head and loss"] / 5e12 + logits)
    assert head.limit.startswith(f"compute, 5 TFLOP/s; {logits / head.seconds:.0%} of it memory, 500 GB/s")


def test_kernels_are_started_60_a_layer_at_the_pace_of_the_cpu():
    seconds = seconds_of(replace(ROUND_FIGURES, launch_s=1.0))
    micro_batches = sum(seconds[name] for name in {*FLOPS, *BYTES, "waiting for the CPU"} - {"update"})
    assert micro_batches == pytest.approx(2 * 2 * 60 * 1.0)  # rounds, layers


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
        n: [part for part in training_step(plan, find_hardware("8xH100"), n).parts if part.name == "exchange"]
        for n in (1, 2)
    }
    assert not exchange[1]
    moved = 2 * 4 * plan.parameters.total / 2
    assert exchange[2][0].seconds == pytest.approx(moved / (450e9 * 0.75))


@pytest.mark.parametrize(
    ("hardware", "workers", "sheet", "place"),
    [
        ("8xH100", 8, 450e9, "75% of 450 GB/s inside a machine"),
        ("8xH100", 16, 50e9, "75% of 50 GB/s of each worker between machines, an assumption"),
        ("16xH100", 16, 50e9, "between machines, an assumption"),
        ("1xB200", 2, 50e9, "between machines, an assumption"),
        ("16xH100", 8, 450e9, "inside a machine"),
        ("cpu2", 2, 1e9, "between machines, an assumption"),
    ],
)
def test_workers_of_several_machines_exchange_over_the_network(hardware, workers, sheet, place):
    plan = make_plan(12)
    part = training_step(plan, find_hardware(hardware), workers).parts[-1]
    assert part.name == "exchange"
    assert part.seconds == pytest.approx(8 * plan.parameters.total * (workers - 1) / workers / (0.75 * sheet))
    assert place in part.limit


def test_time_and_money_follow_from_the_stated_assumptions():
    rows = {name: value for name, value, _ in explain(make_plan(26), find_hardware("8xH100"))}
    plan = make_plan(26)
    step = training_step(plan, find_hardware("8xH100"))
    hours = plan.steps * step.seconds / 3600
    assert rows["a step"] == duration(step.seconds)
    assert rows["MFU"] == f"{step.mfu:.1%}"
    assert rows["time"] == duration(hours * 3600)
    assert rows["money, on demand"] == f"${hours * 24:,.2f}"


@pytest.mark.parametrize("name", ["4097xH100", "cpu100000", "1" * 5000 + "xA100"])
def test_absurd_numbers_of_workers_are_refused_in_words(name):
    with pytest.raises(UsageError, match="has more than 4,096 (GPUs|cores)"):
        find_hardware(name)
    assert find_hardware("4096xH100").workers == 4096


@given(st.integers(1, 300), st.integers(1, 400))
def test_attended_pairs_are_those_that_a_query_by_query_count_finds(length, window):
    assert attended_pairs(length, window) == sum(min(position, window) + 1 for position in range(length))
