"""Two generations of the public nanochat in one model: July 2026, and October 2025 without the extras."""

import json
from dataclasses import asdict, replace

import numpy as np
import pytest
import torch

from nanochat_ray.model.gpt import GPT, GPTConfig
from nanochat_ray.model.optim import build_optimizer
from nanochat_ray.model.ragged import BLOCK, RaggedBatch, StepModel
from nanochat_ray.model.torch_step import TorchStep
from nanochat_ray.plan import Plan, make_plan, table
from nanochat_ray.plan.record import differences
from nanochat_ray.plan.shape import OCTOBER_2025, ModelShape
from tests import public_nanochat, reference_model
from tests.public_nanochat import JULY, OCTOBER, PublicModel, make_model

EXTRAS = ("layer_scalars", "smear", "backout", "value_embeddings")


def shape_of(public: PublicModel) -> ModelShape:
    older = OCTOBER_2025 if public.generation == OCTOBER else {}
    return ModelShape(**{**public.config, **older})


def loaded(public: PublicModel) -> GPT:
    """The network with the public weights; the older generation's tables get the rows that pad the vocabulary."""
    model = GPT(shape_of(public))
    rows = model.config.padded_vocab_size
    tables = ("transformer.wte.weight", "lm_head.weight")
    model.load_state_dict(
        {
            name: torch.nn.functional.pad(w, (0, 0, 0, rows - len(w))) if name in tables else w
            for name, w in public.weights.items()
        }
    )
    return model


def ids_of(public: PublicModel, length: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, public.config["vocab_size"], (length,), generator=torch.Generator().manual_seed(seed))


