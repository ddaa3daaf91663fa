import pytest
import torch

from nanochat_ray.device import gemm_peak, memory_bandwidth, pick_device, pick_dtype
from nanochat_ray.errors import UsageError
from nanochat_ray.plan.hardware import known_peak

CPU = torch.device("cpu")


def test_a_chosen_device_is_taken_and_the_reason_says_so():
    assert pick_device("cpu") == (CPU, "chosen")


def test_without_a_name_there_is_always_a_device_and_a_reason():
    device, reason = pick_device()
    assert device.type in ("cuda", "mps", "cpu")
    assert reason


@pytest.mark.parametrize("name", ["gpu", "cuda:99", "cpu:x", ""])
def test_a_device_that_is_not_here_is_wrong_usage_and_the_message_names_it(name):
    with pytest.raises(UsageError, match=repr(name)):
        pick_device(name)


def test_the_cpu_computes_in_bf16_only_with_hardware_for_it(monkeypatch):
    for features, expected in (
        ({}, torch.float32),
        ({"avx512_f": True}, torch.float32),
        ({"avx512_bf16": True}, torch.bfloat16),
        ({"amx_bf16": True}, torch.bfloat16),
    ):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda features=features: features)
        dtype, reason = pick_dtype(CPU)
        assert dtype is expected
        assert reason.startswith("the CPU has")


def test_gpus_compute_in_bf16_from_sm_80_on(monkeypatch):
    for capability, expected in (((7, 5), torch.float32), ((8, 0), torch.bfloat16), ((9, 0), torch.bfloat16)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, capability=capability: capability)
        dtype, reason = pick_dtype(torch.device("cuda"))
        assert dtype is expected
        assert f"SM {capability[0]}.{capability[1]}" in reason


def test_a_chosen_dtype_wins_and_an_unknown_one_is_wrong_usage():
    assert pick_dtype(CPU, "bf16") == (torch.bfloat16, "chosen")
    with pytest.raises(UsageError, match="'fp4' is not one of bf16, fp32"):
        pick_dtype(CPU, "fp4")


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA H100 NVL", 835e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA A10", 125e12),
        ("NVIDIA A10G", 70e12),
        ("NVIDIA L4", 121e12),
        ("NVIDIA L40", 181e12),
        ("NVIDIA L40S", 362e12),
        ("NVIDIA GeForce RTX 4090", 165e12),
    ],
)
def test_known_gpus_have_their_published_peak(monkeypatch, name, peak):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    gemm_peak.cache_clear()
    assert gemm_peak(torch.device("cuda"), torch.bfloat16) == peak


@pytest.mark.parametrize("name", ["NVIDIA RTX A1000", "NVIDIA GB2000", "Tesla T4", "NVIDIA L400", ""])
def test_a_name_that_only_contains_a_known_one_is_not_known(name):
    assert known_peak(name) is None


def test_the_cpu_is_measured():
    threads = torch.get_num_threads()
    assert 1e9 < gemm_peak(CPU, torch.float32, threads=1) < 1e14
    assert 1e8 < memory_bandwidth(CPU, threads=1) < 1e13
    assert torch.get_num_threads() == threads
