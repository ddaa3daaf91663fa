"""The plan as plain data: stored with the run, compared when the run continues. Standard library only."""

from dataclasses import asdict, dataclass, field
from typing import Any

from nanochat_ray.errors import UserError
from nanochat_ray.plan.shape import ModelShape, ParameterCounts

PRETRAIN, SFT = "pretrain", "sft"


@dataclass(frozen=True)
class Rates:
    """Peak learning rates, one per optimizer group."""

    embedding: float  # AdamW
    value_embedding: float  # AdamW
    unembedding: float  # AdamW
    matrix: float  # Muon
    scalar: float  # AdamW; the x0 scalars
    residual_scalar: float  # AdamW; the residual scalars
    smear: float  # AdamW; smear gate and scalar, backout scalar


@dataclass(frozen=True)
class Plan:
    """Every number of one training stage. The last two fields say where they came from; comparisons ignore them."""

    stage: str  # PRETRAIN or SFT: which schedules apply
    depth: int
    model: ModelShape
    parameters: ParameterCounts
    flops_per_token: int
    optimal_tokens: int  # D = ratio · P; sets batch, rates and decay even when the run is shorter or longer
    batch_tokens: int  # B = micro_batch_rows · micro_batches · sequence_len
    micro_batch_rows: int  # m
    micro_batches: int  # G, per optimizer step, whatever the number of workers
    steps: int
    tokens: int  # steps · batch_tokens
    warmup_steps: int
    warmdown_steps: int
    rates: Rates
    weight_decay: float  # λ at step 0, Muon matrices only
    seed: int
    preset: str | None = field(default=None, compare=False)
    rules: dict[str, str] = field(default_factory=dict, compare=False, repr=False)

    @property
    def in_words(self) -> str:
        """The model and its micro-batch in a line."""
        shape = self.model
        width = f"d{self.depth}, width {shape.n_embd}, T={shape.sequence_len}"
        return f"{width}, vocabulary {shape.vocab_size:,}, {self.micro_batch_rows} rows"

    @property
    def flops(self) -> int:
        """FLOPs of the whole stage."""
        return self.flops_per_token * self.tokens

    @property
    def rows_per_step(self) -> int:
        return self.micro_batch_rows * self.micro_batches

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @staticmethod
    def from_dict(data: dict[str, Any]) -> "Plan":
        """The plan that `to_dict` wrote.

        Raises:
            UserError: a field is missing or unknown: the plan was written by another version.
        """
        try:
            model, counts = ModelShape(**data["model"]), ParameterCounts(**data["parameters"])
            return Plan(**{**data, "model": model, "parameters": counts, "rates": Rates(**data["rates"])})
        except (KeyError, TypeError) as error:
            raise UserError(f"the stored plan does not fit this version of nanochat_ray ({error})") from error


def differences(old: Plan, new: Plan) -> list[str]:
    """One line per field that differs, `name: old → new`; empty when the plans are equal."""
    before, after = _flat(old), _flat(new)
    return [f"{name}: {before[name]} → {after[name]}" for name in before if before[name] != after[name]]


def _flat(plan: Plan) -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in plan.to_dict().items():
        if name not in ("preset", "rules"):
            flat.update(
                {f"{name}.{key}": item for key, item in value.items()} if isinstance(value, dict) else {name: value}
            )
    return flat
