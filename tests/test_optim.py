import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from nanochat_ray.errors import UserError
from nanochat_ray.model.gpt import GPT, GPTConfig
from nanochat_ray.model.optim import build_optimizer
from nanochat_ray.model.sharding import lay_out, muon_cost, shard_bounds
from nanochat_ray.model.updates import adamw_, muon, polar_express, second_moment_shape
from nanochat_ray.plan import Rates
from tests import reference_model

CONFIG = GPTConfig(16, 90, 3, 4, 2, 32, "SL")
RATES = Rates(
    embedding=0.1, value_embedding=0.05, unembedding=0.01, matrix=0.02, scalar=0.3, residual_scalar=0.004, smear=0.2
)


def fresh_model():
    model = GPT(CONFIG)
    model.init_weights(0)
    return model


def backward(model, seed, rows=2):
    ids = torch.randint(0, 90, (rows, 17), generator=torch.Generator().manual_seed(seed))
    model(ids[:, :-1], ids[:, 1:], reduction="sum").backward()


def test_adamw_agrees_with_its_formula_over_several_steps():
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(5, 7, generator=generator)
    expected, m, v = weight.double(), torch.zeros(5, 7).double(), torch.zeros(5, 7).double()
    exp_avg, exp_avg_sq = torch.zeros(5, 7), torch.zeros(5, 7)
    for step in range(1, 6):
        grad = torch.randn(5, 7, generator=generator)
        settings = dict(step=step, rate=0.1 / step, betas=(0.8, 0.95))
        adamw_(weight, grad, exp_avg, exp_avg_sq, weight_decay=0.05, **settings)
        expected, m, v = reference_model.adamw_step(expected, grad.double(), m, v, decay=0.05, **settings)
        torch.testing.assert_close(weight.double(), expected, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(exp_avg.double(), m, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(exp_avg_sq.double(), v, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("shape", [(8, 8), (6, 20), (20, 6), (2, 12)])
def test_muon_agrees_with_the_slow_reference_over_several_steps(shape):
    generator = torch.Generator().manual_seed(1)
    weights = torch.randn(3, *shape, generator=generator)
    momenta, seconds = torch.zeros(3, *shape), torch.zeros(3, *second_moment_shape(*shape))
    expected = [(weights[k].double(), momenta[k].double(), seconds[k].double()) for k in range(3)]
    for step in range(4):
        grads = 1e-3 * torch.randn(3, *shape, generator=generator)
        settings = dict(momentum=0.85 + 0.02 * step, rate=0.02)
        weights, momenta, seconds = muon(
            weights, grads, momenta, seconds, weight_decay=0.3, dtype=torch.float32, **settings
        )
        for k in range(3):
            weight, momentum, second = expected[k]
            expected[k] = reference_model.muon_step(weight, grads[k].double(), momentum, second, decay=0.3, **settings)
            for ours, theirs in zip((weights[k], momenta[k], seconds[k]), expected[k], strict=True):
                torch.testing.assert_close(ours.double(), theirs, atol=2e-5, rtol=2e-3)


@given(rows=st.integers(1, 24), columns=st.integers(1, 24), seed=st.integers(0, 100))
def test_polar_express_brings_all_singular_values_near_one(rows, columns, seed):
    x = torch.randn(1, rows, columns, generator=torch.Generator().manual_seed(seed))
    largest_ratio = torch.linalg.cond(x[0])
    if largest_ratio > 100:
        return  # five steps lift singular values down to about 1 % of the norm
    values = torch.linalg.svdvals(polar_express(x)[0])
    assert values.min() > 0.7
    assert values.max() < 1.25


def test_muon_in_bf16_stays_near_fp32():
    generator = torch.Generator().manual_seed(1)
    weights, grads = torch.zeros(2, 32, 48), torch.randn(2, 32, 48, generator=generator)
    start = (weights, grads, torch.zeros_like(weights), torch.zeros(2, 1, 48))
    exact, rounded = (
        muon(*start, momentum=0.9, rate=0.02, weight_decay=0.0, dtype=dtype)[0]
        for dtype in (torch.float32, torch.bfloat16)
    )
    assert (exact - rounded).norm() < 0.03 * exact.norm()


def test_a_zero_gradient_moves_no_matrix():
    weights = torch.randn(1, 4, 6)
    new, _, _ = muon(
        weights, torch.zeros(1, 4, 6), torch.zeros(1, 4, 6), torch.zeros(1, 1, 6),
        momentum=0.9, rate=0.1, weight_decay=0.0, dtype=torch.float32,
    )  # fmt: skip
    assert torch.equal(new, weights)


def test_decay_is_cautious_it_never_works_against_the_update():
    weights, grads = torch.randn(1, 8, 8), torch.randn(1, 8, 8)
    start = (weights, grads, torch.zeros(1, 8, 8), torch.zeros(1, 8, 1))
    plain, decayed = (
        muon(*start, momentum=0.9, rate=0.01, weight_decay=decay, dtype=torch.float32)[0] for decay in (0.0, 5.0)
    )
    grew, shrank = (plain - weights) * weights > 0, (plain - weights) * weights < 0  # or was too small to move it
    assert torch.equal(plain[grew], decayed[grew])
    torch.testing.assert_close(decayed[shrank], (plain - 0.01 * 5.0 * weights)[shrank])


def test_each_parameter_moves_as_its_group_says():
    model = fresh_model()
    optimizer = build_optimizer(model, RATES)
    backward(model, seed=0)
    before = {name: p.detach().clone().double() for name, p in model.named_parameters()}
    grads = {name: p.grad.double() / 32 for name, p in model.named_parameters()}
    optimizer.step(lr_multiplier=0.5, momentum=0.9, weight_decay=0.2, grad_scale=1 / 32)
    groups = {  # as in the specification
        "lm_head.weight": (RATES.unembedding, (0.8, 0.96), 0.01),
        "transformer.wte.weight": (RATES.embedding, (0.8, 0.995), 0.001),
        "value_embeds.0.weight": (RATES.value_embedding, (0.8, 0.995), 0.01),
        "value_embeds.2.weight": (RATES.value_embedding, (0.8, 0.995), 0.01),
        "resid_lambdas": (RATES.residual_scalar, (0.8, 0.95), 0.05),
        "x0_lambdas": (RATES.scalar, (0.96, 0.95), 0.0),
        **dict.fromkeys(("smear_gate.weight", "smear_lambda", "backout_lambda"), (RATES.smear, (0.8, 0.95), 0.0)),
    }
    for name, parameter in model.named_parameters():
        weight, grad, zero = before[name], grads[name], torch.zeros(()).double()
        if name in groups:
            rate, betas, decay = groups.pop(name)
            expected, *_ = reference_model.adamw_step(weight, grad, zero, zero, 1, 0.5 * rate, betas, decay)
            moved = grad.abs() > 1e-6  # below, the first step's direction is rounding
            expected, actual = expected[moved], parameter.detach().double()[moved]
        elif grad.any():
            expected, *_ = reference_model.muon_step(weight, grad, zero, zero, 0.9, 0.5 * RATES.matrix, 0.2)
            actual = parameter.detach().double()
        else:
            continue
        torch.testing.assert_close(actual, expected, atol=1e-4, rtol=1e-3, msg=lambda m, name=name: f"{name}: {m}")
    assert not groups


def test_gradients_are_dropped_after_a_step_and_by_zero_grad():
    model = fresh_model()
    optimizer = build_optimizer(model, RATES)
    backward(model, seed=0)
    optimizer.step(1.0, 0.9, 0.0, 1 / 32)
    assert all(p.grad is None for p in model.parameters())
    backward(model, seed=1)
    optimizer.zero_grad(set_to_none=False)
    assert all(p.grad is not None and not p.grad.any() for p in model.parameters())
    optimizer.zero_grad()
    assert all(p.grad is None for p in model.parameters())


def test_a_restored_optimizer_goes_on_exactly():
    model, steps = fresh_model(), dict(lr_multiplier=0.5, momentum=0.9, weight_decay=0.1, grad_scale=1 / 32)
    optimizer = build_optimizer(model, RATES)
    backward(model, seed=0)
    optimizer.step(**steps)
    other = fresh_model()
    other.load_state_dict(model.state_dict())
    restored = build_optimizer(other, RATES)
    restored.load_state_dict({name: tensor.clone() for name, tensor in optimizer.state_dict().items()})
    for each, its_optimizer in ((model, optimizer), (other, restored)):
        backward(each, seed=1)
        its_optimizer.step(**steps)
    for (name, a), b in zip(model.named_parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b), name


def test_state_has_full_shapes_and_names_every_parameter():
    model = fresh_model()
    state = build_optimizer(model, RATES).state_dict()
    assert state.pop("step") == 0
    for name, parameter in model.named_parameters():
        if name.startswith("transformer.h."):
            assert state.pop(f"{name}.momentum").shape == parameter.shape
            assert state.pop(f"{name}.second_moment").shape == second_moment_shape(*parameter.shape)
        else:
            assert state.pop(f"{name}.exp_avg").shape == parameter.shape
            assert state.pop(f"{name}.exp_avg_sq").shape == parameter.shape
    assert not state


def test_the_state_of_another_model_is_refused_and_the_message_names_a_tensor():
    optimizer = build_optimizer(fresh_model(), RATES)
    state = optimizer.state_dict()
    del state["lm_head.weight.exp_avg"]
    with pytest.raises(UserError, match=r"1 names differ, the first is lm_head\.weight\.exp_avg"):
        optimizer.load_state_dict(state)


shapes_strategy = st.dictionaries(
    st.text("abcdef", min_size=1, max_size=4), st.sampled_from([(8, 8), (8, 32), (32, 8), (2, 12)]), max_size=20
)


@given(shapes=shapes_strategy, world=st.integers(1, 24))
def test_every_matrix_has_one_owner_and_its_own_place(shapes, world):
    layout = lay_out(shapes, world)
    assert len(layout.stacks) == world
    assert sorted(name for row in layout.stacks for stack in row for name in stack.names) == sorted(shapes)
    for row in layout.stacks:
        end = second_end = 0
        for stack in row:
            assert (stack.offset, stack.second_offset) == (end, second_end)
            assert all(shapes[name] == stack.shape for name in stack.names)
            end, second_end = end + stack.elements, second_end + stack.second_elements
        assert end <= layout.size
        assert second_end <= layout.second_size


@given(shapes=shapes_strategy.filter(len), world=st.integers(1, 8))
def test_the_work_is_balanced(shapes, world):
    loads = [sum(len(stack.names) * muon_cost(stack.shape) for stack in row) for row in lay_out(shapes, world).stacks]
    largest = max(muon_cost(shape) for shape in shapes.values())
    assert max(loads) <= sum(loads) / world + largest


@given(elements=st.integers(1, 200), world=st.integers(1, 50))
def test_shards_of_a_tensor_cover_it_once(elements, world):
    bounds = [shard_bounds(elements, rank, world) for rank in range(world)]
    assert bounds[0][0] == 0
    assert bounds[-1][1] == elements
    assert all(left[1] == right[0] for left, right in itertools.pairwise(bounds))
