"""Compiled kernels that are kept with the run: what they depend on, what is refused, that nothing compiles twice."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from nanochat_ray.model.execution import compile_obstacle
from nanochat_ray.plan import make_plan
from nanochat_ray.storage import Folder
from nanochat_ray.train.compile_cache import ARCHIVE, COMPILE_CACHE, MANIFEST, CompileCache, key_of

ROOT = Path(__file__).parents[1]
CPU = torch.device("cpu")
PLAN = make_plan(depth=1, vocab_size=320, head_size=32, sequence_len=16, batch_tokens=32, micro_batch_rows=2)

# A first step in a fresh process, as a worker begins; of a model that compiles in seconds.
STEP = """
import json, sys, time, torch, torch._inductor.config
from torch._dynamo.utils import counters
from nanochat_ray.storage import Folder
from nanochat_ray.train.compile_cache import CompileCache
from tests.test_compile_cache import CPU, PLAN
torch._inductor.config.cpp_cache_precompile_headers = False  # they take longer than this one kernel
torch.manual_seed(0)
model = torch.nn.Linear(8, 8)
cache = CompileCache.open(Folder.at(sys.argv[1]), PLAN, CPU, torch.float32)
began = time.perf_counter()
loss = torch.compile(lambda x: model(x).relu().square().sum(), dynamic=False)(torch.ones(4, 8))
loss.backward()
seconds = time.perf_counter() - began
print(json.dumps({
    "loss": loss.item(), "gradient": model.weight.grad.square().sum().item(), "seconds": seconds,
    "kept": cache.keep(), "libraries": sorted(path.name for path in cache.local.rglob("*.so")),
    "graphs": dict(counters["inductor"]), "autograd": dict(counters["aot_autograd"]),
}), flush=True)
"""


@pytest.fixture
def compiler_folder(tmp_path, monkeypatch):
    """Where torch would compile, on a machine that has compiled nothing yet."""

    def fresh(name: str) -> Path:
        monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / name))
        return tmp_path / name

    fresh("first")
    return fresh


def open_cache(stage: Folder) -> tuple[CompileCache, list[str]]:
    warnings: list[str] = []
    return CompileCache.open(stage, PLAN, CPU, torch.float32, warnings.append), warnings


def keep_something(stage: Folder) -> CompileCache:
    cache, warnings = open_cache(stage)
    assert warnings == []
    for name in ("ab/kernel.so", "fxgraph/cd/graph", "locks/kernel.lock", "ab/kernel.so.lock"):
        (cache.local / name).parent.mkdir(parents=True, exist_ok=True)
        (cache.local / name).write_bytes(name.encode())
    assert cache.keep()
    return cache


@pytest.mark.slow
@pytest.mark.skipif(
    bool(compile_obstacle(CPU)) and not os.environ.get("CI"),  # there it fails, with the compiler's own words
    reason=f"nothing can be compiled: {compile_obstacle(CPU)}",
)
def test_a_machine_that_joins_compiles_nothing_that_the_run_has_compiled_before(tmp_path):
    def step_on(machine: str) -> dict:
        environment = {
            **os.environ,
            "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / machine),
            "TORCHINDUCTOR_COMPILE_THREADS": "1",
        }
        command = [sys.executable, "-c", STEP, str(tmp_path / "stage")]
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=240)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout.splitlines()[-1])

    first, second = step_on("first"), step_on("second")
    assert first["graphs"]["fxgraph_cache_miss"] == 2  # forward and backward
    assert first["kept"]
    assert second["graphs"]["fxgraph_cache_hit"] == 2
    assert "fxgraph_cache_miss" not in second["graphs"]
    assert second["autograd"]["autograd_cache_hit"] == 1
    assert "autograd_cache_miss" not in second["autograd"]
    assert second["libraries"] == first["libraries"] != []  # no C++ was compiled beyond the kept
    assert not second["kept"]
    assert (second["loss"], second["gradient"]) == (first["loss"], first["gradient"])
    print(f"first step: {first['seconds']:.1f} s cold, {second['seconds']:.1f} s with the run's kernels")


def test_kernels_go_to_the_next_machine_and_locks_do_not(tmp_path, compiler_folder):
    stage = Folder.at(tmp_path / "stage")
    keep_something(stage)
    second = compiler_folder("second")
    cache, warnings = open_cache(stage)
    assert warnings == []
    assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == str(cache.local)
    assert cache.local.parent == second
    found = {str(path.relative_to(cache.local)): path.read_text() for path in cache.local.rglob("*") if path.is_file()}
    assert found == {"ab/kernel.so": "ab/kernel.so", "fxgraph/cd/graph": "fxgraph/cd/graph"}


def test_only_something_new_is_written(tmp_path, compiler_folder):
    stage = Folder.at(tmp_path / "stage")
    keep_something(stage)
    cache, _ = open_cache(stage)
    assert not cache.keep()
    (cache.local / "ab" / "another.so").write_bytes(b"x")
    assert cache.keep()
    compiler_folder("second")
    assert (open_cache(stage)[0].local / "ab" / "another.so").read_bytes() == b"x"


@pytest.mark.parametrize(
    ("name", "content"),
    [
        (ARCHIVE, b"PK damaged"),
        (MANIFEST, b"{"),
        (MANIFEST, b"[]"),
        (MANIFEST, b'{"bytes": 1, "sha256": "", "files": ["ab/kernel.so"]}'),
    ],
)
def test_a_damaged_cache_is_named_and_not_used(tmp_path, compiler_folder, name, content):
    stage = Folder.at(tmp_path / "stage")
    folder = keep_something(stage).folder
    folder.write(name, content)
    compiler_folder("second")
    cache, (warning,) = open_cache(stage)
    assert str(folder) in warning
    assert "compiling anew" in warning
    assert not cache.local.exists()
    (cache.local / "ab").mkdir(parents=True)
    (cache.local / "ab" / "kernel.so").write_bytes(b"compiled anew")
    assert cache.keep()  # mended for the next machine
    assert not open_cache(stage)[1]


def test_a_storage_that_refuses_is_a_warning(tmp_path, compiler_folder):
    (tmp_path / "stage").mkdir()
    (tmp_path / "stage" / COMPILE_CACHE).write_text("a file where the folder should be")
    cache, _ = open_cache(Folder.at(tmp_path / "stage"))
    (cache.local / "ab").mkdir(parents=True)
    (cache.local / "ab" / "kernel.so").write_bytes(b"x")
    warnings: list[str] = []
    assert not cache.keep(warnings.append)
    assert "could not be kept" in warnings[0]


def test_the_key_follows_what_kernels_depend_on_and_nothing_else():
    key = key_of(PLAN, CPU, torch.float32)
    assert key == key_of(replace(PLAN, steps=7, seed=3), CPU, torch.float32)
    others = {
        key_of(PLAN, CPU, torch.bfloat16),
        key_of(replace(PLAN, micro_batch_rows=1), CPU, torch.float32),
        key_of(replace(PLAN, model=replace(PLAN.model, n_embd=128)), CPU, torch.float32),
    }
    assert len({key, *others}) == 4
