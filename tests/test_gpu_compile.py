"""Every kernel of the GPU becomes machine code for A100s, H100s and B200s without one: with tensor cores where it
multiplies matrices, 16 bytes per access to memory, without spills, within shared memory.

What this cannot show is speed, or that it runs.

`pytest -rP tests/test_gpu_compile.py` shows the registers and bytes of each.
"""

import re
import subprocess
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

triton = pytest.importorskip("triton", reason="Triton is for Linux")

from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

from kernels.gpu import linear_cross_entropy, polar_express, rotated_norm, squared_relu  # noqa: E402
from nanochat_ray.model.loss import IGNORED, SOFTCAP  # noqa: E402

SHARED_BYTES = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}  # that one block may use
WIDE_READ = re.compile(r"ld\.global[\w.:]*\.v[48]\.b32|cp\.async\.cg\.shared\.global \[[^]]*\], \[[^]]*\], 0x10\b")
TENSOR_CORES = {80: "mma.sync", 90: "wgmma.mma_async", 100: "tcgen05.mma"}


@dataclass(frozen=True)
class Case:
    """A kernel as production launches it, at depth 26 in bf16: sizes and strides, but `heads`, are multiples of 16."""

    kernel: object
    pointers: dict[str, str]
    constants: dict[str, object]
    warps: int
    stages: int = 3
    multiplies: bool = False
    floats: tuple[str, ...] = ()

    def compiled(self, capability: int):
        names = self.kernel.arg_names
        types = {name: self.pointers.get(name, "fp32" if name in self.floats else "i32") for name in names}
        types |= dict.fromkeys(self.constants, "constexpr")
        aligned = [
            index
            for index, name in enumerate(names)
            if types[name].startswith("*") or (types[name] == "i32" and name != "heads")
        ]
        source = ASTSource(
            self.kernel, types, self.constants, {(index,): [["tt.divisibility", 16]] for index in aligned}
        )
        options = {"num_warps": self.warps, "num_stages": self.stages}
        return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)


def bf16(*names: str) -> dict[str, str]:
    return dict.fromkeys(names, "*bf16")


LOSSES = {**bf16("z_ptr"), "targets_ptr": "*i64", "scale_ptr": "*fp32", "losses_ptr": "*fp32"}
HEADS = {"EPSILON": rotated_norm.EPSILON, "PAIRS": 64, "BLOCK_H": 16, "BLOCK_P": 64}
TILES = {"BLOCK": polar_express.BLOCK, "BLOCK_K": polar_express.BLOCK_K, "PRECISION": "tf32"}


def losses(with_gradient: bool) -> Case:
    constants = {"SOFTCAP": SOFTCAP, "IGNORED": IGNORED, "WITH_GRADIENT": with_gradient}
    constants["BLOCK"] = linear_cross_entropy.BLOCK
    return Case(linear_cross_entropy.softcapped_losses_kernel, LOSSES, constants, linear_cross_entropy.WARPS)


def elementwise(kernel: object, *pointers: str) -> Case:
    return Case(kernel, bf16(*pointers), {"BLOCK": squared_relu.ELEMENTS}, warps=4)


def symmetric(add_x: bool, contiguous: str) -> Case:
    return Case(
        polar_express.symmetric_product_kernel,
        bf16("x_ptr", "out_ptr"),
        {**TILES, "ADD_X": add_x, contiguous: 1},
        polar_express.WARPS,
        polar_express.STAGES,
        multiplies=True,
        floats=("b", "c"),
    )


CASES = {
    "losses": losses(False),
    "losses and gradients": losses(True),
    "matmul, squared ReLU": Case(
        squared_relu.matmul_squared_relu_kernel,
        bf16("x_ptr", "w_ptr", "y_ptr"),
        {name: getattr(squared_relu, name) for name in ("BLOCK_M", "BLOCK_N", "BLOCK_K", "GROUP_M")}
        | {"PRECISION": "tf32"},
        squared_relu.WARPS,
        squared_relu.STAGES,
        multiplies=True,
    ),
    "squared ReLU": elementwise(squared_relu.squared_relu_kernel, "z_ptr", "y_ptr"),
    "squared ReLU, backward": elementwise(
        squared_relu.squared_relu_gradient_kernel, "y_ptr", "grad_y_ptr", "grad_z_ptr"
    ),
    "rotated norm": Case(
        rotated_norm.rotated_norm_kernel,
        bf16("x_ptr", "cos_ptr", "sin_ptr", "y_ptr"),
        HEADS,
        rotated_norm.WARPS,
        floats=("scale",),
    ),
    "rotated norm, backward": Case(
        rotated_norm.rotated_norm_gradient_kernel,
        bf16("x_ptr", "cos_ptr", "sin_ptr", "grad_y_ptr", "grad_x_ptr"),
        HEADS,
        rotated_norm.WARPS,
        floats=("scale",),
    ),
    "X·Xᵀ": symmetric(False, "x_column_stride"),
    "X·Xᵀ of a transposed view": symmetric(False, "x_row_stride"),
    "b·G + c·G·G": symmetric(True, "x_column_stride"),
}


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.setenv("TRITON_DEFAULT_FP_FUSION", "1")


