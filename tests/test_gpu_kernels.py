"""The GPU's kernels compute what their references do, in Triton's interpreter: no GPU is needed, and none was used."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.mark.slow
def test_every_kernel_agrees_with_its_reference_in_tritons_interpreter():
    # A process of its own: whether kernels are interpreted is decided when Triton is imported.
    outside = {name: value for name, value in os.environ.items() if not name.startswith(("PYTEST_", "TRITON_"))}
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "pytest",
            "-p",
            "no:xdist",
            "-p",
            "no:cacheprovider",
            "tests/interpreted_gpu_kernels.py",
        ],
        cwd=ROOT,
        env={**outside, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
    assert "skipped" not in done.stdout
