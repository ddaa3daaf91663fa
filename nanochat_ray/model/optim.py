"""The optimizer: Muon for the matrices inside the layers, AdamW for everything else, over any number of workers.

    optimizer = build_optimizer(model, plan.rates, dtype)
    loss.backward()                                   # gradients are local SUMS over target tokens
    optimizer.step(lr_multiplier=…, momentum=…, weight_decay=…, grad_scale=1 / targets_of_all_workers)

State is sharded (ZeRO-2, arXiv:1910.02054): every gradient is reduced to the worker that owns that part of it, which
updates its part of the weight and sends it to all. All reductions start at once; while one part is being updated, the
others and the gathers of finished parts are under way. One worker needs no process group.
"""

from collections.abc import Iterable, Mapping

import torch

from nanochat_ray.errors import UserError
from nanochat_ray.model.gpt import GPT
from nanochat_ray.model.shards import MatrixShard, ReplicatedShard, Shard, Tensors, TensorShard, Workers
from nanochat_ray.plan import Rates

STEP = "step"
_REPLICATED_BELOW = 4096  # elements; smaller tensors are not worth sharding


class MuonAdamW:
    """The update of all parameters of a model, its state, and the part of both that this worker owns."""

    def __init__(self, shards: Iterable[Shard], workers: Workers):
        self._shards = tuple(shards)
        self._workers = workers
        self.steps = 0  # updates done so far

    @torch.no_grad()
    def step(self, lr_multiplier: float, momentum: float, weight_decay: float, grad_scale: float) -> None:
        """Update all weights and drop the gradients. Collective: every worker calls it, with the same arguments.

        A parameter without a gradient counts as zero: a worker may have had no micro-batch.

        Args:
            lr_multiplier: factor on every group's rate.
            momentum: of Muon.
            weight_decay: of Muon; the AdamW groups have their own constants.
            grad_scale: factor on the summed gradients, one over the number of target tokens of the global batch.
        """
        self.steps += 1
        for shard in self._shards:
            shard.start_reduce()
        for shard in self._shards:
            shard.update(self.steps, lr_multiplier, momentum, weight_decay, grad_scale)
        for shard in self._shards:
            shard.finish()

    def has_finite_gradients(self) -> bool:
        """Whether this worker's own gradients are numbers: read once, in less than a hundredth of a step."""
        parameters = [parameter for shard in self._shards for parameter in shard.parameters]
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        return not gradients or bool(torch.nn.utils.get_total_norm(gradients).isfinite())

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Drop all gradients (or set them to zero)."""
        for shard in self._shards:
            for parameter in shard.parameters:
                if set_to_none:
                    parameter.grad = None
                elif parameter.grad is not None:
                    parameter.grad.zero_()

    def state_dict(self) -> Tensors:
        """The whole state as {"<parameter>.<moment>": tensor} and the step count, independent of the world size.

        Collective. Worker 0 gets everything, on the CPU; the others get nothing. With one CPU worker the tensors are
        the live state: copy or write them before the next step.
        """
        state: Tensors = {STEP: torch.tensor(self.steps)}
        for shard in self._shards:
            state.update(shard.gather_state())
        return state if self._workers.rank == 0 else {}

    def load_state_dict(self, state: Mapping[str, torch.Tensor]) -> None:
        """Take this worker's part of a whole state, saved under any world size.

        Raises:
            UserError: a tensor is missing, or there is one too many: the state belongs to another model.
        """
        names = {STEP}.union(*(shard.state_names() for shard in self._shards))
        if names != set(state):
            odd = sorted(names.symmetric_difference(state))
            raise UserError(
                f"the optimizer state does not belong to this model: {len(odd)} names differ, the first is {odd[0]}; "
                "use the checkpoint's own plan, or start with --fresh"
            )
        self.steps = int(state[STEP])
        for shard in self._shards:
            shard.load_state(state)


def build_optimizer(model: GPT, rates: Rates, dtype: torch.dtype | None = None) -> MuonAdamW:
    """The optimizer of a model that is on its device and has its operations; joins the process group if there is one.

    Args:
        rates: peak rates per group, already scaled.
        dtype: of Muon's iteration; the model's compute dtype unless given.
    """
    workers = Workers.current()
    matrices: dict[str, torch.nn.Parameter] = {}
    others: list[Shard] = []
    for name, parameter in model.named_parameters():
        if name.startswith("transformer.h."):
            matrices[name] = parameter
            continue
        rate, betas, decay = _adamw_settings(name, rates)
        kind = ReplicatedShard if parameter.numel() < _REPLICATED_BELOW else TensorShard
        others.append(kind(name, parameter, rate, betas, decay, workers))
    # Matrices first: the others' reductions run behind their long update.
    of_layers = MatrixShard(matrices, rates.matrix, dtype or model.dtype, workers, model.operations.polar_express)
    return MuonAdamW([of_layers, *others], workers)


def _adamw_settings(name: str, rates: Rates) -> tuple[float, tuple[float, float], float]:
    """Rate, betas and weight decay of a parameter outside the layers."""
    match name.partition(".")[0]:
        case "lm_head":
            return rates.unembedding, (0.8, 0.96), 0.01
        case "transformer":
            return rates.embedding, (0.8, 0.995), 0.001
        case "value_embeds":
            return rates.value_embedding, (0.8, 0.995), 0.01
        case "resid_lambdas":
            return rates.residual_scalar, (0.8, 0.95), 0.05
        case "x0_lambdas":
            return rates.scalar, (0.96, 0.95), 0.0
        case "smear_gate" | "smear_lambda" | "backout_lambda":
            return rates.smear, (0.8, 0.95), 0.0
    raise AssertionError(f"no optimizer group for parameter {name}")
