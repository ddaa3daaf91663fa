"""From `depth` (and optional overrides) to a plan; from a pretraining plan to a finetuning plan.

The number of workers is not part of a plan: a step is `micro_batches` micro-batches of `micro_batch_rows` rows,
whoever computes them.
"""

import math
from dataclasses import asdict, replace
from typing import Any

from nanochat_ray.errors import UsageError
from nanochat_ray.plan.hardware import Hardware
from nanochat_ray.plan.record import PRETRAIN, SFT, Plan, Rates
from nanochat_ray.plan.schedules import warmdown_steps, warmup_steps
from nanochat_ray.plan.shape import SHAPE_RULES, ModelShape, derive_shape, is_power_of_two

STANDARD_RATIO = 12.0  # training tokens per scaling parameter, near the optimum of compute

REFERENCE_DEPTH = 12  # base rates, batch and decay were tuned at this depth
REFERENCE_BATCH = 2**19  # tokens
REFERENCE_WIDTH = 768
BATCH_EXPONENT = 0.383  # best batch ∝ D^0.383 (arXiv:2505.13738)
BASE_WEIGHT_DECAY = 0.28

MAX_MICRO_BATCH_ROWS = 32
SFT_RATE_FRACTION = 0.8

PRESETS: dict[str, dict[str, Any]] = {
    "tiny": {
        "depth": 4,
        "head_size": 64,
        "vocab_size": 4096,
        "sequence_len": 256,
        "micro_batch_rows": 8,
        "batch_tokens": 4096,
        "steps": 50,
    },
    **{f"d{depth}": {"depth": depth} for depth in (12, 20, 24, 26, 32)},
}
# A run of two minutes ends long before rates that are scaled for long runs have moved the weights far. Measured with
# tiny: after 13 steps the loss is 6.4 at twice the rule's rates, 5.4 at six times; finetuning ends at 1.7 and 0.4.
RATE_SCALES = {"tiny": 4.0}
SFT_OF_PRESETS: dict[str, dict[str, Any]] = {"tiny": {"batch_tokens": 2048, "rate_fraction": 1.5, "max_steps": 150}}


def make_plan(
    depth: int | None = None,
    preset: str | None = None,
    *,
    vocab_size: int | None = None,
    sequence_len: int | None = None,
    head_size: int | None = None,
    kv_heads: int | None = None,
    window_pattern: str | None = None,
    micro_batch_rows: int | None = None,
    batch_tokens: int | None = None,
    steps: int | None = None,
    tokens: int | None = None,
    flops: float | None = None,
    ratio: float | None = None,
    seed: int = 42,
    hardware: Hardware | None = None,
) -> Plan:
    """The pretraining plan of a depth or a preset; anything given overrides its rule (None = by rule).

    `hardware` only bounds the micro-batch by its memory.

    Raises:
        UsageError: a value is out of range or two contradict each other; says what would work.
    """
    given = {
        name: value for name, value in locals().items() if value is not None and name not in ("preset", "hardware")
    }
    chosen = _with_preset(given, preset)
    for name, value in chosen.items():
        if name not in ("window_pattern", "seed") and value <= 0:
            hint = f"; or choose a preset: {', '.join(PRESETS)}" if name == "depth" else ""
            raise UsageError(f"{_flag(name)} {value} must be at least 1{hint}")
    rules = {
        name: f"given ({_flag(name)})" if name in given else f"preset {preset}" for name in chosen if name != "seed"
    }

    return _plan(derive_shape(chosen, rules), chosen, rules, preset, hardware)


def plan_for(
    model: ModelShape,
    *,
    micro_batch_rows: int | None = None,
    batch_tokens: int | None = None,
    steps: int | None = None,
    seed: int = 42,
) -> Plan:
    """The pretraining plan of a model that is there already, imported: all but its shape by rule, or as given.

    Raises:
        UsageError: as `make_plan`.
    """
    given = {"micro_batch_rows": micro_batch_rows, "batch_tokens": batch_tokens, "steps": steps}
    chosen: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
    for name, value in chosen.items():
        if value <= 0:
            raise UsageError(f"{_flag(name)} {value} must be at least 1")
    rules = {name: f"given ({_flag(name)})" for name in chosen}
    rules |= dict.fromkeys(SHAPE_RULES, "as imported")
    return _plan(model, {**chosen, "seed": seed}, rules, None, None)


