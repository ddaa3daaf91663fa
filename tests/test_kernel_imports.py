"""Who does not use kernels does not load them, and no one takes our `kernels` for the package of that name on PyPI."""

import ast
import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def run(code: str, *arguments: str) -> dict:
    """What code prints last, as JSON; from the root of the repository, where our `kernels` shadows all others."""
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments],
        cwd=ROOT, capture_output=True, text=True, timeout=200,
        env={"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "PATH": "/usr/bin:/bin"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("path", sorted((ROOT / "nanochat_ray").rglob("*.py")), ids=lambda path: path.stem)
def test_a_module_of_the_library_imports_kernels_only_where_it_uses_them(path):
    """Also because Ray imports modules of the library, which is installed, before it knows where the job's code is."""
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [node.module]
        else:
            continue
        assert not [name for name in names if name.split(".")[0] in ("kernels", "triton")]


@pytest.mark.slow
def test_importing_all_of_the_library_loads_neither_triton_nor_any_kernel():
    code = """
import importlib, json, pkgutil, sys
import nanochat_ray
for module in pkgutil.walk_packages(nanochat_ray.__path__, "nanochat_ray."):
    importlib.import_module(module.name)
print(json.dumps([name for name in sys.modules if name.split(".")[0] in ("kernels", "triton")]))
"""
    assert run(code) == []


@pytest.mark.slow
@pytest.mark.parametrize("triton", ["installed", "absent"])
def test_transformers_loads_a_model_beside_our_kernels_with_and_without_triton(triton, tmp_path):
    code = """
import json, sys
if sys.argv[2] == "absent":
    sys.modules["triton"] = None  # importing it raises, as if it were not there
else:
    import triton
import kernels
import transformers
from transformers import AutoModelForCausalLM, LlamaConfig
from transformers.utils import is_kernels_available
sizes = {"vocab_size": 40, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1}
AutoModelForCausalLM.from_config(LlamaConfig(**sizes, num_attention_heads=2)).save_pretrained(sys.argv[1])
model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
import torch
logits = model(torch.zeros(1, 3, dtype=torch.long)).logits
print(json.dumps([kernels.__file__, is_kernels_available(), list(logits.shape)]))
"""
    ours = str(ROOT / "kernels" / "__init__.py")
    assert run(code, str(tmp_path), triton) == [ours, False, [1, 3, 40]]


@pytest.mark.slow
def test_what_needs_no_triton_in_the_gpus_kernels_imports_without_it():
    code = """
import json, sys
sys.modules["triton"] = None
from kernels.gpu import flash, fp8_linear, paged_attention, paged_step
try:
    from kernels.gpu import operations
except ModuleNotFoundError as error:
    print(json.dumps(str(error)))
"""
    assert "triton" in run(code)
