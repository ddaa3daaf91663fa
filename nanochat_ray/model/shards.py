"""One worker's share of the optimizer's work on one tensor, or on all matrices: reduce, update the own part, gather.

Every class has the same life in a step: `start_reduce`, then `update` (which starts the gather), then `finish`.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.distributed as dist
import torch.nn.functional as F

from nanochat_ray.model.sharding import Stack, lay_out, shard_bounds
from nanochat_ray.model.updates import Orthogonalize, adamw_, muon

Tensors = dict[str, torch.Tensor]
_CPU_ELEMENTS_AT_ONCE = 5 * 2**20  # of a stack; see _parts
EXP_AVG, EXP_AVG_SQ, MOMENTUM, SECOND_MOMENT = "exp_avg", "exp_avg_sq", "momentum", "second_moment"


@dataclass(frozen=True)
class Workers:
    """This worker's place among those that train together."""

    rank: int
    size: int

    @staticmethod
    def current() -> "Workers":
        if dist.is_available() and dist.is_initialized():
            return Workers(dist.get_rank(), dist.get_world_size())
        return Workers(0, 1)

    def gather(self, own: torch.Tensor) -> torch.Tensor | None:
        """Stack equally shaped tensors of all workers on worker 0, on the CPU; None elsewhere."""
        if self.size == 1:
            return own.unsqueeze(0).cpu()
        parts = [torch.empty_like(own) for _ in range(self.size)] if self.rank == 0 else None
        dist.gather(own, parts)
        return None if parts is None else torch.stack(parts).cpu()


class Shard(Protocol):
    """What the optimizer asks of a share."""

    @property
    def parameters(self) -> list[torch.nn.Parameter]: ...
    def start_reduce(self) -> None: ...
    def update(
        self, step: int, lr_multiplier: float, momentum: float, weight_decay: float, grad_scale: float
    ) -> None: ...
    def finish(self) -> None: ...
    def state_names(self) -> set[str]: ...
    def gather_state(self) -> Tensors: ...
    def load_state(self, state: Mapping[str, torch.Tensor]) -> None: ...


class _AdamWTensor:
    """AdamW on [start, stop) of a flat tensor."""

    def __init__(
        self, name: str, parameter: torch.nn.Parameter, rate: float, betas: tuple[float, float], decay: float,
        workers: Workers, bounds: tuple[int, int], size: int,
    ):  # fmt: skip
        self._name, self._parameter = name, parameter
        self._rate, self._betas, self._decay = rate, betas, decay
        self._workers = workers
        self._own, self._size = slice(*bounds), size
        self._exp_avg = torch.zeros(size, device=parameter.device)
        self._exp_avg_sq = torch.zeros(size, device=parameter.device)
        self._grad = torch.empty(0)
        self._pending: dist.Work | None = None

    @property
    def parameters(self) -> list[torch.nn.Parameter]:
        return [self._parameter]

    def _apply(self, step: int, lr_multiplier: float, grad_scale: float) -> None:
        _wait(self._pending)
        weight = self._parameter.view(-1)[self._own]
        grad = self._grad[: len(weight)].mul_(grad_scale)
        adamw_(
            weight, grad, self._exp_avg[: len(weight)], self._exp_avg_sq[: len(weight)],
            step=step, rate=self._rate * lr_multiplier, betas=self._betas, weight_decay=self._decay,
        )  # fmt: skip
        self._grad, self._pending = torch.empty(0), None

    def _moments(self) -> dict[str, torch.Tensor]:
        return {f"{self._name}.{EXP_AVG}": self._exp_avg, f"{self._name}.{EXP_AVG_SQ}": self._exp_avg_sq}

    def state_names(self) -> set[str]:
        return set(self._moments())

    def load_state(self, state: Mapping[str, torch.Tensor]) -> None:
        for name, moment in self._moments().items():
            own = state[name].reshape(-1)[self._own]
            moment[: len(own)] = own.to(moment.device)