def _plan(
    shape: ModelShape, chosen: dict[str, Any], rules: dict[str, str], preset: str | None, hardware: Hardware | None
) -> Plan:
    counts = shape.count_parameters()
    token_ratio = float(chosen.get("ratio", STANDARD_RATIO))
    optimal_tokens = int(token_ratio * counts.scaling)
    reference_tokens = token_ratio * _reference_shape().count_parameters().scaling
    horizon = optimal_tokens / reference_tokens  # D / D_ref
    rules["optimal_tokens"] = f"D = {token_ratio:g} · P, P = matrices + unembedding = {counts.scaling:,}"

    by_rule = 2 ** round(math.log2(REFERENCE_BATCH * horizon**BATCH_EXPONENT))
    by_rule = max(1, by_rule // shape.sequence_len) * shape.sequence_len  # imported contexts may be no power of two
    batch = chosen.get("batch_tokens") or by_rule
    rules.setdefault("batch_tokens", f"2^round(log2(2^19 · (D/D_ref)^{BATCH_EXPONENT})), D/D_ref = {horizon:.4g}")
    rows, micro_batches = _micro_batches(batch, shape, chosen.get("micro_batch_rows"), hardware, rules)

    step_count = _horizon(chosen, optimal_tokens, batch, shape.flops_per_token(), rules)
    return Plan(
        stage=PRETRAIN,
        preset=preset,
        depth=shape.n_layer,
        model=shape,
        parameters=counts,
        flops_per_token=shape.flops_per_token(),
        optimal_tokens=optimal_tokens,
        batch_tokens=batch,
        micro_batch_rows=rows,
        micro_batches=micro_batches,
        steps=step_count,
        tokens=step_count * batch,
        warmup_steps=warmup_steps(step_count),
        warmdown_steps=warmdown_steps(step_count),
        rates=_rates(batch, shape.n_embd, _rate_scale(preset, rules)),
        weight_decay=BASE_WEIGHT_DECAY * math.sqrt(batch / REFERENCE_BATCH) / horizon,
        seed=chosen["seed"],
        rules=rules,
    )


def sft_plan(
    base: Plan,
    rows: int,
    *,
    batch_tokens: int | None = None,
    micro_batch_rows: int | None = None,
    steps: int | None = None,
    rate_fraction: float | None = None,
    seed: int | None = None,
) -> Plan:
    """The finetuning plan after `base`: `rows` packed rows, each seen once unless `steps` says otherwise.

    The model, micro-batch and batch are those of `base` (unless they are given); rates start at `rate_fraction` of the
    pretraining ones and fall linearly to 0; momentum is constant and nothing decays.

    Raises:
        UsageError: the batch is no whole number of micro-batches, or there is less than one micro-batch of rows.
    """
    row_tokens = base.model.sequence_len
    preset = SFT_OF_PRESETS.get(base.preset or "", {})
    rate_fraction = rate_fraction or preset.get("rate_fraction", SFT_RATE_FRACTION)
    rules = {"rates": f"{rate_fraction:g} · pretraining, linearly to 0", "weight_decay": "0 in finetuning"}
    wanted = batch_tokens or preset.get("batch_tokens", base.batch_tokens)
    usual = f"preset {base.preset}" if "batch_tokens" in preset else "as in pretraining"
    rules["batch_tokens"] = "given (--batch-tokens)" if batch_tokens else usual
    if micro_batch_rows is not None:
        if micro_batch_rows < 1:
            raise UsageError(f"--micro-batch-rows {micro_batch_rows} must be at least 1")
        rules["micro_batch_rows"] = "given (--micro-batch-rows)"
    micro_rows, micro_batches = _micro_batches(
        wanted, base.model, micro_batch_rows or base.micro_batch_rows, None, rules
    )
    once = rows * row_tokens // wanted
    step_count = steps or min(once, preset.get("max_steps", once))
    rules["steps"] = f"{rows:,} rows once, {wanted // row_tokens} in a step"
    if steps or step_count < once:
        rules["steps"] = "given (--steps)" if steps else f"at most that many (preset {base.preset}), of {once:,}"
    if step_count < 1:
        raise UsageError(
            f"{rows} finetuning rows are less than one step of {wanted // row_tokens}; give --batch-tokens"
        )
    return replace(
        base,
        stage=SFT,
        batch_tokens=wanted,
        micro_batch_rows=micro_rows,
        micro_batches=micro_batches,
        steps=step_count,
        tokens=step_count * wanted,
        warmup_steps=0,
        warmdown_steps=step_count,
        rates=Rates(**{name: rate * rate_fraction for name, rate in asdict(base.rates).items()}),
        weight_decay=0.0,
        seed=base.seed if seed is None else seed,
        rules=rules,
    )


def _with_preset(given: dict[str, Any], preset: str | None) -> dict[str, Any]:
    known = ", ".join(PRESETS)
    if preset is not None and preset not in PRESETS:
        raise UsageError(f"--preset {preset!r} is unknown; presets: {known}")
    if preset is None and "depth" not in given:
        raise UsageError(f"give --depth N or --preset, one of: {known}")
    if preset is not None and given.get("depth", PRESETS[preset]["depth"]) != PRESETS[preset]["depth"]:
        raise UsageError(f"--preset {preset} has depth {PRESETS[preset]['depth']}; give --depth or --preset, not both")
    horizons = [name for name in ("steps", "tokens", "flops", "ratio") if name in given]
    if len(horizons) > 1:
        raise UsageError(f"{' and '.join(map(_flag, horizons))} both set the horizon; give one")
    defaults = dict(PRESETS[preset]) if preset else {}
    if horizons:
        defaults.pop("steps", None)
    if "sequence_len" in given or "batch_tokens" in given:
        defaults.pop("micro_batch_rows", None)  # it was chosen for the preset's own batch
    return {**defaults, **given}


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def _reference_shape() -> ModelShape:
    return derive_shape({"depth": REFERENCE_DEPTH}, {})


def _micro_batches(
    batch: int, shape: ModelShape, rows: int | None, hardware: Hardware | None, rules: dict[str, str]
) -> tuple[int, int]:
    """(m, G) with m · G · T = batch. Neither looks at the number of workers."""
    length = shape.sequence_len
    if rows is None:
        fits = [
            2**power
            for power in range(MAX_MICRO_BATCH_ROWS.bit_length())
            if batch % (2**power * length) == 0 and (hardware is None or _fits(shape, 2**power, hardware))
        ]
        if not fits and hardware is not None and batch % length == 0:
            raise UsageError(f"depth {shape.n_layer} does not fit {hardware.name}: not even one row per micro-batch")
        rows = max(fits, default=1)
        bound = f"that fits {hardware.memory_bytes / 2**30:.0f} GiB" if hardware else "no hardware named"
        rules["micro_batch_rows"] = f"largest power of two ≤ {MAX_MICRO_BATCH_ROWS} that divides the batch; {bound}"
    elif not is_power_of_two(rows):
        lower = 2 ** (rows.bit_length() - 1)
        raise UsageError(f"--micro-batch-rows {rows} must be a power of two; nearest: {lower}, {2 * lower}")
    size = rows * length
    if batch % size:
        lower = batch // size * size
        nearest = ", ".join(f"{n:,}" for n in (lower, lower + size) if n)
        raise UsageError(
            f"a batch of {batch:,} tokens is no multiple of {rows} rows × {length} tokens = {size:,}; "
            f"nearest that work: {nearest}"
        )
    rules["micro_batches"] = "G = B / (m · T), for any number of workers"
    return rows, batch // size


def _fits(shape: ModelShape, rows: int, hardware: Hardware) -> bool:
    """Whether a worker has room when it is the only one, since a run may shrink to one worker."""
    return shape.worker_bytes(rows) <= hardware.memory_bytes - hardware.reserved_bytes


def _horizon(chosen: dict[str, Any], optimal: int, batch: int, flops_per_token: int, rules: dict[str, str]) -> int:
    if "steps" in chosen:
        return chosen["steps"]
    if "tokens" in chosen:
        wanted, source = chosen["tokens"] // batch, f"{chosen['tokens']:,} tokens / B, rounded down"
    elif "flops" in chosen:
        wanted, source = (
            round(chosen["flops"] / (flops_per_token * batch)),
            f"{chosen['flops']:.3g} FLOPs / (B · FLOPs per token)",
        )
    else:
        wanted, source = optimal // batch, "D / B, rounded down"
    if wanted < 1:
        raise UsageError(f"the horizon is shorter than one step of {batch:,} tokens; give more, or --batch-tokens")
    rules["steps"] = source
    return wanted


def _rate_scale(preset: str | None, rules: dict[str, str]) -> float:
    scale = RATE_SCALES.get(preset or "", 1.0)
    if scale != 1.0:
        rules["rate_scale"] = f"{scale:g} · (preset {preset}) "
    return scale


def _rates(batch: int, width: int, scale: float) -> Rates:
    by_batch = scale * math.sqrt(batch / REFERENCE_BATCH)
    by_width = by_batch * (width / REFERENCE_WIDTH) ** -0.5  # AdamW matrices only
    return Rates(
        embedding=0.3 * by_width,
        value_embedding=0.15 * by_width,
        unembedding=0.008 * by_width,
        matrix=0.02 * by_batch,
        scalar=0.5 * by_batch,
        residual_scalar=0.005 * by_batch,
        smear=0.2,
    )
