"""The mixture: weights, a seeded order, and units that give back what was written."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nanochat_ray.chat import render
from nanochat_ray.errors import UsageError, UserError
from nanochat_ray.storage import Folder
from nanochat_ray.stream.rows import ChatRows, look_at_epoch
from nanochat_ray.tasks.conversations import exchange
from nanochat_ray.tasks.mixture import (
    Source,
    build_mixture,
    open_mixture,
    read_conversations,
    read_examples,
    write_mixture,
)
from nanochat_ray.tasks.recipes import MixtureSizes, demo_mixture, folder_mixture, mixture_of
from nanochat_ray.tokenizer import train_tokenizer


def source(name, count, weight=1.0, tests=3):
    return Source(
        name,
        [exchange(f"{name} question {i} é", f"answer {i}") for i in range(count)],
        [exchange(f"{name} test {i}", f"answer {i}") for i in range(tests)],
        weight,
    )


@given(st.floats(0, 4), st.integers(1, 40))
def test_a_weight_is_a_number_of_epochs(weight, count):
    mixture = build_mixture([source("a", count, weight), source("b", 1)], seed=1)
    times = [[example.messages for example in mixture.train].count(chat) for chat in source("a", count).train]
    assert set(times) <= {int(weight), int(weight) + 1}
    assert abs(sum(times) - weight * count) <= 0.5 + 1e-9
    assert mixture.counts["a"]["train"] == sum(times)


def test_the_order_depends_on_the_seed_alone():
    sources = [source("a", 50), source("b", 50)]
    assert build_mixture(sources, 1) == build_mixture(sources, 1)
    assert build_mixture(sources, 1).train != build_mixture(sources, 2).train
    names = [example.source for example in build_mixture(sources, 1).train]
    assert "a" in names[50:]
    assert "b" in names[:50]


def test_an_empty_mixture_and_a_negative_weight_are_refused():
    with pytest.raises(UsageError, match="empty"):
        build_mixture([source("a", 5, weight=0)], 1)
    with pytest.raises(UsageError, match="weight of a is -1"):
        build_mixture([source("a", 5, weight=-1)], 1)


def test_units_give_back_the_mixture_in_order(tmp_path):
    mixture = build_mixture([source("a", 60), source("b", 45)], 3)
    corpus = write_mixture(mixture, Folder.at(tmp_path), unit_bytes=150)
    assert len({unit.shard for unit in corpus.train}) == 2
    assert [example for unit in corpus.train for example in read_examples(unit)] == mixture.train
    assert [chat for unit in corpus.validation for chat in read_conversations(unit)] == [
        example.messages for example in mixture.test
    ]
    assert sum(unit.documents for unit in corpus.train) == 105
    assert all(150 <= unit.bytes < 250 for unit in corpus.train[:-1])


def test_a_stored_mixture_is_found_again_and_replaced_only_by_another(tmp_path):
    folder = Folder.at(tmp_path) / "mixture"
    first = write_mixture(build_mixture([source("a", 20)], 1), folder)
    written = (tmp_path / "mixture/train/shard_00000.parquet").stat().st_mtime_ns
    assert write_mixture(build_mixture([source("a", 20)], 1), folder) == first == open_mixture(folder)
    assert (tmp_path / "mixture/train/shard_00000.parquet").stat().st_mtime_ns == written
    other = write_mixture(build_mixture([source("a", 21)], 1), folder)
    assert other.fingerprint != first.fingerprint
    assert open_mixture(folder) == other


def test_a_missing_mixture_says_which_job_makes_it(tmp_path):
    with pytest.raises(UserError, match=r"jobs\.sft"):
        open_mixture(Folder.at(tmp_path))


@pytest.mark.slow
def test_the_demo_mixture_is_small_and_balanced():
    mixture = demo_mixture(42)
    characters = sum(len(str(message["content"])) for example in mixture.train for message in example.messages)
    assert characters < 2_000_000
    assert set(mixture.counts) == {"documentation", "arithmetic", "counting", "identity", "small talk"}
    assert mixture.counts["documentation"]["test"] >= 150
    assert {example.source for example in mixture.test} == set(mixture.counts)


@pytest.mark.slow
def test_real_chats_are_mixed_with_the_tasks_beside_them(shared_data):
    sizes = MixtureSizes(gsm8k_epochs=0.1, mmlu_epochs=0.1, arc_epochs=0, spelling=10, counting=10, arithmetic=0)
    mixture = folder_mixture(str(shared_data / "sft"), seed=1, sizes=sizes)
    assert set(mixture.counts) == {"chats", "gsm8k", "mmlu", "spelling", "counting", "identity", "small talk"}
    assert mixture.counts["chats"]["train"] == 11_007
    assert mixture.counts["gsm8k"]["train"] == 747
    assert mixture.counts["mmlu"]["test"] == 200


@pytest.mark.slow
def test_the_rows_of_real_mixtures_are_full_and_only_what_is_longer_is_cut(shared_data, tmp_path):
    sizes = MixtureSizes(mmlu_epochs=0.3, gsm8k_epochs=0.4)
    mixtures = {"demo": demo_mixture(42), "real": folder_mixture(str(shared_data / "sft"), sizes=sizes)}
    for name, mixture in mixtures.items():
        corpus = write_mixture(mixture, Folder.at(tmp_path / name))
        said = [str(message["content"]) for example in mixture.train[:4000] for message in example.messages]
        tokenizer = train_tokenizer(said, 2048)
        for sequence_len in (256, 512, 2048):
            epoch = look_at_epoch(ChatRows(tokenizer, sequence_len), corpus.train)
            assert epoch.fill >= 0.95
            rendered = [render(tokenizer, chat)[0] for chat in read_conversations(corpus.train[0])]
            packed = ChatRows(tokenizer, sequence_len).rows(corpus.train[0])
            assert packed.cropped_N.sum() == sum(max(0, len(ids) - sequence_len - 1) for ids in rendered)
            assert packed.tokens_NT.size - packed.padding_N.sum() == sum(
                min(len(ids), sequence_len + 1) for ids in rendered
            )


def test_a_tasks_folder_without_sets_is_refused(shared_data, tmp_path):
    with pytest.raises(UserError, match="no task sets in"):
        mixture_of(str(shared_data / "sft"), str(tmp_path), 1)


def test_tasks_go_only_with_chats_of_ones_own():
    with pytest.raises(UsageError, match="--tasks goes with a folder of chats"):
        mixture_of("demo", "somewhere", 1)
