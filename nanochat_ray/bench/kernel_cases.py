"""The operations of a training step on one micro-batch of a plan, each with what no implementation can avoid."""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from nanochat_ray.model.attention import RotaryTables
from nanochat_ray.model.operations import Operations
from nanochat_ray.plan import Plan
from nanochat_ray.plan.shape import attended_pairs

IGNORED_SHARE = 16  # one of so many targets is ignored
STACK = 4  # matrices that Muon updates together

Results = torch.Tensor | tuple[torch.Tensor, ...]


@dataclass(frozen=True)
class Case:
    """One operation, forward and backward.

    Attributes:
        method: of `Operations`, which our kernels may override.
        run: does it with given operations; gradients of weights are added to those that are there.
        flops, moved: that cannot be avoided; bytes.
    """

    name: str
    method: str
    run: Callable[[Operations], object]
    flops: float
    moved: float


def cases(plan: Plan, device: torch.device, dtype: torch.dtype) -> list[Case]:
    """All operations of a training step on one micro-batch of the plan."""
    shape, rows = plan.model, plan.micro_batch_rows
    length, width, heads, size = shape.sequence_len, shape.n_embd, shape.n_head, shape.head_size
    tokens, vocab, item = rows * length, shape.padded_vocab_size, dtype.itemsize
    made = _Inputs(device)
    x_ND, y_ND = made.activation(dtype, tokens, width), made.activation(dtype, tokens, width)
    q_BTHK = made.activation(dtype, rows, length, heads, size)
    k_BTGK, v_BTGK = (made.activation(dtype, rows, length, shape.n_kv_head, size) for _ in range(2))
    rotary = RotaryTables(size, shape.rotary_base)(length, device, dtype)
    up, head = made.weight(4 * width, width), made.weight(vocab, width)
    table = made.weight(vocab, width)
    ids_N = torch.randint(shape.vocab_size, (tokens,), generator=made.draw, device=device)
    targets_N = ids_N.where(torch.arange(tokens, device=device) % IGNORED_SHARE > 0, -1)
    stack = made.activation(dtype, STACK, 4 * width, width).detach()
    row, kv_row = tokens * width * item, tokens * shape.kv_width * item  # bytes of an activation
    found = [
        Case("norm", "norm", made.trained(lambda o: o.norm(x_ND)), 0, 5 * row),
        Case(
            "sum of two and its norm",
            "mixed_norm",
            made.trained(lambda o: o.mixed_norm(x_ND, y_ND)),
            0,
            9 * row,
        ),
        Case(
            "rotation and norm of queries",
            "rotated_norm",
            made.trained(lambda o: o.rotated_norm(q_BTHK, rotary, 1.2)),
            0,
            5 * row,
        ),
        Case(
            "linear and squared ReLU",
            "linear_squared_relu",
            made.trained(lambda o: o.linear_squared_relu(x_ND, up)),
            3 * 2 * tokens * width * 4 * width,
            3 * (5 * row + 4 * width * width * item),
        ),
        Case(
            f"cross-entropy of {tokens:,} tokens",
            "linear_cross_entropy",
            made.trained(lambda o: o.linear_cross_entropy(x_ND, head, targets_N, shape.vocab_size, "sum")),
            3 * 2 * tokens * width * vocab,
            3 * (row + vocab * width * item),
        ),
        Case(
            "embedding",
            "embedding",
            made.trained(lambda o: o.embedding(ids_N, table, dtype)),
            0,
            3 * tokens * width * 4 + 2 * row,
        ),
        Case(
            f"Polar Express, {STACK} of {4 * width} × {width}",
            "polar_express",
            lambda o: o.polar_express(stack),
            STACK * 5 * (4 * width**2 * 4 * width + 2 * width**3),
            2 * stack.numel() * item,
        ),
    ]
    for window in sorted(set(shape.windows)):
        found.append(
            Case(
                f"attention, T = {length}, window {window}",
                "attention",
                made.trained(lambda o, window=window: o.attention(q_BTHK, k_BTGK, v_BTGK, window)),  # type: ignore[misc]
                12 * width * rows * attended_pairs(length, window),
                6 * row + 6 * kv_row,
            )
        )
    return found


class _Inputs:
    """Random tensors that want gradients."""

    def __init__(self, device: torch.device):
        self.draw = torch.Generator(device).manual_seed(0)
        self._device = device
        self._activations: list[torch.Tensor] = []

    def activation(self, dtype: torch.dtype, *sizes: int) -> torch.Tensor:
        made = self._normal(*sizes).to(dtype).requires_grad_()
        self._activations.append(made)
        return made

    def weight(self, outputs: int, inputs: int) -> torch.Tensor:
        """fp32, of which a product of normal activations is normal again."""
        return (self._normal(outputs, inputs) * inputs**-0.5).requires_grad_()

    def trained(self, forward: Callable[[Operations], Results]) -> Callable[[Operations], object]:
        """Forward and backward; gradients of activations are thrown away, as in training."""
        grads = [self._normal(*result.shape).to(result.dtype) for result in _as_tuple(forward(Operations()))]

        def both(operations: Operations) -> None:
            for activation in self._activations:
                activation.grad = None
            torch.autograd.backward(_as_tuple(forward(operations)), grads)

        return both

    def _normal(self, *sizes: int) -> torch.Tensor:
        return torch.randn(sizes, generator=self.draw, device=self._device)


def _as_tuple(results: Results) -> tuple[torch.Tensor, ...]:
    return results if isinstance(results, tuple) else (results,)
