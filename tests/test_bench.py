"""Benchmarks: the peer packs by the rule, every figure is there and JSON-able. No speed is asserted."""

import json
import os
import time

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jobs import bench
from nanochat_ray import cli
from nanochat_ray.bench.measurement import SAMPLE_EVERY_S, Line, Watch, in_fresh_process, print_table
from nanochat_ray.bench.packing_bench import BUFFER_DOCUMENTS, measure_packing, scan_pack
from nanochat_ray.stream.packing import pack
from tests.small_corpus import write_corpus

SIZES = ["--vocab-size", "300", "--sequence-len", "32", "--micro-batch-rows", "2", "--steps", "4"]


def documents_of(lengths: list[int]) -> list[np.ndarray]:
    return [np.full(length, index, dtype=np.int32) for index, length in enumerate(lengths)]


@given(st.lists(st.integers(1, 40), max_size=60), st.integers(1, 20))
def test_the_plain_scan_and_best_fit_give_the_same_rows_while_the_buffer_holds_all(lengths, sequence_len):
    documents = documents_of(lengths)
    rows = scan_pack(documents, sequence_len)
    expected = pack(documents, sequence_len).tokens_NT
    np.testing.assert_array_equal(np.array(rows, dtype=np.int32).reshape(expected.shape), expected)


def test_the_plain_scan_refills_its_buffer_until_the_documents_end():
    documents = documents_of([5] * (3 * BUFFER_DOCUMENTS))
    assert sorted(int(row[0]) for row in scan_pack(documents, 4)) == list(range(3 * BUFFER_DOCUMENTS))


def test_crop_waste_counts_what_was_cut_off_and_not_what_was_left_over():
    figures = measure_packing([documents_of([9, 3, 2])], sequence_len=4, repeats=1)
    assert figures.crop_waste == pytest.approx(4 / 14)  # 3 + 2 fill a row, 9 is cut to 5


def test_a_fresh_process_has_the_environment_of_ray_workers():
    assert in_fresh_process(os.getenv, "OMP_WAIT_POLICY") == os.environ["OMP_WAIT_POLICY"]


@pytest.mark.slow
def test_a_watch_sees_memory_and_cpu_of_this_process_and_its_descendants():
    with Watch() as watch:
        child = in_fresh_process(_process_id_after, 1.5 * SAMPLE_EVERY_S)
        sum(range(10**7))
    assert child in watch.peaks
    assert os.getpid() in watch.peaks
    assert min(peak for _, peak in watch.peaks.values()) > 10**6
    assert watch.cpu_s > 0
    assert watch.peak_of("no such process") is None
    assert watch.to_dict()["cores_busy_with_others"] >= 0


def _process_id_after(seconds: float) -> int:
    time.sleep(seconds)
    return os.getpid()


def test_a_table_says_how_busy_the_machine_was(capsys):
    machine = {"load_average_before": 0.5, "load_average_after": 1.0, "cores_busy_with_others": 0.25}
    print_table("title", [Line("speed", "5 tok/s", "half of the peak")], machine)
    title, speed, busy = capsys.readouterr().out.strip().splitlines()
    assert title == "title"
    assert speed.split() == ["speed", "5", "tok/s", "half", "of", "the", "peak"]
    assert "0.25 of" in busy


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bench") / "corpus"
    write_corpus(folder, documents=120)
    return folder


def run_bench(what: str, corpus, capsys, *more: str) -> dict:
    flags = [what, "--quick", "--json", "--corpus", str(corpus), "--storage", str(corpus.parent), *SIZES, *more]
    assert cli.run(bench.main, bench.build_parser(), flags) == 0
    *_, table, last = capsys.readouterr().out.strip().splitlines()
    assert "cores busy with other programs" in table
    figures = json.loads(last)
    assert figures["status"] == "done"
    assert figures["benchmark"] == what
    assert figures["machine"].keys() == {"load_average_before", "load_average_after", "cores_busy_with_others"}
    return figures


@pytest.mark.slow
@pytest.mark.ray
def test_data_is_measured_with_its_peers(ray_cluster, corpus, capsys):
    figures = run_bench("data", corpus, capsys)
    for packed in figures["packing"].values():
        assert packed["crop_waste"] <= packed["scan_crop_waste"] + 0.01
        assert packed["speedup"] > 0
    speeds = [value for name, value in figures.items() if name.endswith("tok_per_s")]
    assert len(speeds) == 5
    assert min(speeds) > 0


@pytest.mark.slow
@pytest.mark.ray
def test_training_is_measured_beside_matrix_multiplication_and_with_ray(ray_cluster, corpus, capsys):
    figures = run_bench("train", corpus, capsys)
    assert figures["steps"] == 1  # of four, three warm up
    assert len(figures["bare_runs_tok_per_s"]) == 2
    assert 0 < figures["step_of_peak"] < 1.5
    assert figures["cost_of_ray"] == pytest.approx(1 - figures["ray_tok_per_s"] / figures["step_tok_per_s"], abs=1e-3)
    assert figures["update_s"] > 0
    assert 0 < figures["update_of_large_step"] < 1
    memory = figures["memory"]
    assert memory["bound"] == sum(memory[part] for part in ("weights", "optimizer", "activations", "allowance"))
    assert memory["worker_peak"] > memory["weights"]


@pytest.mark.slow
def test_a_checkpoint_is_measured_beside_steps_without_one(corpus, capsys):
    figures = run_bench("checkpoint", corpus, capsys, "--steps", "24")
    assert figures["checkpoints"] == 3
    assert 0 < figures["stall_s"] < figures["saving_step_s"]
    assert figures["saving_step_slower"] == pytest.approx(figures["saving_step_s"] / figures["step_s"] - 1, abs=0.01)
    assert [name for name in os.listdir(corpus.parent) if name.startswith("checkpoint_bench")] == []


@pytest.mark.slow
def test_decoding_is_measured_beside_the_memory(corpus, capsys):
    figures = run_bench("decode", corpus, capsys)
    assert set(figures["decode"]) == {"1", "8", "16", "32"}
    assert figures["decode"]["16"]["limit_tok_per_s"] == pytest.approx(
        16 * figures["decode"]["1"]["limit_tok_per_s"], rel=0.01
    )
    assert figures["prompt_tokens"] == 32
    assert all(decode["torch_tok_per_s"] > 0 for decode in figures["decode"].values())


@pytest.mark.slow
def test_every_kernel_of_this_machine_is_measured_beside_torch(corpus, capsys):
    figures = run_bench("kernels", corpus, capsys)
    assert {case["method"] for case in figures["cases"]} >= {"norm", "attention", "linear_cross_entropy", "embedding"}
    for case in figures["cases"]:
        assert case["own_s"] > 0
        assert case["torch_s"] / case["own_s"] == pytest.approx(case["times"], rel=0.05)
        assert case["limit_s"] / case["own_s"] == pytest.approx(case["of_limit"], rel=0.05, abs=1e-4)
        assert case["limit"] in ("compute", "memory")
    assert {"date", "processor", "torch", "system"} <= figures["provenance"].keys()
    off = cli.run(bench.main, bench.build_parser(), ["kernels", "--kernels", "off"])
    assert off == 2
    assert "bench kernels measures our kernels; leave out --kernels off" in capsys.readouterr().err
