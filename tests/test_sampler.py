"""The sampler: the right distribution, the right support, and nothing but (seed, position) behind a choice."""

from collections import Counter

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from nanochat_ray.engine.sampler import MAX_LOGPROBS, SamplingParams, _top_k, logprob_of, penalise, sample, uniform
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
        ({"temperature": 1.0, "top_k": None, "min_p": 0.3}, [3, 5, 7]),  # e^(2 − 3) = 0.37, e^(1 − 3) = 0.14
        ({"temperature": 0.5, "top_k": None, "min_p": 0.3}, [3, 5]),  # the temperature comes first
        ({"temperature": 1.0, "top_k": 2, "top_p": 0.99, "min_p": 0.01}, [3, 5]),
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


@given(logits, seeds, st.integers(0, 10**6), st.floats(0.0, 1.0), st.floats(0.1, 3.0))
def test_a_token_is_at_least_min_p_times_as_likely_as_the_likeliest(z, seed, position, min_p, temperature):
    params = SamplingParams(temperature=temperature, top_k=None, min_p=min_p, seed=seed)
    p = softmax(z.astype(np.float64) / temperature)
    assert p[sample(z, params, position)] >= min_p * p.max() * (1 - 1e-9)


def test_with_min_p_of_one_only_the_likeliest_are_left():
    z = np.array([1.0, 3.0, 2.0, 3.0])
    drawn = {sample(z, SamplingParams(temperature=2.0, top_k=None, min_p=1.0, seed=1), i) for i in range(200)}
    assert drawn == {1, 3}


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


# --- the k largest ---------------------------------------------------------------------------------------------------

few_values = st.sampled_from([-np.inf, -2.0, 0.0, 1.0, 1.5])


def check_top_k(z: np.ndarray, k: int | None) -> None:
    """Against sorting: the largest first, among equals the lower ids."""
    order = np.argsort(-z, kind="stable")
    assert _top_k(z, k).tolist() == sorted(order[:k].tolist())
    if k is not None and k < z.size:  # and the threshold is what partitioning everything gives
        assert z[_top_k(z, k)].min() == np.partition(z, z.size - k)[z.size - k]


@given(arrays(np.float64, st.integers(1, 700), elements=few_values), st.none() | st.integers(1, 12))
@example(np.full(400, -np.inf), 3)
def test_the_k_largest_of_many_equal_logits_are_those_that_sorting_finds(z, k):
    check_top_k(z, k)


@given(st.integers(1, 3000), st.integers(1, 60), st.integers(0, 2**32), st.integers(0, 3), st.booleans())
def test_the_k_largest_of_many_logits_are_those_that_sorting_finds(size, k, seed, decimals, excluded):
    random = np.random.default_rng(seed)
    z = random.standard_normal(size).round(decimals)
    if excluded:
        z[random.random(size) < 0.7] = -np.inf
    check_top_k(z, k)


@pytest.mark.parametrize("size", [50_304, 50_303, 65_536])
@pytest.mark.parametrize("k", [1, 20, 50, 700, 790, 40_000])
def test_the_k_largest_of_a_whole_vocabulary(size, k):
    z = np.random.default_rng(k).standard_normal(size).astype(np.float32).astype(np.float64)
    check_top_k(z, k)
    check_top_k(z.round(1), k)
    check_top_k(np.sort(z), k)  # all in the last maxima
    check_top_k(np.where(np.arange(size) < k // 2, z, -np.inf), k)


# --- penalties and log-probabilities ---------------------------------------------------------------------------------


@given(
    logits,
    st.floats(0.1, 10.0),
    st.floats(-2.0, 2.0),
    st.floats(-2.0, 2.0),
    st.lists(st.integers(0, 59), max_size=20),
    st.integers(0, 20),
)
def test_penalties_are_the_published_formulas(z, repetition, presence, frequency, before, prompt):
    before = [token % len(z) for token in before]
    said = before[prompt:]
    params = SamplingParams(repetition_penalty=repetition, presence_penalty=presence, frequency_penalty=frequency)
    given_z = z.copy()
    penalised = penalise(z, params, Counter(before), Counter(said))
    assert np.array_equal(z, given_z), "the model's logits were changed in place"
    for token in range(len(z)):
        expected = float(z[token])
        if token in before:
            expected = expected / repetition if expected > 0 else expected * repetition
        if token in said:
            expected -= presence + frequency * said.count(token)
        assert penalised[token] == pytest.approx(expected, abs=1e-9)


def test_a_penalty_leaves_excluded_tokens_excluded():
    params = SamplingParams(repetition_penalty=2.0, presence_penalty=-2.0)
    assert penalise(np.array([-np.inf, 1.0]), params, {0: 3, 1: 1}, {0: 3})[0] == -np.inf


def test_only_parameters_that_change_logits_count_as_penalties():
    assert not SamplingParams(seed=1, top_k=3, temperature=0.3).penalised
    for name in ("repetition_penalty", "presence_penalty", "frequency_penalty"):
        assert SamplingParams(**{name: 1.5}).penalised


@given(logits, st.integers(0, 59), st.integers(0, MAX_LOGPROBS))
def test_log_probabilities_are_those_of_the_softmax_with_the_likeliest_first(z, token, top):
    token %= len(z)
    exact = z.astype(np.float64)
    expected = exact - exact.max() - np.log(np.exp(exact - exact.max()).sum())
    logprob = logprob_of(z, token, top)
    assert logprob.token == token
    assert logprob.logprob == pytest.approx(expected[token], abs=1e-9)
    ids = [i for i, _ in logprob.top]
    assert ids == np.argsort(-exact, kind="stable")[:top].tolist()
    assert [value for _, value in logprob.top] == pytest.approx(expected[ids].tolist(), abs=1e-9)
    assert all(value <= 1e-12 for _, value in logprob.top)


def test_log_probabilities_of_large_logits_do_not_overflow():
    logprob = logprob_of(np.array([1e4, 0.0], dtype=np.float32), 1, 2)
    assert (logprob.logprob, logprob.top) == (-1e4, ((0, 0.0), (1, -1e4)))


# --- randomness ------------------------------------------------------------------------------------------------------


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
        {"min_p": -0.1},
        {"min_p": 1.1},
        {"min_p": float("nan")},
        {"repetition_penalty": 0.0},
        {"repetition_penalty": float("nan")},
        {"presence_penalty": 2.1},
        {"frequency_penalty": float("-inf")},
        {"logprobs": -1},
        {"logprobs": 21},
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
