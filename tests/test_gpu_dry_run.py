"""One fp8 training step at depth 26 on tensors that have shapes and dtypes but no memory, with the GPU's operations.

What a GPU would compute is not known here; what it would keep is. Eager: torch.compile keeps less.
"""

from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("triton", reason="Triton is for Linux")

from kernels.gpu import operations
from kernels.gpu.fp8_linear import E4M3, use_fp8
from kernels.gpu.operations import GpuOperations
from kernels.gpu.polar_express import polar_express
from nanochat_ray.model.gpt import GPT, GPTConfig, Linear
from nanochat_ray.model.optim import build_optimizer
from nanochat_ray.plan import make_plan
from nanochat_ray.plan.hardware import find_hardware

pytestmark = pytest.mark.slow

META = torch.device("meta")


class CudaNorm(torch.autograd.Function):
    """What F.rms_norm keeps on CUDA: its input and a number per row. On meta it would be a chain of fp32 operations."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x, x.new_empty((*x.shape[:-1], 1), dtype=torch.float32))
        return torch.empty_like(x)

    @staticmethod
    def backward(ctx, grad):
        assert grad.dtype == ctx.saved_tensors[0].dtype
        return torch.empty_like(grad)


class Operations(GpuOperations):
    def norm(self, x: torch.Tensor) -> torch.Tensor:
        return CudaNorm.apply(x)


@pytest.fixture(scope="module")
def step():
    """A forward and a backward pass of a micro-batch of the d26 preset on an H100, and the optimizer's step."""
    plan = make_plan(preset="d26", hardware=find_hardware("1xH100"))
    with META:
        model = GPT(GPTConfig.from_shape(plan.model))
    model.set_dtype(torch.bfloat16).use_operations(Operations(fp8=True))
    replaced = use_fp8(model)
    outputs: dict[str, torch.Tensor] = {}
    for name, module in model.named_modules():
        if isinstance(module, Linear):
            module.register_forward_hook(lambda _, __, output, name=name: outputs.update({name: output.detach()}))
    kept: dict[int, torch.Tensor] = {}  # by storage: what is kept twice takes memory once

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.untyped_storage()._cdata] = tensor
        return tensor

    ids_BT = torch.zeros(plan.micro_batch_rows, plan.model.sequence_len, dtype=torch.long, device=META)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = model(ids_BT, ids_BT, "sum")
    for parameter in model.parameters():
        kept.pop(parameter.untyped_storage()._cdata, None)
    loss.backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    optimizer = build_optimizer(model, plan.rates)
    optimizer.step(lr_multiplier=1.0, momentum=0.95, weight_decay=0.1, grad_scale=1e-6)
    state = [value for shard in optimizer._shards for value in vars(shard).values() if type(value) is torch.Tensor]
    return SimpleNamespace(
        plan=plan, model=model, replaced=replaced, outputs=outputs, kept=list(kept.values()), loss=loss,
        gradients=gradients, state=state,
    )  # fmt: skip


def size(tensors) -> int:
    return sum(tensor.untyped_storage().nbytes() for tensor in tensors)


def test_all_six_large_matrices_of_each_layer_are_in_fp8_and_activations_in_bf16(step):
    assert len(step.replaced) == 6 * step.plan.model.n_layer
    assert {output.dtype for output in step.outputs.values()} == {torch.bfloat16}
    tokens = step.plan.micro_batch_rows * step.plan.model.sequence_len
    dtypes = {tensor.dtype for tensor in step.kept if tensor.numel() >= tokens * 128}
    assert dtypes == {torch.bfloat16, E4M3}  # nothing of an activation's size is kept in fp32
    assert (step.loss.dtype, step.loss.shape) == (torch.float32, ())


def test_every_gradient_has_the_shape_of_its_weight_in_fp32(step):
    for name, parameter in step.model.named_parameters():
        assert step.gradients[name].shape == parameter.shape, name
        assert step.gradients[name].dtype == parameter.dtype == torch.float32, name


def test_muons_matrices_come_out_as_they_went_in():
    for shape in ((3, 1664, 1664), (2, 6656, 1664), (2, 1664, 6656)):
        x = torch.empty(shape, dtype=torch.bfloat16, device=META)
        update = polar_express(x)
        assert (update.shape, update.dtype) == (x.shape, x.dtype)


def test_memory_is_what_the_plan_says(step):
    shape, rows = step.plan.model, step.plan.micro_batch_rows
    assert size(step.model.parameters()) == size(step.gradients.values()) == shape.weight_bytes()
    # Muon keeps one number more per row or column.
    assert shape.optimizer_bytes() <= size(step.state) <= 1.001 * shape.optimizer_bytes()
    activations = size(step.kept)
    print(f"kept {activations / 2**30:.2f} GiB, planned {shape.activation_bytes(rows) / 2**30:.2f}")
    assert 0.85 * shape.activation_bytes(rows) <= activations <= shape.activation_bytes(rows)


def test_where_the_operations_are_not_for_says_why():
    assert operations.why_not(torch.device("cpu"), torch.bfloat16) == "the GPU's kernels need CUDA, this is cpu"
    assert "bf16 and fp16, not torch.float32" in operations.why_not(torch.device("cuda"), torch.float32)


@pytest.mark.parametrize("fp8", [False, True])
def test_torch_compile_takes_the_layers_as_one_graph_around_the_kernels(fp8, monkeypatch):
    monkeypatch.setattr(operations, "MIN_TILED_TOKENS", 1)
    with META:
        model = GPT(GPTConfig(256, 512, n_layer=2, n_head=2, n_kv_head=1, n_embd=256, window_pattern="SL"))
    model.set_dtype(torch.bfloat16).use_operations(GpuOperations(fp8))
    if fp8:
        use_fp8(model)
    ids_BT = torch.zeros(2, 256, dtype=torch.long, device=META)
    hidden = torch.compile(model.hidden, dynamic=False, backend="aot_eager", fullgraph=True)
    x_BTD = hidden(ids_BT, model.rotary(256, META, torch.bfloat16))
    model.loss(x_BTD, ids_BT, "mean").backward()
    assert all(parameter.grad.dtype == torch.float32 for parameter in model.parameters())
