import gc
import os
import platform
import threading
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels.cpu_step import CpuStep, why_not
from nanochat_ray.errors import UserError
from nanochat_ray.model.gpt import GPT, GPTConfig
from nanochat_ray.model.ragged import BLOCK, RaggedBatch
from tests import reference_model

FP32, BF16, INT8 = torch.float32, torch.bfloat16, torch.int8
# Short windows of 128 positions, so texts of up to 300 leave blocks behind. Odd vocabularies, grouped heads, all sizes
# of heads that take different paths, and every other layer with value embeddings.
MIXED = GPTConfig(sequence_len=512, vocab_size=90, n_layer=3, n_head=4, n_kv_head=2, n_embd=128, window_pattern="SSL")
SHAPES = [
    MIXED,
    GPTConfig(256, 333, 5, 3, 3, 96, "SL"),
    GPTConfig(512, 67, 4, 2, 1, 128, "SSSL"),
    GPTConfig(256, 300, 1, 1, 1, 128, "S"),
    GPTConfig(512, 90, 2, 6, 1, 192, "S"),
]
OTHER_MACHINES = [
    pytest.param(("-DPORTABLE",), id="portable"),
    pytest.param(
        ("-mno-avx512bf16", "-mno-avx512vnni"),
        id="older avx512, or avx2",
        marks=[pytest.mark.slow, pytest.mark.skipif(platform.machine() != "x86_64", reason="code for x86")],
    ),
    pytest.param(
        ("-march=x86-64-v3",),
        id="avx2",
        marks=pytest.mark.skipif(platform.machine() != "x86_64", reason="code for x86"),
    ),
]

if reason := why_not(MIXED, FP32):
    assert not os.environ.get("CI"), f"no CPU kernel here: {reason}; CI must not skip what needs it"
    pytest.skip(f"no CPU kernel here: {reason}", allow_module_level=True)


def lively_model(config: GPTConfig, seed: int = 0) -> GPT:
    """Nothing is zero, so every part shows in the logits; no gradients."""
    model = GPT(config).requires_grad_(False)
    model.init_weights(seed)
    generator = torch.Generator().manual_seed(seed + 1)
    for parameter in model.parameters():
        parameter += 0.15 * torch.randn(parameter.shape, generator=generator)
    return model


def random_ids(length: int, seed: int = 0, vocab_size: int = 67) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, vocab_size, length, dtype=np.int32)


@dataclass
class Text:
    """A sequence with blocks of its own; `read` tokens are stored."""

    ids: np.ndarray
    tables: list[np.ndarray]  # per group
    read: int = 0


