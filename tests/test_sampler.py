"""The sampler: the right distribution, the right support, and nothing but (seed, position) behind a choice."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from nanochat_ray.engine.sampler import SamplingParams, sample, uniform
from nanochat_ray.errors import UserError

logits = arrays(np.float32, st.integers(1, 60), elements=st.floats(-20, 20, width=32))
seeds = st.integers(-(2**63), 2**63 - 1)


def softmax(z: np.ndarray) -> np.ndarray:
    p = np.exp(z - z.max())
    return p / p.sum()


@pytest.mark.parametrize(
    ("params", "keep"),
    [
        ({"temperature": 1.0, "top_k": None}, None),
        ({"temperature": 0.7, "top_k": None}, None),
        ({"temperature": 1.0, "top_k": 3}, [3, 5, 7]),
        ({"temperature": 1.0, "top_k": None, "top_p": 0.6}, [3, 5]),
    ],
)
def test_frequencies_follow_the_softmax_of_what_is_kept(params, keep):
    z = np.array([0.0, 0.5, 0.2, 3.0, -1.0, 2.5, 1.0, 2.0])
    kept = np.arange(8) if keep is None else np.array(keep)
    expected = np.zeros(8)
    expected[kept] = softmax(z[kept] / params["temperature"])
    draws = 4000
    counts = np.bincount([sample(z, SamplingParams(seed=9, **params), i) for i in range(draws)], minlength=8)
    # Five standard deviations of a binomial: fails by chance in less than one run of a million, and never with a seed.
    assert np.all(np.abs(counts - draws * expected) <= 5 * np.sqrt(draws * expected * (1 - expected)) + 1e-9)


@given(logits, seeds, st.integers(0, 10**6), st.integers(1, 70))
def test_a_token_is_among_the_k_largest(z, seed, position, k):
    token = sample(z, SamplingParams(temperature=1.3, top_k=k, seed=seed), position)
    assert np.sum(z > z[token]) < k


@given(logits, seeds, st.integers(0, 10**6), st.floats(0.01, 1.0))
def test_what_is_likelier_than_the_token_holds_less_than_top_p(z, seed, position, top_p):
    token = sample(z, SamplingParams(temperature=1.0, top_k=None, top_p=top_p, seed=seed), position)
    p = softmax(z.astype(np.float64))
    assert p[p > p[token]].sum() < top_p + 1e-9


@given(logits, seeds, st.integers(0, 10**6))
def test_the_same_seed_and_position_give_the_same_token_whatever_was_drawn_before(z, seed, position):
    params = SamplingParams(temperature=1.0, top_k=None, seed=seed)
    first = sample(z, params, position)
    sample(z, params, position + 1)
    assert sample(z.copy(), params, position) == first


@given(logits, seeds)
def test_temperature_zero_takes_the_first_maximum(z, seed):
    assert sample(z, SamplingParams(temperature=0.0, seed=seed), 3) == int(np.argmax(z))


@given(logits, seeds, st.floats(1e-6, 10.0), st.integers(0, 100))
def test_no_temperature_makes_it_fail(z, seed, temperature, position):
    assert 0 <= sample(z, SamplingParams(temperature=temperature, seed=seed), position) < len(z)


def test_excluded_tokens_are_never_drawn():
    z = np.array([-np.inf, 0.0, -np.inf, 0.0])
    drawn = {sample(z, SamplingParams(temperature=5.0, top_k=None, seed=1), i) for i in range(200)}
    assert drawn == {1, 3}


def test_equal_logits_beyond_top_k_go_to_the_lower_ids():
    drawn = {sample(np.zeros(10), SamplingParams(temperature=1.0, top_k=3, seed=1), i) for i in range(200)}
    assert drawn == {0, 1, 2}


def test_uniforms_of_neighbouring_seeds_and_positions_are_spread_evenly():
    values = np.array([uniform(seed, position) for seed in range(40) for position in range(40)])
    assert values.min() >= 0.0
    assert values.max() < 1.0
    assert len(set(values)) == values.size
    assert np.all(np.abs(np.bincount((values * 10).astype(int), minlength=10) - 160) < 60)


def test_the_draw_of_a_seed_and_position_is_pinned():
    # Replies that people reproduce by seed, and replicas of different versions, depend on it.
    pinned = [0.011546754286331562, 0.3035680343067586, 0.8133540609793564, 0.05541565898515444]
    assert [uniform(seed, position) for seed, position in [(0, 0), (1, 0), (0, 1), (-1, 5)]] == pinned


@pytest.mark.parametrize("bad", [[np.nan, 1.0], [-np.inf, -np.inf], [np.inf, 1.0]])
def test_logits_of_a_damaged_model_are_an_error_that_says_so(bad):
    with pytest.raises(UserError, match="position 4 are not finite"):
        sample(np.array(bad), SamplingParams(), 4)


@pytest.mark.parametrize(
    "bad",
    [
        {"temperature": float("nan")},
        {"temperature": -0.1},
        {"temperature": float("inf")},
        {"top_k": 0},
        {"top_k": -1},
        {"top_p": 0.0},
        {"top_p": 1.1},
        {"top_p": float("nan")},
        {"seed": 2**63},
        {"max_tokens": 0},
        {"stop": ("",)},
        {"stop": ("x" * 65,)},
        {"stop": ("a", "b", "c", "d", "e")},
    ],
)
def test_parameters_out_of_range_are_refused_by_name(bad):
    with pytest.raises(UserError, match=next(iter(bad))):
        SamplingParams(**bad)