def resources(cubin: bytes) -> dict[str, int]:
    """Registers per thread, and bytes of stack and of local memory, where spilled registers would be."""
    program = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(program), "--dump-resource-usage", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return {name: int(re.search(rf"\b{name}:(\d+)", text).group(1)) for name in ("REG", "STACK", "LOCAL")}


@pytest.mark.parametrize("capability", SHARED_BYTES, ids=lambda capability: f"sm_{capability}")
@pytest.mark.parametrize("name", CASES)
def test_a_kernel_compiles_with_tensor_cores_and_wide_accesses_without_spills_within_shared_memory(name, capability):
    case = CASES[name]
    compiled = case.compiled(capability)
    used = resources(compiled.asm["cubin"])
    print(f"{name}, sm_{capability}: {used['REG']} registers, {compiled.metadata.shared} bytes of shared memory")
    assert (used["STACK"], used["LOCAL"]) == (0, 0)
    assert compiled.metadata.shared <= SHARED_BYTES[capability]
    assert (TENSOR_CORES[capability] in compiled.asm["ptx"]) == case.multiplies
    assert WIDE_READ.search(compiled.asm["ptx"])
    assert used["REG"] * 32 * case.warps <= 65_536  # registers of a multiprocessor: at least one block fits


@pytest.mark.parametrize("capability", SHARED_BYTES, ids=lambda capability: f"sm_{capability}")
def test_a_targets_logit_is_read_before_a_barrier_and_gradients_are_written_behind_it(capability):
    # Another warp may write the gradient over it as soon as it has passed the last barrier of the sum.
    ptx = CASES["losses and gradients"].compiled(capability).asm["ptx"]
    target_read = [match.start() for match in re.finditer(r"ld\.global\.b16\b", ptx)]
    gradient_written = [match.start() for match in re.finditer(r"st\.global\.v[48]\.b32\b", ptx)]
    assert len(target_read) == 1
    assert ptx.count("ld.global.b64") == 1  # which logit that is
    assert gradient_written
    assert "bar.sync" in ptx[target_read[0] : min(gradient_written)]


@pytest.mark.parametrize("capability", SHARED_BYTES, ids=lambda capability: f"sm_{capability}")
@pytest.mark.parametrize("name", ["rotated norm", "rotated norm, backward"])
def test_one_head_of_one_token_compiles_as_well(name, capability):
    # Triton makes constants of ones, and code of its own for them.
    alone = {"heads": 1, "table_rows": 1, "BLOCK_H": 1}
    case = replace(CASES[name], constants=CASES[name].constants | alone)
    assert resources(case.compiled(capability).asm["cubin"])["LOCAL"] == 0


def test_spills_would_be_seen():
    case = CASES["matmul, squared ReLU"]
    source = ASTSource(
        case.kernel,
        {name: case.pointers.get(name, "i32") for name in case.kernel.arg_names}
        | dict.fromkeys(case.constants, "constexpr"),
        case.constants,
    )
    options = {"num_warps": case.warps, "num_stages": case.stages, "maxnreg": 64}
    compiled = triton.compile(source, target=GPUTarget("cuda", 80, 32), options=options)
    used = resources(compiled.asm["cubin"])
    assert used["STACK"] + used["LOCAL"] > 0


def test_no_kernel_is_forgotten():
    modules = (linear_cross_entropy, polar_express, rotated_norm, squared_relu)
    here = {id(value) for module in modules for value in vars(module).values() if type(value).__name__ == "JITFunction"}
    files = {path.stem for path in Path(squared_relu.__file__).parent.glob("*.py") if "@triton.jit" in path.read_text()}
    assert here == {id(case.kernel) for case in CASES.values()}
    assert files == {module.__name__.rpartition(".")[2] for module in modules}