class ReplicatedShard(_AdamWTensor):
    """A small tensor: its gradient is summed over all workers and each updates the whole."""

    def __init__(
        self, name: str, parameter: torch.nn.Parameter, rate: float, betas: tuple[float, float], decay: float,
        workers: Workers,
    ):  # fmt: skip
        elements = parameter.numel()
        super().__init__(name, parameter, rate, betas, decay, workers, (0, elements), elements)

    def start_reduce(self) -> None:
        self._grad = _take_grad(self._parameter).view(-1)
        if self._workers.size > 1:
            self._pending = dist.all_reduce(self._grad, async_op=True)

    def update(self, step: int, lr_multiplier: float, momentum: float, weight_decay: float, grad_scale: float) -> None:
        self._apply(step, lr_multiplier, grad_scale)

    def finish(self) -> None:
        pass  # nothing to gather

    def gather_state(self) -> Tensors:
        return {name: moment.view_as(self._parameter).cpu() for name, moment in self._moments().items()}


class TensorShard(_AdamWTensor):
    """A large tensor, cut flat into equal parts (the last ones padded), one per worker."""

    def __init__(
        self, name: str, parameter: torch.nn.Parameter, rate: float, betas: tuple[float, float], decay: float,
        workers: Workers,
    ):  # fmt: skip
        elements = parameter.numel()
        bounds = shard_bounds(elements, workers.rank, workers.size)
        super().__init__(name, parameter, rate, betas, decay, workers, bounds, -(-elements // workers.size))
        self._gathered = torch.empty(0)

    def start_reduce(self) -> None:
        grad = _take_grad(self._parameter).view(-1)
        if self._workers.size == 1:
            self._grad = grad
            return
        self._grad = torch.empty_like(self._exp_avg)
        self._pending = dist.reduce_scatter_single(
            self._grad, _pad(grad, self._size * self._workers.size), async_op=True
        )

    def update(self, step: int, lr_multiplier: float, momentum: float, weight_decay: float, grad_scale: float) -> None:
        self._apply(step, lr_multiplier, grad_scale)
        if self._workers.size > 1:
            whole = self._parameter.view(-1)
            padded = self._size * self._workers.size
            self._gathered = whole if len(whole) == padded else whole.new_empty(padded)
            self._pending = dist.all_gather_single(self._gathered, _pad(whole[self._own], self._size), async_op=True)

    def finish(self) -> None:
        _wait(self._pending)
        whole = self._parameter.view(-1)
        if self._workers.size > 1 and len(self._gathered) != len(whole):
            whole.copy_(self._gathered[: len(whole)])
        self._gathered, self._pending = torch.empty(0), None

    def gather_state(self) -> Tensors:
        gathered = {name: self._workers.gather(moment) for name, moment in self._moments().items()}
        return {
            name: parts.view(-1)[: self._parameter.numel()].view_as(self._parameter)
            for name, parts in gathered.items()
            if parts is not None
        }


class MatrixShard:
    """Muon on whole matrices: each has one owner; all travel in one buffer [world, size] (see sharding.py)."""

    def __init__(
        self, matrices: dict[str, torch.nn.Parameter], rate: float, dtype: torch.dtype, workers: Workers,
        orthogonalize: Orthogonalize,
    ):  # fmt: skip
        self._matrices, self._rate, self._dtype, self._workers = matrices, rate, dtype, workers
        self._orthogonalize = orthogonalize
        shapes = {name: (parameter.shape[0], parameter.shape[1]) for name, parameter in matrices.items()}
        self._layout = lay_out(shapes, workers.size)
        self._device = next(iter(matrices.values())).device
        self._momentum = torch.zeros(self._layout.size, device=self._device)
        self._second = torch.zeros(self._layout.second_size, device=self._device)
        self._buffer = torch.empty(0)  # [world, size]: gradients on their way, then weights on their way
        self._own = torch.empty(0)  # [size]
        self._pending: dist.Work | None = None

    @property
    def parameters(self) -> list[torch.nn.Parameter]:
        return list(self._matrices.values())

    def start_reduce(self) -> None:
        self._buffer = torch.zeros(self._workers.size, self._layout.size, device=self._device)
        for row, stacks in zip(self._buffer, self._layout.stacks, strict=True):
            for stack in stacks:
                for name, place in zip(stack.names, _matrices(row, stack), strict=True):
                    grad, self._matrices[name].grad = self._matrices[name].grad, None
                    if grad is not None:
                        place.copy_(grad)
        self._own = self._buffer[0]
        if self._workers.size > 1:
            self._own = torch.empty_like(self._momentum)
            self._pending = dist.reduce_scatter_single(self._own, self._buffer.view(-1), async_op=True)

    def update(self, step: int, lr_multiplier: float, momentum: float, weight_decay: float, grad_scale: float) -> None:
        _wait(self._pending)
        self._own.mul_(grad_scale)
        for stack in self._layout.stacks[self._workers.rank]:
            for part in _parts(stack, self._device):
                grads, momenta = _matrices(self._own, stack)[part], _matrices(self._momentum, stack)[part]
                seconds = _seconds(self._second, stack)[part]
                weight, new_momenta, new_seconds = muon(
                    torch.stack([self._matrices[name].detach() for name in stack.names[part]]), grads, momenta, seconds,
                    momentum=momentum, rate=self._rate * lr_multiplier, weight_decay=weight_decay, dtype=self._dtype,
                    orthogonalize=self._orthogonalize,
                )  # fmt: skip
                momenta.copy_(new_momenta)
                seconds.copy_(new_seconds)
                grads.copy_(weight)  # from here on the own part holds weights
        if self._workers.size > 1:
            self._pending = dist.all_gather_single(self._buffer.view(-1), self._own, async_op=True)

    def finish(self) -> None:
        _wait(self._pending)
        for row, stacks in zip(self._buffer, self._layout.stacks, strict=True):
            for stack in stacks:
                for name, weight in zip(stack.names, _matrices(row, stack), strict=True):
                    self._matrices[name].copy_(weight)
        self._buffer, self._own, self._pending = torch.empty(0), torch.empty(0), None

    def state_names(self) -> set[str]:
        return {f"{name}.{moment}" for name in self._matrices for moment in (MOMENTUM, SECOND_MOMENT)}

    def gather_state(self) -> Tensors:
        momentum, second = self._workers.gather(self._momentum), self._workers.gather(self._second)
        state: Tensors = {}
        if momentum is None or second is None:
            return state
        for stacks, momentum_row, second_row in zip(self._layout.stacks, momentum, second, strict=True):
            for stack in stacks:
                moments = zip(stack.names, _matrices(momentum_row, stack), _seconds(second_row, stack), strict=True)
                for name, first_moment, second_moment in moments:
                    state[f"{name}.{MOMENTUM}"], state[f"{name}.{SECOND_MOMENT}"] = first_moment, second_moment
        return state

    def load_state(self, state: Mapping[str, torch.Tensor]) -> None:
        for stack in self._layout.stacks[self._workers.rank]:
            for name, momentum in zip(stack.names, _matrices(self._momentum, stack), strict=True):
                momentum.copy_(state[f"{name}.{MOMENTUM}"])
            for name, second in zip(stack.names, _seconds(self._second, stack), strict=True):
                second.copy_(state[f"{name}.{SECOND_MOMENT}"])


def _parts(stack: Stack, device: torch.device) -> list[slice]:
    """Which of the stack's matrices are updated at once: on a CPU as many as fit its cache, elsewhere all."""
    matrix = stack.elements // len(stack.names)
    at_once = max(1, _CPU_ELEMENTS_AT_ONCE // matrix) if device.type == "cpu" else len(stack.names)
    return [slice(first, first + at_once) for first in range(0, len(stack.names), at_once)]


def _matrices(row: torch.Tensor, stack: Stack) -> torch.Tensor:
    """The stack's matrices (K, M, N) as a view of its owner's row."""
    return row[stack.offset : stack.offset + stack.elements].view(-1, *stack.shape)


def _seconds(row: torch.Tensor, stack: Stack) -> torch.Tensor:
    start = stack.second_offset
    return row[start : start + stack.second_elements].view(-1, *stack.second_shape)


def _take_grad(parameter: torch.nn.Parameter) -> torch.Tensor:
    """The gradient, zeros if there is none; the parameter loses it."""
    grad, parameter.grad = parameter.grad, None
    return torch.zeros_like(parameter) if grad is None else grad.contiguous()


def _pad(flat: torch.Tensor, size: int) -> torch.Tensor:
    return flat if len(flat) == size else F.pad(flat, (0, size - len(flat)))


def _wait(work: dist.Work | None) -> None:
    if work is not None:
        work.wait()
