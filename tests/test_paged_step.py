"""The GPU's step over blocks gives the logits of whole sequences, on a CPU, with `varlen_attn` as documented."""

import sys

import numpy as np
import pytest
import torch
import torch.nn.attention.varlen
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels.gpu.flash import activate_flash, flash_choice, why_no_pages
from kernels.gpu.paged_step import LARGEST_GRAPH, PagedStep, why_not
from nanochat_ray.model.attention import causal_attention, flash_attention
from tests.fake_varlen import varlen_attn
from tests.test_torch_step import BLOCKS, NETWORKS, Sequences, check, network


@pytest.fixture(autouse=True, scope="module")
def _attention_as_documented():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.nn.attention.varlen, "varlen_attn", varlen_attn)
        yield


class Graphs:
    """What captures work on a CPU: a replay runs it again, and gives the same tensor every time, as a graph does."""

    def __init__(self) -> None:
        self.captured = self.replayed = 0

    def __call__(self, work):
        self.captured += 1
        result = work().clone()

        def replay():
            self.replayed += 1
            return result.copy_(work())

        return replay


class PagedSequences(Sequences):
    """The same with a `PagedStep`. Its spare blocks hold NaN as well: padding must not reach anyone's logits."""

    def __init__(self, model, lengths, seed=0, capture=None):
        super().__init__(model, lengths, seed)
        self.step = PagedStep(model, capture=capture)
        self.step.allocate([BLOCKS] * len(self.step.groups))
        for tensor in (*self.step._keys, *self.step._values):
            tensor.fill_(torch.nan)


@given(
    kv_heads=st.sampled_from([1, 2, 4]),
    lengths=st.lists(st.integers(1, 200), min_size=1, max_size=4),
    graphs=st.booleans(),
    data=st.data(),
)
@settings(max_examples=10)
def test_any_mix_of_chunks_gives_the_logits_of_the_whole_sequences(kv_heads, lengths, graphs, data):
    capture = Graphs() if graphs else None
    sequences, logits = PagedSequences(NETWORKS[kv_heads], lengths, len(lengths), capture), {}
    while unfinished := sequences.unfinished:
        taking_part = data.draw(st.lists(st.sampled_from(unfinished), min_size=1, unique=True))
        logits |= sequences.read({s: data.draw(st.sampled_from([200, 1, 16, 70, 129])) for s in taking_part})
    assert len(logits) == sum(lengths)
    check(sequences, logits)


def test_decoding_across_the_edge_of_the_window_and_of_blocks_replays_one_graph_per_power_of_two():
    graphs = Graphs()
    sequences = PagedSequences(NETWORKS[2], [133, 131, 18, 6], capture=graphs)
    logits = sequences.read({0: 126, 1: 126, 2: 15, 3: 5})
    steps = 0
    while unfinished := sequences.unfinished:
        logits |= sequences.read(dict.fromkeys(unfinished, 1))
        steps += 1
    check(sequences, logits)
    assert (graphs.captured, graphs.replayed, steps) == (3, steps, 7)  # for 4, 2 and 1 sequences; 3 use that for 4


def test_prompts_steps_without_all_logits_and_large_batches_run_without_a_graph():
    graphs = Graphs()
    count = LARGEST_GRAPH + 1
    sequences = PagedSequences(network(2, "L"), [1] * count, capture=graphs)
    sequences.read(dict.fromkeys(range(count), 1))
    sequences = PagedSequences(NETWORKS[2], [40, 3], capture=graphs)
    assert sequences.read({0: 20}, wanted="no") == {}
    assert sequences.read({0: 1, 1: 1}, wanted="no") == {}
    logits = sequences.read({0: 19, 1: 2}, wanted="last")
    assert list(logits) == [(0, 39), (1, 2)]
    check(sequences, logits)
    assert graphs.captured == 0


def test_new_blocks_need_new_graphs():
    graphs = Graphs()
    for _ in range(2):
        sequences = PagedSequences(NETWORKS[2], [2], capture=graphs)
        sequences.step.allocate([BLOCKS] * 2)
        check(sequences, sequences.read({0: 1}) | sequences.read({0: 1}))
    step = sequences.step
    step.allocate([BLOCKS] * 2)
    assert np.isfinite(PagedSequences(NETWORKS[2], [1], capture=graphs).read({0: 1})[0, 0]).all()
    assert graphs.captured == 3