def read_at_once(step: StepModel, ids: torch.Tensor, parts: list[int]) -> np.ndarray:
    """Logits (T, V) of one sequence, read in parts."""
    step.allocate([-(-len(ids) // BLOCK)] * len(step.groups))
    logits, start = [], 0
    for count in parts:
        positions = np.arange(start, start + count, dtype=np.int32)
        batch = RaggedBatch(
            ids=ids[positions].numpy().astype(np.int32),
            previous=np.array([ids[p - 1] if p else -1 for p in positions], dtype=np.int32),
            positions=positions,
            starts=np.array([0, count], dtype=np.int32),
            tables=tuple(np.arange(-(-len(ids) // BLOCK), dtype=np.int32)[None] for _ in step.groups),
            wanted=np.arange(count, dtype=np.int32),
        )
        logits.append(step.forward(batch))
        start += count
    return np.concatenate(logits)


@pytest.mark.parametrize("generation", [JULY, OCTOBER])
@pytest.mark.parametrize("changes", [{}, {"n_layer": 1}, {"n_layer": 4, "n_kv_head": 4}, {"n_kv_head": 1}])
def test_both_generations_agree_with_the_reference_whole_and_in_parts(generation, changes):
    public = make_model(generation, **changes)
    model, ids = loaded(public), ids_of(public, 200)
    expected = public_nanochat.logits(public, ids)
    with torch.inference_mode():
        torch.testing.assert_close(model(ids[None])[0].double(), expected, atol=1e-4, rtol=0)
        cache = model.new_cache(1, 200)
        parts = torch.cat([model.extend(part[None], cache, last_only=False)[0] for part in ids.split([150, 1, 49])])
    torch.testing.assert_close(parts.double(), expected, atol=1e-4, rtol=0)


def test_the_two_references_agree_on_the_newer_generation():
    public = make_model(JULY)
    ids = ids_of(public, 12)
    expected = reference_model.logits(public.weights, shape_of(public), ids)
    torch.testing.assert_close(public_nanochat.logits(public, ids), expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize("generation", [JULY, OCTOBER])
@pytest.mark.parametrize("backend", ["torch", "fused"])
def test_both_generations_are_served_alike(generation, backend):
    public = make_model(generation, n_head=2, n_kv_head=1)
    model, ids = loaded(public).freeze(torch.float32), ids_of(public, 180)
    if backend == "torch":
        step: StepModel = TorchStep(model)
    else:
        from kernels.cpu_step import CpuStep, why_not

        if reason := why_not(model.config, torch.float32):
            pytest.skip(f"no CPU kernel here: {reason}")
        step = CpuStep(model, torch.float32, threads=1)
    logits = read_at_once(step, ids, [140, 1, 39])
    np.testing.assert_allclose(logits, public_nanochat.logits(public, ids).numpy(), atol=1e-4, rtol=0)


def test_the_fused_step_in_bf16_is_near_the_older_generation():
    from kernels.cpu_step import CpuStep, why_not

    public = make_model(OCTOBER, n_head=2, n_kv_head=1)
    model, ids = loaded(public), ids_of(public, 60)
    if reason := why_not(model.config, torch.bfloat16):
        pytest.skip(f"no CPU kernel here: {reason}")
    expected = public_nanochat.logits(public, ids).numpy()
    logits = read_at_once(CpuStep(model.freeze(torch.bfloat16), torch.bfloat16, threads=1), ids, [50, 10])
    assert np.abs(logits - expected).mean() < 0.03 * np.abs(expected).mean()


@pytest.mark.parametrize("absent", EXTRAS)
def test_an_extra_that_is_off_has_no_parameters_and_the_counts_say_so(absent):
    shape = replace(GPTConfig(256, 300, 3, 4, 2, 64, "SSL"), **{absent: False})
    model, counts = GPT(shape), shape.count_parameters()
    sizes = {name: parameter.numel() for name, parameter in model.named_parameters()}
    assert set(sizes) < set(GPT(GPTConfig(256, 300, 3, 4, 2, 64, "SSL")).state_dict())
    assert counts.total == sum(sizes.values())
    assert counts.value_embeddings == sum(size for name, size in sizes.items() if name.startswith("value_embeds."))
    inside = sum(size for name, size in sizes.items() if name.startswith("transformer.h."))
    assert counts.matrices == inside


def test_the_older_generation_has_the_names_of_its_public_checkpoints_and_no_others():
    public = make_model(OCTOBER)
    model = GPT(shape_of(public))
    assert set(model.state_dict()) == set(public.weights)
    assert model.config.windows == (256, 256, 256)
    assert model.config.count_parameters().scalars == 0


def test_the_older_generation_trains_and_saves_its_optimizer():
    public = make_model(OCTOBER)
    model, ids = loaded(public), ids_of(public, 64)[None]
    optimizer = build_optimizer(model, make_plan(depth=4).rates)
    losses = []
    for _ in range(4):
        loss = model(ids[:, :-1], ids[:, 1:])
        loss.backward()
        optimizer.step(lr_multiplier=1.0, momentum=0.9, weight_decay=0.0, grad_scale=1.0)
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.5
    state = optimizer.state_dict()
    again = build_optimizer(loaded(public), make_plan(depth=4).rates)
    again.load_state_dict(state)
    assert again.steps == 4
    assert not any(extra in name for name in state for extra in ("lambda", "smear", "value_embeds", "ve_gate"))


def test_initial_weights_of_the_older_generation_are_those_of_what_both_have():
    shape = GPTConfig(256, 300, 3, 4, 2, 64, "L")
    older = GPT(replace(shape, **OCTOBER_2025))
    older.init_weights(7)
    assert all(weight.isfinite().all() for weight in older.state_dict().values())
    assert older.state_dict()["transformer.wte.weight"].std() == pytest.approx(0.8, rel=0.05)


def test_a_plan_stored_before_there_were_generations_is_one_of_the_newer():
    plan = make_plan(depth=4)
    stored = json.loads(json.dumps(plan.to_dict()))
    for name in OCTOBER_2025.keys() - {"window_pattern"}:
        del stored["model"][name]
    assert Plan.from_dict(stored) == plan


def test_plans_of_two_generations_differ_by_name_and_their_tables_say_what_is_there():
    plan = make_plan(depth=4)
    model = replace(plan.model, **OCTOBER_2025)
    older = replace(plan, model=model, parameters=model.count_parameters())
    assert "model.rotary_base: 100000.0 → 10000.0" in differences(plan, older)
    assert "model.smear: True → False" in differences(plan, older)
    assert "smear, backout" in table(plan)
    assert "smear, backout" not in table(older)
    assert Plan.from_dict(json.loads(json.dumps(older.to_dict()))) == older
    assert GPTConfig.from_shape(older.model) == GPTConfig(**asdict(older.model))
