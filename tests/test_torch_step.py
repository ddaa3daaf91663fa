"""A step of many sequences over blocks gives the logits of whole sequences, however they are cut and mixed."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nanochat_ray.model.gpt import GPT, GPTConfig
from nanochat_ray.model.ragged import BLOCK, RaggedBatch, window_groups
from nanochat_ray.model.torch_step import TorchStep

VOCAB = 90


def network(kv_heads: int, pattern: str = "SL", dtype: torch.dtype = torch.float32) -> GPT:
    """Windows of 128 and 300; value embeddings, smear and backout are not zero."""
    model = GPT(GPTConfig(300, VOCAB, n_layer=4, n_head=4, n_kv_head=kv_heads, n_embd=32, window_pattern=pattern))
    model.init_weights(0)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for weight in model.parameters():
            weight += 0.2 * torch.randn(weight.shape, generator=generator)
    return model.freeze(dtype)


# The step and the whole sequence differ by 3e-6 at most, as torch rounds products of other shapes otherwise.
TOLERANCE = 1e-4

NETWORKS = {kv_heads: network(kv_heads) for kv_heads in (1, 2, 4)}
BLOCKS = 80  # per group; four sequences of 300 positions need 76


class Sequences:
    """Sequences that are read a part at a time. Their blocks are scattered; those that no window reaches become -1 and
    are filled with NaN at once, so that whoever still looks at one is found out.
    """

    def __init__(self, model: GPT, lengths: list[int], seed: int = 0) -> None:
        random = np.random.default_rng(seed)
        self.step = TorchStep(model)
        self.step.allocate([BLOCKS] * len(self.step.groups))
        for tensor in (*self.step._keys, *self.step._values):
            tensor.fill_(torch.nan)  # what was never written must never be seen
        self.ids = [random.integers(0, VOCAB, length) for length in lengths]
        self.stored = [0] * len(lengths)
        self.free = [random.permutation(BLOCKS).tolist() for _ in self.step.groups]
        self.tables: list[list[list[int]]] = [[[] for _ in lengths] for _ in self.step.groups]

    @property
    def unfinished(self) -> list[int]:
        return [s for s, ids in enumerate(self.ids) if self.stored[s] < len(ids)]

    def read(self, counts: dict[int, int], wanted: str = "all") -> dict[tuple[int, int], np.ndarray]:
        """One step of `counts[s]` tokens of each sequence s; all, the last or no logits by (sequence, position)."""
        parts = [(s, self.stored[s], min(self.stored[s] + count, len(self.ids[s]))) for s, count in counts.items()]
        places = [(s, position) for s, first, end in parts for position in range(first, end)]
        starts = np.cumsum([0, *(end - first for _, first, end in parts)])
        indices = {"all": np.arange(len(places)), "last": starts[1:] - 1, "no": starts[:0]}[wanted]
        batch = RaggedBatch(
            ids=np.array([self.ids[s][p] for s, p in places], dtype=np.int32),
            previous=np.array([self.ids[s][p - 1] if p else -1 for s, p in places], dtype=np.int32),
            positions=np.array([p for _, p in places], dtype=np.int32),
            starts=starts.astype(np.int32),
            tables=tuple(self._table(group, parts) for group in range(len(self.tables))),
            wanted=indices.astype(np.int32),
        )
        logits_RV = self.step.forward(batch)
        assert logits_RV.dtype == np.float32
        assert logits_RV.shape == (len(indices), VOCAB)
        for s, _, end in parts:
            self.stored[s] = end
            self._forget(s)
        return {places[index]: row for index, row in zip(indices, logits_RV, strict=True)}

    def _table(self, group: int, parts: list[tuple[int, int, int]]) -> np.ndarray:
        for s, _, end in parts:
            while len(self.tables[group][s]) * BLOCK < end:
                self.tables[group][s].append(self.free[group].pop())
        rows = [self.tables[group][s] for s, _, _ in parts]
        width = max(map(len, rows)) + 1  # one column more than anybody needs
        return np.array([row + [-1] * (width - len(row)) for row in rows], dtype=np.int32)

    def _forget(self, s: int) -> None:
        for group, of_group in enumerate(self.step.groups):
            table = self.tables[group][s]
            for column in range(max(0, self.stored[s] - of_group.window) // BLOCK):
                if table[column] >= 0:
                    slots = slice(table[column] * BLOCK, (table[column] + 1) * BLOCK)
                    self.step._keys[group][:, slots] = torch.nan
                    self.step._values[group][:, slots] = torch.nan
                    self.free[group].insert(0, table[column])
                    table[column] = -1


@torch.inference_mode()
def whole_logits(model: GPT, ids: np.ndarray) -> np.ndarray:
    return model(torch.from_numpy(ids)[None])[0].numpy()


def check(sequences: Sequences, logits: dict[tuple[int, int], np.ndarray]) -> None:
    model = sequences.step.model
    for s, ids in enumerate(sequences.ids):
        expected_TV = whole_logits(model, ids)
        for position in range(len(ids)):
            if (s, position) in logits:
                np.testing.assert_allclose(logits[s, position], expected_TV[position], atol=TOLERANCE, rtol=0)


mixes = given(
    kv_heads=st.sampled_from([1, 2, 4]),
    lengths=st.lists(st.integers(1, 300), min_size=1, max_size=4),
    data=st.data(),
)


def check_mix(kv_heads, lengths, data):
    sequences, logits = Sequences(NETWORKS[kv_heads], lengths, seed=len(lengths)), {}
    while unfinished := sequences.unfinished:
        taking_part = data.draw(st.lists(st.sampled_from(unfinished), min_size=1, unique=True))
        logits |= sequences.read({s: data.draw(st.sampled_from([300, 1, 5, 16, 70, 129])) for s in taking_part})
    assert len(logits) == sum(lengths)
    check(sequences, logits)


@mixes
@settings(max_examples=6)
def test_any_mix_of_chunks_gives_the_logits_of_the_whole_sequences(kv_heads, lengths, data):
    check_mix(kv_heads, lengths, data)


@pytest.mark.slow
@mixes
@settings(max_examples=100)
def test_any_of_many_mixes_of_chunks_gives_the_logits_of_the_whole_sequences(kv_heads, lengths, data):
    check_mix(kv_heads, lengths, data)


@pytest.mark.parametrize("kv_heads", [1, 4])
def test_token_by_token_across_the_edge_of_the_window(kv_heads):
    sequences = Sequences(NETWORKS[kv_heads], [150, 133, 3])
    logits = sequences.read({0: 125, 1: 110, 2: 1})
    while unfinished := sequences.unfinished:
        logits |= sequences.read(dict.fromkeys(unfinished, 1))
    check(sequences, logits)


def test_one_token_alone_and_the_last_position_of_the_context():
    sequences = Sequences(NETWORKS[2], [300, 1])
    check(sequences, sequences.read({1: 1}) | sequences.read({0: 299}) | sequences.read({0: 1}))


@pytest.mark.parametrize("pattern", ["S", "L", "SSL"])
def test_every_pattern_of_windows(pattern):
    sequences, logits = Sequences(network(2, pattern), [200, 140]), {}
    for count in (64, 64, 30, 300):
        logits |= sequences.read(dict.fromkeys(sequences.unfinished, count))
    check(sequences, logits)


def test_only_the_wanted_logits_come_in_the_order_of_their_tokens():
    sequences = Sequences(NETWORKS[2], [40, 7, 90])
    logits = sequences.read({2: 90, 0: 33, 1: 7}, wanted="last")
    assert list(logits) == [(2, 89), (0, 32), (1, 6)]
    check(sequences, logits)


def test_a_step_without_wanted_logits_stores_what_it_reads():
    sequences = Sequences(NETWORKS[2], [50])
    assert sequences.read({0: 20}, wanted="no") == {}
    check(sequences, sequences.read({0: 30}))


def test_bf16_is_close_to_fp32():
    # bf16 keeps 8 bits, so that logits which reach 5 are off by about 0.01, by 0.1 in the worst place: the step may not
    # be further from fp32 than the whole sequence in bf16 is, which rounds otherwise.
    sequences, exact = Sequences(network(2, dtype=torch.bfloat16), [200, 140]), NETWORKS[2]
    logits = {}
    for count in (100, 1, 1, 300):
        logits |= sequences.read(dict.fromkeys(sequences.unfinished, count))
    for s, ids in enumerate(sequences.ids):
        expected_TV = whole_logits(exact, ids)
        error_TV = np.abs(np.array([logits[s, position] for position in range(len(ids))]) - expected_TV)
        of_whole_TV = np.abs(whole_logits(sequences.step.model, ids) - expected_TV)
        assert error_TV.mean() <= 1.1 * of_whole_TV.mean()
        assert error_TV.max() <= 2 * of_whole_TV.max() < 0.3


def test_the_bytes_of_a_block_are_what_is_allocated():
    for dtype in (torch.float32, torch.bfloat16):
        step = TorchStep(network(2, dtype=dtype))
        assert [group.window for group in step.groups] == [128, 300]
        assert step.groups == window_groups(step.model.config)
        step.allocate([3, 5])
        for group, blocks in enumerate((3, 5)):
            allocated = step._keys[group].nbytes + step._values[group].nbytes
            assert allocated == blocks * step.block_bytes(group)