def new_texts(step: CpuStep, all_ids: list[np.ndarray], seed: int | None = None) -> list[Text]:
    """Texts whose blocks are scattered by the seed, in memory full of NaN: whatever is not written must not show."""
    needs = [-(-len(ids) // BLOCK) for ids in all_ids]
    step.allocate([sum(needs) + 3] * len(step.groups))
    texts = [Text(ids, []) for ids in all_ids]
    for group in range(len(step.groups)):
        step.stored(group)[:] = 0xFF
        free = np.arange(sum(needs) + 3, dtype=np.int32)
        if seed is not None:
            np.random.default_rng(seed + group).shuffle(free)
        for text, need in zip(texts, needs, strict=True):
            table, free = free[:need], free[need:]
            text.tables.append(table)
    return texts


def batch_of(step: CpuStep, parts: list[tuple[Text, int]]) -> RaggedBatch:
    """The next tokens of some texts, with logits wanted after each; blocks no window reaches are not in the tables."""
    slices = [slice(text.read, text.read + count) for text, count in parts]
    tables = []
    for number, group in enumerate(step.groups):
        table = np.full((len(parts), max(len(text.tables[number]) for text, _ in parts)), -1, np.int32)
        for row, (text, _) in zip(table, parts, strict=True):
            first = max(0, text.read - group.window) // BLOCK
            row[first : len(text.tables[number])] = text.tables[number][first:]
        tables.append(table)
    return RaggedBatch(
        ids=np.concatenate([text.ids[part] for (text, _), part in zip(parts, slices, strict=True)]),
        previous=np.concatenate([np.r_[-1, text.ids][part] for (text, _), part in zip(parts, slices, strict=True)]),
        positions=np.concatenate([np.arange(part.start, part.stop) for part in slices]),
        starts=np.cumsum([0, *(count for _, count in parts)]),
        tables=tuple(tables),
        wanted=np.arange(sum(count for _, count in parts)),
    )


def read(step: CpuStep, parts: list[tuple[Text, int]], wanted: np.ndarray | None = None) -> list[np.ndarray]:
    """Logits after each token, per text; NaN where they are not wanted."""
    batch = batch_of(step, parts)
    logits = np.full((len(batch.ids), step.vocab_size), np.nan, np.float32)
    wanted = batch.wanted if wanted is None else wanted
    logits[wanted] = step.forward(replace(batch, wanted=wanted))
    for text, count in parts:
        text.read += count
    return np.split(logits, np.cumsum([count for _, count in parts])[:-1])


def read_alone(step: CpuStep, ids: np.ndarray, chunks: list[int] | None = None) -> np.ndarray:
    (text,) = new_texts(step, [ids])
    return np.concatenate([read(step, [(text, count)])[0] for count in chunks or [len(ids)]])


def assert_same_bits(got: np.ndarray, expected: np.ndarray) -> None:
    np.testing.assert_array_equal(got.view(np.uint32), np.ascontiguousarray(expected).view(np.uint32))


def expected_logits(model: GPT, ids: np.ndarray) -> np.ndarray:
    with torch.inference_mode():
        return model(torch.from_numpy(ids.astype(np.int64))[None])[0].numpy()


@pytest.mark.parametrize("config", SHAPES)
def test_fp32_logits_are_those_of_the_network_in_prefill_chunks_and_decode(config):
    model, ids = lively_model(config), random_ids(230)
    expected = expected_logits(model, ids)
    with_chunks = [7, 1, 120, 1, 1, 33, 60, *[1] * 7]
    step = CpuStep(model, FP32, threads=2)
    for chunks in ([230], with_chunks):
        np.testing.assert_allclose(read_alone(step, ids, chunks), expected, atol=1e-4, rtol=0)
    assert step.vocab_size == config.vocab_size


def test_fp32_logits_are_those_of_the_slow_reference():
    model, ids = lively_model(MIXED), random_ids(20)
    expected = reference_model.logits(model.state_dict(), MIXED, torch.from_numpy(ids.astype(np.int64)))
    np.testing.assert_allclose(read_alone(CpuStep(model, FP32, 1), ids), expected.numpy(), atol=1e-4, rtol=0)


def test_logits_far_beyond_the_cap_are_capped():
    model, ids = lively_model(MIXED), random_ids(5)
    model.lm_head.weight.mul_(1e4)
    logits = read_alone(CpuStep(model, FP32, threads=1), ids)
    assert np.abs(logits).max() == 15.0
    np.testing.assert_allclose(logits, expected_logits(model, ids), atol=1e-3, rtol=0)


@pytest.mark.parametrize("config", SHAPES)
def test_bf16_is_as_near_to_fp32_as_torch_in_bf16(config):
    model, ids = lively_model(config), random_ids(230)
    exact = expected_logits(model, ids)
    torch_error = np.abs(expected_logits(model.set_dtype(BF16), ids) - exact).mean()
    error = np.abs(read_alone(CpuStep(model, BF16, threads=2), ids, [200, *[1] * 30]) - exact).mean()
    assert error < 1.1 * torch_error
    assert error < 0.03 * np.abs(exact).mean()


@pytest.mark.parametrize("config", SHAPES)
def test_int8_is_near_fp32_and_near_bf16_with_the_same_rounded_weights(config):
    model, ids = lively_model(config), random_ids(230)
    exact = expected_logits(model, ids)
    logits = read_alone(CpuStep(model, INT8, threads=2), ids, [200, *[1] * 30])
    assert np.abs(logits - exact).mean() < 0.05 * np.abs(exact).mean()
    for linear in (module for module in model.modules() if isinstance(module, torch.nn.Linear)):
        if linear not in [block.attn.ve_gate for block in model.blocks]:
            factors = linear.weight.abs().amax(dim=1, keepdim=True) / 127
            linear.weight.copy_((linear.weight / factors).round() * factors)
    rounded = expected_logits(model, ids)
    assert np.abs(logits - rounded).mean() < 0.8 * np.abs(logits - exact).mean()


@pytest.mark.parametrize("damage", [float("nan"), float("inf")])
@pytest.mark.parametrize("place", ["transformer.wte.weight", "lm_head.weight", "transformer.h.1.mlp.c_fc.weight"])
def test_a_damaged_model_shows_in_int8_too(damage, place):
    model = lively_model(MIXED)
    model.get_parameter(place)[:] = damage
    assert not np.isfinite(read_alone(CpuStep(model, INT8, 1), random_ids(5))).any()


@pytest.mark.parametrize("flags", OTHER_MACHINES)
@pytest.mark.parametrize("dtype", [FP32, BF16, INT8])
def test_code_for_other_machines_computes_the_same(flags, dtype):
    model, ids = lively_model(MIXED), random_ids(160)
    exact = expected_logits(model, ids)
    step = CpuStep(model, dtype, 2, extra_flags=flags)
    whole = read_alone(step, ids)
    error = np.abs(whole - exact)
    assert error.max() < 1e-4 if dtype == FP32 else error.mean() < 0.05 * np.abs(exact).mean()
    assert_same_bits(read_alone(step, ids, [50, 1, 2, 3, 97, 7]), whole)
    if dtype == INT8:  # the sums of matrices are equal; attention's scores are bf16, and rarely tip a rounding
        here = read_alone(CpuStep(model, INT8, 2), ids)
        assert np.abs(whole - here).mean() < 0.01 * error.mean()


MIXED_MODEL = lively_model(MIXED)
STEPS = {
    (dtype, threads): CpuStep(MIXED_MODEL, dtype, threads) for dtype in (FP32, BF16, INT8) for threads in (1, 2, 5)
}
ALONE: dict[tuple[torch.dtype, int], np.ndarray] = {}


def alone(dtype: torch.dtype, seed: int) -> np.ndarray:
    """Logits (300, V) of one of the texts, read at once, with nothing beside it, on one thread."""
    if (dtype, seed) not in ALONE:
        ALONE[dtype, seed] = read_alone(STEPS[dtype, 1], random_ids(300, seed))
    return ALONE[dtype, seed]


@given(
    dtype=st.sampled_from([FP32, BF16, INT8]),
    threads=st.sampled_from([1, 2, 5]),
    seeds=st.lists(st.integers(0, 5), min_size=1, max_size=6, unique=True),
    longest=st.sampled_from([1, 2, 9, 40, 256]),
    blocks=st.integers(0, 1000),
    chance=st.randoms(use_true_random=False),
)
@settings(max_examples=60)
def test_every_bit_is_the_same_in_any_company_cut_order_place_and_number_of_threads(
    dtype, threads, seeds, longest, blocks, chance
):
    step = STEPS[dtype, threads]
    texts = new_texts(step, [random_ids(300, seed)[: chance.randint(1, 300)] for seed in seeds], blocks)
    got: list[list[np.ndarray]] = [[] for _ in texts]
    for _ in range(25):
        going = [number for number, text in enumerate(texts) if text.read < len(text.ids)]
        chosen = chance.sample(going, chance.randint(min(1, len(going)), len(going)))
        if not chosen:
            break
        parts = [
            (texts[n], min(chance.choice([1, chance.randint(1, longest)]), len(texts[n].ids) - texts[n].read))
            for n in chosen
        ]
        tokens = range(sum(count for _, count in parts))
        wanted = chance.choice([tokens, chance.sample(tokens, chance.randint(0, len(tokens))), [tokens[-1]]])
        for number, logits in zip(chosen, read(step, parts, np.array(sorted(wanted), np.int32)), strict=True):
            got[number].append(logits)
    for text, seed, logits in zip(texts, seeds, got, strict=True):
        joined = np.concatenate([np.empty((0, step.vocab_size), np.float32), *logits])
        wanted = ~np.isnan(joined).all(axis=1)
        assert_same_bits(joined[wanted], alone(dtype, seed)[: text.read][wanted])


@pytest.mark.parametrize("dtype", [FP32, BF16, INT8])
def test_a_long_chunk_decode_and_many_short_sequences_meet_the_same_bits(dtype):
    """Row counts that take every kind of tile: 1 … 40 sequences at once beside a prompt that is read whole."""
    step, ids = STEPS[dtype, 2], random_ids(300, 0)
    for count in (*range(1, 27), 31, 36, 37, 40):
        texts = new_texts(step, [ids[:3]] * count, seed=count)
        read(step, [(text, 1) for text in texts])
        for logits in read(step, [(text, 1 + n % 2) for n, text in enumerate(texts)]):
            assert_same_bits(logits, alone(dtype, 0)[1 : 1 + len(logits)])


def test_only_wanted_tokens_give_logits():
    step = STEPS[FP32, 2]
    texts = new_texts(step, [random_ids(300, 1), random_ids(300, 2)])
    batch = batch_of(step, [(texts[0], 40), (texts[1], 17)])
    assert step.forward(replace(batch, wanted=np.array([], np.int32))).shape == (0, 90)
    logits = step.forward(replace(batch, wanted=np.array([39, 56])))
    assert_same_bits(logits, np.stack([alone(FP32, 1)[39], alone(FP32, 2)[16]]))


def test_blocks_of_others_are_left_alone():
    step = STEPS[BF16, 2]
    text, other = new_texts(step, [random_ids(150), random_ids(150)], seed=3)
    for group in range(len(step.groups)):
        step.stored(group)[:] = 0xAB
    read(step, [(text, 140)])
    read(step, [(text, 1)])
    for group, of_group in enumerate(step.groups):
        stored = step.stored(group)
        assert stored.shape[0] == len(of_group.layers)
        assert stored.nbytes == stored.shape[1] * step.block_bytes(group)
        written = (stored != 0xAB).any(axis=2)
        assert written[:, text.tables[group][: -(-141 // BLOCK)]].all()
        assert not written[:, other.tables[group]].any()
        assert written.sum() == len(of_group.layers) * -(-141 // BLOCK)


def test_the_model_may_be_dropped_and_a_closed_step_refuses():
    model = lively_model(MIXED, seed=4)
    expected = expected_logits(model, random_ids(30))
    step = CpuStep(model, FP32, 2)
    del model
    gc.collect()
    np.testing.assert_allclose(read_alone(step, random_ids(30)), expected, atol=1e-4, rtol=0)
    step.close()
    with pytest.raises(ValueError, match="closed"):
        read_alone(step, random_ids(30))


def test_a_dropped_step_ends_its_threads():
    before = len(_native_threads())
    step = CpuStep(MIXED_MODEL, FP32, 4)
    assert len(_native_threads()) == before + 3
    del step
    gc.collect()
    assert len(_native_threads()) == before


def _native_threads() -> list[str]:
    import os

    if not os.path.isdir("/proc/self/task"):
        pytest.skip("no /proc to count threads in")
    return os.listdir("/proc/self/task")


def test_steps_of_several_models_may_run_at_once():
    results: dict[int, np.ndarray] = {}
    steps = [CpuStep(MIXED_MODEL, FP32, 2) for _ in range(3)]

    def work(number: int) -> None:
        results[number] = read_alone(steps[number], random_ids(300, 3), [100] * 3)

    workers = [threading.Thread(target=work, args=(number,)) for number in range(3)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    for number in range(3):
        assert_same_bits(results[number], alone(FP32, 3))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"ids": [90, 1, 2]}, "ids must lie in 0 … 89"),
        ({"ids": [0, -1, 2]}, "ids must lie"),
        ({"previous": [-1, 90, 2]}, "ids must lie"),
        ({"previous": [-1, 1]}, "2 previous ids"),
        ({"positions": [0, 1, 3]}, "ascend by one"),
        ({"positions": [-1, 0, 1]}, "ascend by one"),
        ({"positions": [510, 511, 512]}, "within 0 … 511"),
        ({"starts": [0, 2]}, "do not cut 3 tokens"),
        ({"starts": [0, 0, 3]}, "at least one"),
        ({"starts": [0]}, "do not cut"),
        ({"starts": [0, 1, 3]}, "lacks blocks"),
        ({"wanted": [1, 1]}, "must ascend"),
        ({"wanted": [3]}, "within 0 … 2"),
        ({"wanted": [-1]}, "within 0 … 2"),
        ({"tables": ([[4]], [[0]])}, "window 128 lacks blocks"),
        ({"tables": ([[0]], [[-1]])}, "window 512 lacks blocks"),
        ({"tables": ([[0]], np.zeros((1, 0)))}, "window 512 lacks blocks"),
        ({"tables": ([[0]],)}, "tables of another model"),
        ({"positions": [16, 17, 18]}, "lacks blocks"),
    ],
)
def test_a_batch_that_would_corrupt_memory_is_refused(change, message):
    step = STEPS[FP32, 1]
    step.allocate([4, 4])
    good = RaggedBatch(
        *map(np.array, ([3, 1, 2], [-1, 3, 1], [0, 1, 2], [0, 3])), (np.zeros((1, 1)), np.zeros((1, 1))), np.array([2])
    )
    assert step.forward(good).shape == (1, 90)
    if "tables" in change:
        changed = {"tables": tuple(np.array(table) for table in change["tables"])}
    else:
        changed = {name: np.array(values) for name, values in change.items()}
    with pytest.raises(ValueError, match=message):
        step.forward(replace(good, **changed))


def test_shapes_and_dtypes_it_does_not_know_are_named():
    assert "head size that is a multiple of 32, not 16" in why_not(replace(MIXED, n_head=8), FP32)
    assert "float16" in why_not(MIXED, torch.float16)
    with pytest.raises(UserError, match="multiple of 32"):
        CpuStep(GPT(replace(MIXED, n_head=8)), FP32, 1)