def test_a_step_computes_with_the_tables_it_holds_whatever_becomes_of_the_models():
    model = network(2)
    sequences = PagedSequences(model, [4, 3], capture=Graphs())
    logits = sequences.read({0: 1, 1: 2})

    def none(*_):
        raise AssertionError("a graph would still read the tables that it was captured with")

    rotary, model.rotary = model.rotary, none
    logits |= sequences.read({0: 1, 1: 1})
    logits |= sequences.read({0: 2})
    model.rotary = rotary
    check(sequences, logits)


def test_how_a_sequence_is_attended_to_does_not_depend_on_its_neighbours(monkeypatch):
    seen = []

    def noted(*args, window_size, **others):
        seen.append((window_size, others["num_splits"]))
        return varlen_attn(*args, window_size=window_size, **others)

    monkeypatch.setattr(torch.nn.attention.varlen, "varlen_attn", noted)
    for prompts in ([5], [5, 180]):
        PagedSequences(NETWORKS[2], prompts).read(dict(enumerate(prompts)))
    alone, beside = seen[: len(seen) // 2], seen[len(seen) // 2 :]
    assert alone == beside
    assert {window for window, _ in alone} == {(128, 0), (-1, 0)}


@pytest.mark.parametrize("window", [1, 3, 11, 500])
@pytest.mark.parametrize("kv_heads", [1, 4])
def test_rows_of_training_as_packed_sequences_are_attended_to_as_rows(window, kv_heads):
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, 12, heads, 8, generator=generator) for heads in (4, kv_heads, kv_heads))
    torch.testing.assert_close(flash_attention(q, k, v, window), causal_attention(q, k, v, window))


@pytest.mark.parametrize(
    ("major", "installed", "name", "why"),
    [
        (8, True, None, "FA2: newer kernels are for SM 9 and 10, this is SM 8"),
        (9, True, "FA3", "FA3: made for SM 9, and installed"),
        (9, False, None, "FA2: FA3 is for this GPU, but there is no module flash_attn_interface; it comes with "),
        (10, True, "FA4", "FA4: made for SM 10, and installed"),
        (10, False, None, "FA2: FA4 is for this GPU, but there is no module flash_attn.cute.interface; it comes with "),
        (12, True, None, "FA2: newer kernels are for SM 9 and 10, this is SM 12"),
    ],
)
def test_the_choice_of_flash_attention_says_why(major, installed, name, why):
    chosen, reason = flash_choice(major, installed)
    assert chosen == name
    assert reason.startswith(why)


@pytest.fixture
def hopper(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    return torch.device("cuda")


@pytest.mark.parametrize(
    "code", ["import nowhere", "raise RuntimeError('no kernels')", "raise OSError('no library')", ""]
)
def test_a_broken_package_costs_its_speed_and_not_the_run(code, hopper, tmp_path, monkeypatch):
    (tmp_path / "flash_attn_interface.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    reason = activate_flash(hopper)
    assert reason.startswith("FA2: FA3 is for this GPU, but its module flash_attn_interface is broken: ")
    assert ("nowhere" in reason) == (code == "import nowhere")
    assert why_no_pages() is not None
    sys.modules.pop("flash_attn_interface", None)


def test_a_broken_parent_of_a_package_costs_its_speed_and_not_the_run(hopper, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (10, 0))
    (tmp_path / "flash_attn").mkdir()
    (tmp_path / "flash_attn" / "__init__.py").write_text("raise RuntimeError('made for another torch')")
    monkeypatch.syspath_prepend(tmp_path)
    assert activate_flash(hopper) == (
        "FA2: FA4 is for this GPU, but its module flash_attn.cute.interface is broken: "
        "RuntimeError: made for another torch"
    )


def test_what_is_not_installed_is_no_error(hopper, monkeypatch):
    assert activate_flash(hopper).startswith("FA2: FA3 is for this GPU, but there is no module flash_attn_interface")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (8, 0))
    assert activate_flash(hopper) == "FA2: newer kernels are for SM 9 and 10, this is SM 8"


def test_why_a_cpu_decodes_otherwise():
    reason = why_not(torch.device("cpu"), torch.bfloat16)
    assert reason == "SDPA: the flash kernel needs CUDA, this is cpu"


def test_torchs_switch_knows_the_names_and_its_own_flash_attention_has_no_small_pages():
    from torch.nn.attention import list_flash_attention_impls

    assert {"FA3", "FA4"} <= set(list_flash_attention_impls())
    assert why_no_pages() == "paged decoding needs FA3 or FA4: the pages of FA2 are 256 positions, ours are 16"
