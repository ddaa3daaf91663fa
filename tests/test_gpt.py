import os

import pytest
import torch
import torch._inductor.config
from hypothesis import given, settings
from hypothesis import strategies as st

from nanochat_ray.errors import UsageError, UserError
from nanochat_ray.model.execution import prepare_for_training
from nanochat_ray.model.gpt import GPT, GPTConfig
from tests import reference_model

# 520 positions make a short window of 256, so lengths up to 300 meet windows that matter.
CONFIG = GPTConfig(sequence_len=520, vocab_size=90, n_layer=3, n_head=4, n_kv_head=2, n_embd=32, window_pattern="SSL")
TINY = GPTConfig(sequence_len=16, vocab_size=90, n_layer=4, n_head=4, n_kv_head=2, n_embd=32, window_pattern="SL")


def lively_model(config, seed=0):
    """A model in which nothing is zero, so that every part shows in the logits."""
    model = GPT(config)
    model.init_weights(seed)
    generator = torch.Generator().manual_seed(seed + 1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.2 * torch.randn(parameter.shape, generator=generator)
    return model


def random_ids(rows, length, seed=0):
    return torch.randint(0, 90, (rows, length), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize("layers", [1, 2, 5])
def test_the_network_agrees_with_the_slow_reference(kv_heads, layers):
    config = GPTConfig(16, 90, layers, 4, kv_heads, 32, "SL")
    model, ids = lively_model(config), random_ids(2, 7)
    for row in range(2):
        expected = reference_model.logits(model.state_dict(), config, ids[row])
        torch.testing.assert_close(model(ids)[row].double(), expected, atol=3e-4, rtol=3e-4)


def test_short_windows_agree_with_the_slow_reference():
    config = GPTConfig(256, 90, 2, 1, 1, 24, "S")  # window 128
    assert config.windows == (128, 256)
    model, ids = lively_model(config), random_ids(1, 140)
    expected = reference_model.logits(model.state_dict(), config, ids[0])
    torch.testing.assert_close(model(ids)[0].double(), expected, atol=5e-4, rtol=5e-4)


@given(cuts=st.lists(st.integers(1, 299), max_size=4, unique=True), every=st.booleans())
@settings(max_examples=10)
def test_any_split_of_prefill_and_decode_agrees_with_the_whole_forward(cuts, every):
    model, ids = lively_model(CONFIG), random_ids(2, 300)
    with torch.inference_mode():
        whole = model(ids)
        cache = model.new_cache(2, 300)
        parts = []
        for start, stop in zip([0, *sorted(cuts)], [*sorted(cuts), 300], strict=True):
            logits = model.extend(ids[:, start:stop], cache, last_only=not every)
            parts.append(logits if every else logits.unsqueeze(1))
            torch.testing.assert_close(parts[-1][:, -1], whole[:, stop - 1], atol=1e-4, rtol=1e-4)
        if every:
            torch.testing.assert_close(torch.cat(parts, 1), whole, atol=1e-4, rtol=1e-4)
    assert cache.length == 300


def test_decoding_one_by_one_agrees_with_the_whole_forward_also_beyond_the_short_window():
    model, ids = lively_model(CONFIG), random_ids(1, 290)
    with torch.inference_mode():
        whole, cache = model(ids), model.new_cache(1, 300)
        model.extend(ids[:, :250], cache)
        for t in range(250, 290):
            torch.testing.assert_close(model.extend(ids[:, t : t + 1], cache), whole[:, t], atol=1e-4, rtol=1e-4)


def test_in_bf16_the_cached_path_stays_near_the_whole_forward():
    model, ids = lively_model(TINY).set_dtype(torch.bfloat16), random_ids(2, 16)
    with torch.inference_mode():
        whole, cache = model(ids), model.new_cache(2, 16)
        split = torch.cat([model.extend(part, cache, last_only=False) for part in ids.split([5, 1, 10], 1)], 1)
    assert whole.dtype == split.dtype == torch.float32
    assert (split - whole).abs().mean() < 0.05 * whole.abs().mean()


def test_a_full_cache_refuses_more_and_says_how_much_there_is():
    model = lively_model(TINY)
    cache = model.new_cache(1, 4)
    model.extend(random_ids(1, 3), cache)
    with pytest.raises(UserError, match="3 tokens and 2 more do not fit a cache of 4"):
        model.extend(random_ids(1, 2), cache)


def test_loss_is_the_cross_entropy_of_the_logits():
    model, ids, targets = lively_model(TINY), random_ids(2, 16), random_ids(2, 16, seed=1)
    targets[0, :5] = -1
    expected = torch.nn.functional.cross_entropy(
        model(ids).flatten(0, 1), targets.flatten(), ignore_index=-1, reduction="none"
    ).view(2, 16)
    torch.testing.assert_close(model(ids, targets, reduction="none"), expected, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(model(ids, targets, reduction="sum"), expected.sum(), atol=1e-3, rtol=1e-5)
    torch.testing.assert_close(model(ids, targets), expected.sum() / 27, atol=1e-4, rtol=1e-5)


def test_every_parameter_gets_the_gradient_of_the_reference():
    config = GPTConfig(16, 90, 3, 4, 2, 32, "SL")
    model, ids, targets = lively_model(config), random_ids(1, 6), random_ids(1, 6, seed=1)
    model(ids, targets, reduction="sum").backward()
    weights = {name: p.detach().double().requires_grad_() for name, p in model.named_parameters()}
    logits = reference_model.logits(weights, config, ids[0])
    torch.nn.functional.cross_entropy(logits, targets[0], reduction="sum").backward()
    for name, parameter in model.named_parameters():
        expected = weights[name].grad
        assert expected is not None, name
        error = (parameter.grad.double() - expected).norm() / expected.norm()
        assert error < 1e-3, f"{name}: relative error {error:.2g}"


def test_a_model_that_was_first_used_for_inference_can_be_trained():
    model, ids = lively_model(TINY), random_ids(1, 8)
    with torch.inference_mode():
        model(ids)
    model(ids, ids).backward()
    assert model.lm_head.weight.grad.any()


def test_a_model_made_without_memory_gets_the_same_weights():
    with torch.device("meta"):
        model = GPT(TINY)
    assert all(p.is_meta for p in model.parameters())
    model.to_empty(device="cpu")
    torch.manual_seed(99)  # initialisation has its own generator
    model.init_weights(7)
    other = GPT(TINY)
    other.init_weights(7)
    for (name, a), b in zip(model.named_parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b), name
    assert torch.equal(model(random_ids(1, 8)), other(random_ids(1, 8)))


def test_initial_weights_follow_the_specification():
    config = GPTConfig(64, 256, 4, 4, 4, 256, "SSSL")
    model = GPT(config)
    model.init_weights(0)
    weights, bound = model.state_dict(), (3 / 256) ** 0.5
    assert weights["transformer.wte.weight"].std() == pytest.approx(0.8, rel=0.02)
    assert weights["lm_head.weight"].std() == pytest.approx(0.001, rel=0.02)
    for name, limit in (("attn.c_q", bound), ("attn.c_k", bound), ("attn.c_v", bound), ("mlp.c_fc", 0.4 * bound)):
        weight = weights[f"transformer.h.2.{name}.weight"]
        assert limit * 0.99 < weight.abs().max() <= limit
        assert weight.mean().abs() < 0.02 * limit
    assert not weights["transformer.h.0.attn.c_proj.weight"].any()
    assert not weights["transformer.h.0.mlp.c_proj.weight"].any()
    assert weights["value_embeds.3.weight"].abs().max() <= bound
    for name in ("transformer.h.1.attn.ve_gate.weight", "smear_gate.weight"):
        assert 0 <= weights[name].min() < weights[name].max() <= 0.02
    assert weights["resid_lambdas"].tolist() == pytest.approx([1.15, 1.15 - 0.1 / 3, 1.15 - 0.2 / 3, 1.05])
    assert weights["x0_lambdas"].tolist() == pytest.approx([0.20, 0.15, 0.10, 0.05])
    assert weights["smear_lambda"].tolist() == [0.0]
    assert weights["backout_lambda"].tolist() == pytest.approx([0.2])


def test_parameter_names_are_those_of_public_checkpoints():
    names = set(GPT(GPTConfig(16, 90, 2, 4, 2, 32, "SL")).state_dict())
    layer = ("attn.c_q", "attn.c_k", "attn.c_v", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
    assert names == {
        "transformer.wte.weight", "lm_head.weight", "value_embeds.1.weight", "transformer.h.1.attn.ve_gate.weight",
        "resid_lambdas", "x0_lambdas", "smear_gate.weight", "smear_lambda", "backout_lambda",
        *(f"transformer.h.{i}.{name}.weight" for i in range(2) for name in layer),
    }  # fmt: skip


def test_generation_is_repeatable_and_greedy_generation_takes_the_likeliest():
    model = lively_model(TINY)
    sample = list(model.generate([1, 2, 3], 8, seed=5))
    assert sample == list(model.generate([1, 2, 3], 8, seed=5))
    assert sample != list(model.generate([1, 2, 3], 8, seed=6))
    greedy = list(model.generate([1, 2, 3], 8, temperature=0))
    assert greedy == list(model.generate([1, 2, 3], 8, top_k=1, seed=1))
    ids = [1, 2, 3]
    for token in greedy:
        assert token == int(model(torch.tensor([ids]))[0, -1].argmax())
        ids.append(token)


def test_a_frozen_model_computes_the_same_from_smaller_weights():
    model, ids = lively_model(TINY).set_dtype(torch.bfloat16), random_ids(1, 16)
    before = model(ids)
    model.freeze(torch.bfloat16)
    assert model.lm_head.weight.dtype == torch.bfloat16
    assert not any(p.requires_grad for p in model.parameters())
    torch.testing.assert_close(model(ids), before)


def test_where_nothing_faster_works_training_runs_eagerly_and_says_why(monkeypatch):
    model = lively_model(TINY)
    assert prepare_for_training(model, "off", "off") == (model, "eager: compiling is switched off")
    assert prepare_for_training(model, "off")[1].startswith("eager: our kernels are switched off, and compiling pays")
    monkeypatch.setenv("CXX", "/nowhere/c++")
    losses, mode = prepare_for_training(model, "off", "on")
    assert losses is model
    assert mode.startswith("eager: torch.compile cannot work: no C++ compiler: $CXX is /nowhere/c++")
    with pytest.raises(UsageError, match="--kernels on and --compile on exclude each other"):
        prepare_for_training(model, "on", "on")


@pytest.mark.slow
def test_the_compiled_forward_gives_the_same_loss_and_gradients(monkeypatch):
    # torch reads $CXX when its compiler is imported, which may have been in a test that had set it to nowhere
    monkeypatch.setattr(torch._inductor.config.cpp, "cxx", (None, os.environ.get("CXX", "g++")))
    config = GPTConfig(16, 90, 2, 4, 2, 32, "L")
    model, ids, targets = lively_model(config), random_ids(2, 16), random_ids(2, 16, seed=1)
    losses, mode = prepare_for_training(model, "off", "on")
    assert mode == "compiled"
    results = []
    for function in (model, losses):
        total = function(ids, targets, reduction="sum")
        results.append((total, torch.autograd.grad(total, list(model.parameters()))))
    torch.testing.assert_close(results[0][0], results[1][0])
    for a, b in zip(results[0][1], results[1][1], strict=True):
        torch.testing.assert_close(a, b, atol=2e-4, rtol=1e-3)
