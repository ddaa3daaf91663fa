"""The dial: published formulas, exact figures, monotonicity, overrides, errors, schedules, the printed table."""

import json
import math
import subprocess
import sys
import time
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from nanochat_ray.errors import UsageError, UserError
from nanochat_ray.model.gpt import GPT
from nanochat_ray.plan import (
    PRESETS,
    SFT,
    Plan,
    differences,
    duration,
    explain,
    find_hardware,
    lr_multiplier,
    make_plan,
    muon_momentum,
    sft_plan,
    table,
    weight_decay,
)
from nanochat_ray.plan.derivation import REFERENCE_BATCH

depths = st.integers(1, 64)


def is_power_of_two(value: int) -> bool:
    return value > 0 and value & (value - 1) == 0


@given(depths)
def test_published_formulas_hold_at_any_depth(depth):
    plan, reference = make_plan(depth), make_plan(12)
    horizon, reference_horizon = 12 * plan.parameters.scaling, 12 * reference.parameters.scaling
    batch = 2 ** round(math.log2(2**19 * (horizon / reference_horizon) ** 0.383))
    width = -(-64 * depth // 128) * 128
    assert (plan.model.n_embd, plan.model.n_head, plan.model.n_kv_head) == (width, width // 128, width // 128)
    assert plan.optimal_tokens == horizon
    assert plan.batch_tokens == batch
    assert plan.steps == horizon // batch
    assert plan.tokens == plan.steps * batch
    assert plan.weight_decay == pytest.approx(0.28 * math.sqrt(batch / 2**19) * reference_horizon / horizon)
    by_batch, by_width = math.sqrt(batch / 2**19), (width / 768) ** -0.5
    assert plan.rates.matrix == pytest.approx(0.02 * by_batch)
    assert plan.rates.scalar == pytest.approx(0.5 * by_batch)
    assert plan.rates.embedding == pytest.approx(0.3 * by_batch * by_width)
    assert plan.rates.value_embedding == pytest.approx(plan.rates.embedding / 2)
    assert plan.rates.unembedding == pytest.approx(0.008 * by_batch * by_width)


@given(depths)
def test_batch_and_micro_batch_are_powers_of_two_that_fill_a_step(depth):
    plan = make_plan(depth)
    assert is_power_of_two(plan.batch_tokens)
    assert is_power_of_two(plan.micro_batch_rows)
    assert plan.micro_batch_rows * plan.micro_batches * plan.model.sequence_len == plan.batch_tokens
    assert plan.rows_per_step * plan.model.sequence_len == plan.batch_tokens


@given(depths)
def test_a_deeper_model_never_gets_less(depth):
    shallow, deep = make_plan(depth), make_plan(depth + 1)
    assert deep.parameters.total > shallow.parameters.total
    assert deep.parameters.scaling > shallow.parameters.scaling
    assert deep.optimal_tokens > shallow.optimal_tokens
    assert deep.batch_tokens >= shallow.batch_tokens
    assert deep.flops > shallow.flops
    if deep.batch_tokens == shallow.batch_tokens:  # λ ∝ sqrt(B)/D: it only rises where B doubles
        assert deep.weight_decay < shallow.weight_decay


def test_depth_12_is_the_reference_with_unscaled_rates():
    plan = make_plan(12)
    assert (plan.model.n_embd, plan.model.n_head, plan.model.sequence_len, plan.model.vocab_size) == (
        768,
        6,
        2048,
        32768,
    )
    assert plan.parameters.matrices == 12 * 12 * 768**2 + 6 * 12 * 6
    assert plan.parameters.total == 286_261_730
    assert plan.parameters.scaling == 110_100_912
    assert (plan.batch_tokens, plan.steps, plan.weight_decay) == (REFERENCE_BATCH, 2520, 0.28)
    assert (plan.rates.embedding, plan.rates.unembedding, plan.rates.matrix) == (0.3, 0.008, 0.02)
    assert plan.model.windows == (512, 512, 512, 2048) * 3
    assert plan.flops_per_token == 6 * 110_100_912 + 12 * 768 * (9 * 512 + 3 * 2048)


def test_depth_26_figures():
    plan = make_plan(26)
    assert (plan.model.n_embd, plan.model.n_head) == (1664, 13)
    assert plan.parameters.total == 1_681_786_938
    assert plan.parameters.scaling == 918_423_532
    assert (plan.batch_tokens, plan.steps) == (2**20, 10_510)
    assert plan.weight_decay == pytest.approx(0.28 * math.sqrt(2) * 110_100_912 / 918_423_532)
    assert plan.rates.matrix == pytest.approx(0.02 * math.sqrt(2))
    assert plan.model.windows[-1] == plan.model.sequence_len


@pytest.mark.parametrize(
    "wanted",
    [*({"preset": name} for name in PRESETS), {"depth": 7, "kv_heads": 2, "vocab_size": 1001}, {"depth": 1}],
    ids=str,
)
def test_parameter_counts_are_those_of_the_real_model(wanted):
    plan = make_plan(**wanted)
    with torch.device("meta"):
        model = GPT(plan.model)
    sizes = {name: weight.numel() for name, weight in model.named_parameters()}
    counts = plan.parameters
    assert counts.embedding == sizes["transformer.wte.weight"]
    assert counts.unembedding == sizes["lm_head.weight"]
    assert counts.matrices == sum(size for name, size in sizes.items() if name.startswith("transformer.h."))
    assert counts.value_embeddings == sum(size for name, size in sizes.items() if name.startswith("value_embeds."))
    assert counts.total == sum(sizes.values())


def test_the_activation_estimate_bounds_what_eager_training_keeps():
    """Counts what autograd saves for one micro-batch of a small model in bf16, weights and masks left out."""
    shape = make_plan(preset="tiny", vocab_size=512).model
    model = GPT(shape)
    model.init_weights(0)
    model.set_dtype(torch.bfloat16)
    weights = {weight.untyped_storage().data_ptr() for weight in model.parameters()}
    kept: dict[int, int] = {}

    def count(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    rows = 4
    ids_BT = torch.randint(shape.vocab_size, (rows, shape.sequence_len))
    with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
        loss = model(ids_BT, ids_BT)
    assert loss.isfinite()
    estimate = shape.activation_bytes(rows)
    assert 0.3 * estimate < sum(kept.values()) < 2.0 * estimate


@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset_survives_json_unchanged(preset):
    plan = make_plan(preset=preset)
    again = Plan.from_dict(json.loads(json.dumps(plan.to_dict())))
    assert again == plan
    assert again.rules == plan.rules
    assert differences(plan, again) == []


def test_a_stored_plan_of_another_version_is_refused():
    data = make_plan(12).to_dict()
    del data["steps"]
    with pytest.raises(UserError, match="does not fit this version"):
        Plan.from_dict(data)


def test_differences_name_each_field_and_ignore_how_it_was_asked_for():
    assert differences(make_plan(12), make_plan(preset="d12")) == []
    changed = differences(make_plan(12), make_plan(12, sequence_len=1024, seed=7))
    assert "model.sequence_len: 2048 → 1024" in changed
    assert "seed: 42 → 7" in changed


def test_the_tiny_preset_is_small_enough_for_a_cpu_demo():
    plan = make_plan(preset="tiny")
    assert (plan.depth, plan.model.n_embd, plan.model.head_size, plan.model.vocab_size) == (4, 256, 64, 4096)
    assert (plan.model.sequence_len, plan.micro_batch_rows, plan.micro_batches, plan.batch_tokens) == (256, 8, 2, 4096)
    assert plan.warmup_steps == min(40, plan.steps // 10)
    assert plan.flops < 1e14


@pytest.mark.parametrize(
    ("horizon", "steps"),
    [
        ({"steps": 77}, 77),
        ({"tokens": 10 * 2**19 + 5}, 10),
        ({"flops": 1e18}, round(1e18 / (make_plan(12).flops_per_token * 2**19))),
        ({"ratio": 24}, 5040),
    ],
    ids=str,
)
def test_the_horizon_may_be_given_in_four_ways(horizon, steps):
    plan = make_plan(12, **horizon)
    assert plan.steps == steps
    assert plan.tokens == steps * plan.batch_tokens


@pytest.mark.parametrize("horizon", [{"steps": 1}, {"tokens": 2**30}, {"flops": 1e17}], ids=str)
def test_another_horizon_changes_neither_batch_nor_rates_nor_decay(horizon):
    usual, other = make_plan(12), make_plan(12, **horizon)
    assert (other.batch_tokens, other.rates, other.weight_decay) == (
        usual.batch_tokens,
        usual.rates,
        usual.weight_decay,
    )


def test_overrides_replace_a_preset_and_free_what_hung_on_it():
    plan = make_plan(preset="tiny", sequence_len=1024, tokens=81920)
    assert (plan.model.sequence_len, plan.micro_batch_rows, plan.micro_batches, plan.steps) == (1024, 4, 1, 20)
    assert plan.rules["sequence_len"] == "given (--sequence-len)"


@pytest.mark.parametrize(
    ("wanted", "message"),
    [
        ({"depth": 0}, "--depth 0 must be at least 1; or choose a preset: tiny, d12"),
        ({"depth": -3}, "--depth -3"),
        ({}, "give --depth N or --preset, one of: tiny, d12, d20, d24, d26, d32"),
        ({"preset": "huge"}, "'huge' is unknown; presets: tiny, d12"),
        ({"preset": "d12", "depth": 6}, "give --depth or --preset, not both"),
        ({"depth": 12, "steps": 5, "tokens": 5}, "--steps and --tokens both set the horizon"),
        ({"depth": 12, "steps": 0}, "--steps 0 must be at least 1"),
        ({"depth": 12, "tokens": 1000}, "shorter than one step"),
        ({"depth": 12, "batch_tokens": 100_000}, "nearest that work: 98,304, 100,352"),
        ({"preset": "tiny", "micro_batch_rows": 16, "batch_tokens": 5000}, "nearest that work: 4,096, 8,192"),
        ({"preset": "tiny", "micro_batch_rows": 64}, "nearest that work: 16,384"),
        ({"depth": 12, "micro_batch_rows": 5}, "must be a power of two; nearest: 4, 8"),
        ({"depth": 12, "kv_heads": 4}, "does not divide 6 heads; these do: 1, 2, 3, 6"),
        ({"depth": 12, "head_size": 33}, "must be even"),
        ({"depth": 12, "vocab_size": 100}, "at least 265"),
        ({"depth": 12, "sequence_len": 1000}, "power of two"),
        ({"depth": 12, "window_pattern": "SXL"}, "made of S"),
        ({"depth": 12, "window_pattern": ""}, "made of S"),
    ],
    ids=str,
)
def test_impossible_wishes_say_what_would_work(wanted, message):
    with pytest.raises(UsageError) as refused:
        make_plan(**wanted)
    assert message in str(refused.value)
    assert "\n" not in str(refused.value)


def test_memory_of_named_hardware_bounds_the_micro_batch_but_not_the_batch():
    free, bounded = make_plan(26), make_plan(26, hardware=find_hardware("8xH100"))
    assert (free.micro_batch_rows, bounded.micro_batch_rows) == (32, 16)
    assert free.batch_tokens == bounded.batch_tokens
    assert bounded == make_plan(26, hardware=find_hardware("1xH100"))  # the number of workers changes nothing
    with pytest.raises(UsageError, match="does not fit cpu1"):
        make_plan(32, hardware=find_hardware("cpu1"))


@pytest.mark.parametrize("name", ["8xH1000", "0xH100", "cpu", "cpu0", "H100", ""])
def test_unknown_hardware_is_refused_with_the_names_that_exist(name):
    with pytest.raises(UsageError, match="for example 8xH100"):
        find_hardware(name)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0 s"),
        (0.00004, "0.04 ms"),
        (0.00314, "3.1 ms"),
        (0.00996, "10 ms"),
        (0.25, "250 ms"),
        (0.9996, "1.0 s"),
        (3.21, "3.2 s"),
        (9.96, "10 s"),
        (42, "42 s"),
        (200, "3 min 20 s"),
        (7500, "2 h 05 min"),
        (273_600, "3 d 04 h"),
        (59.7, "1 min 00 s"),
    ],
)
def test_durations_read_naturally(seconds, text):
    assert duration(seconds) == text


def test_every_line_of_the_table_has_a_value_and_a_rule():
    plan = make_plan(preset="tiny")
    for stage in (plan, sft_plan(plan, 1000)):
        for name, value, rule in explain(stage, find_hardware("cpu2")):
            assert name
            assert value
            assert rule
        assert len({line.find("  ", 2) > 0 for line in table(stage).splitlines()[1:]}) == 1


@given(st.integers(1, 20_000), st.data())
def test_rates_rise_stay_and_fall_without_leaving_their_bounds(steps, data):
    plan = make_plan(12, steps=steps)
    step = data.draw(st.integers(0, steps - 1))
    factor = lr_multiplier(plan, step)
    assert 0.05 <= factor <= 1.0 or step < plan.warmup_steps
    assert 0.0 < factor <= 1.0
    assert 0.85 <= muon_momentum(plan, step) <= 0.97
    assert 0.0 <= weight_decay(plan, step) <= plan.weight_decay


def test_schedules_of_depth_12_hit_the_published_points():
    plan = make_plan(12)
    start = plan.steps - plan.warmdown_steps
    assert (plan.warmup_steps, plan.warmdown_steps, start) == (40, 1638, 882)
    assert lr_multiplier(plan, 0) == 1 / 40
    assert lr_multiplier(plan, 39) == lr_multiplier(plan, start) == 1.0
    assert lr_multiplier(plan, start + 819) == pytest.approx(0.5 + 0.5 * 0.05)
    assert lr_multiplier(plan, plan.steps) == pytest.approx(0.05)
    assert muon_momentum(plan, 0) == 0.85
    assert muon_momentum(plan, 200) == pytest.approx(0.91)
    assert muon_momentum(plan, 400) == muon_momentum(plan, start) == 0.97
    assert muon_momentum(plan, plan.steps) == pytest.approx(0.90)
    assert weight_decay(plan, 0) == plan.weight_decay
    assert weight_decay(plan, plan.steps // 2) == pytest.approx(plan.weight_decay / 2)
    assert weight_decay(plan, plan.steps) == pytest.approx(0.0)


@given(st.integers(2, 3000))
def test_momentum_never_jumps_however_short_the_run(steps):
    plan = make_plan(12, steps=steps)
    values = [muon_momentum(plan, step) for step in range(0, steps, max(1, steps // 50))]
    stride = max(1, steps // 50)
    limit = stride * max(0.12 / 400, 0.07 / max(plan.warmdown_steps, 1)) + 1e-12
    assert all(abs(after - before) <= limit for before, after in pairwise(values))


def test_the_rates_of_the_tiny_preset_are_scaled_up_and_the_plan_says_so():
    plan, by_rule = (
        make_plan(preset="tiny"),
        make_plan(4, head_size=64, vocab_size=4096, sequence_len=256, batch_tokens=4096),
    )
    assert plan.rates.matrix == pytest.approx(4 * by_rule.rates.matrix)
    assert plan.rates.smear == by_rule.rates.smear
    assert "4 · (preset tiny) 0.02 · sqrt(B/2^19), Muon" in table(plan)
    assert "preset tiny) 0.02" not in table(by_rule)


def test_finetuning_the_tiny_preset_takes_smaller_batches_at_higher_rates():
    base = make_plan(preset="tiny")
    plan = sft_plan(base, rows=640)
    assert (plan.batch_tokens, plan.micro_batches) == (2048, 1)
    assert plan.rates.matrix == pytest.approx(1.5 * base.rates.matrix)
    assert sft_plan(base, rows=640, batch_tokens=4096).batch_tokens == 4096
    assert (sft_plan(base, rows=10**6).steps, sft_plan(base, rows=10**6, steps=900).steps) == (150, 900)


def test_finetuning_starts_lower_and_ends_at_zero_without_warm_up_or_decay():
    base = make_plan(preset="d12")
    plan = sft_plan(base, rows=64_000)
    assert plan.stage == SFT
    assert (plan.model, plan.batch_tokens, plan.micro_batches) == (base.model, base.batch_tokens, base.micro_batches)
    assert plan.steps == 64_000 // base.rows_per_step
    assert plan.rates.matrix == pytest.approx(0.8 * base.rates.matrix)
    assert lr_multiplier(plan, 0) == 1.0
    assert lr_multiplier(plan, plan.steps) == 0.0
    assert weight_decay(plan, 0) == 0.0
    assert muon_momentum(plan, 0) == muon_momentum(plan, plan.steps - 1)
    assert Plan.from_dict(json.loads(json.dumps(plan.to_dict()))) == plan


def test_finetuning_refuses_less_than_one_step_of_rows_and_uneven_batches():
    base = make_plan(preset="tiny")
    with pytest.raises(UsageError, match="3 finetuning rows are less than one step of 8"):
        sft_plan(base, rows=3)
    with pytest.raises(UsageError, match="nearest that work"):
        sft_plan(base, rows=1000, batch_tokens=5000)


def test_the_plan_job_answers_quickly_without_torch_or_ray(tmp_path):
    trace = tmp_path / "trace.json"  # two weeks of a spot market
    nodes = [(number // 13 * 7) % 17 for number in range(4032)]
    trace.write_text(json.dumps({"metadata": {"gap_seconds": 300}, "data": nodes}))
    flags = ["--depth", "26", "--hardware", "8xH100", "--workers", "2:16", "--trace", str(trace), "--json"]
    code = (
        "import sys; from jobs import plan; from nanochat_ray import cli; "
        f"code = cli.run(plan.main, plan.build_parser(), {flags}); "
        "heavy = {'torch', 'ray', 'numpy', 'pyarrow'} & set(sys.modules); "
        "sys.exit(code or (f'imported {heavy}' if heavy else 0))"
    )
    began = time.monotonic()
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=30)
    seconds = time.monotonic() - began
    assert done.returncode == 0, done.stderr
    answer = json.loads(done.stdout.splitlines()[-1])
    assert answer["plan"]["depth"] == 26
    assert answer["plan"]["spot"]["wall_s"]["median"] > answer["plan"]["spot"]["wall_s"]["calm"]
    assert seconds < 2.0


def test_the_plan_job_reports_wrong_usage_with_exit_code_2():
    done = subprocess.run(
        [sys.executable, "-m", "jobs.plan", "--depth", "0"], capture_output=True, text=True, timeout=30
    )
    assert done.returncode == 2
    assert done.stderr.splitlines() == [
        "error: --depth 0 must be at least 1; or choose a preset: tiny, d12, d20, d24, d26, d32"
    ]
