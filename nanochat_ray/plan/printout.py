"""A plan for people: every number with the rule it came from, and what it will cost on named hardware."""

from nanochat_ray.plan import schedules
from nanochat_ray.plan.hardware import Hardware
from nanochat_ray.plan.record import SFT, Plan
from nanochat_ray.plan.roofline import training_step
from nanochat_ray.plan.shape import LOGITS_CHUNK_BYTES

Row = tuple[str, str, str]  # name, value, rule


def explain(plan: Plan, hardware: Hardware | None = None) -> list[Row]:
    """Every number of the plan as (name, value, rule), in reading order; with hardware, its cost there as well."""
    rows = [*_model_rows(plan), *_parameter_rows(plan), *_horizon_rows(plan), *_optimizer_rows(plan)]
    return [*rows, *_memory_rows(plan, hardware), *(_cost_rows(plan, hardware) if hardware else [])]


def table(plan: Plan, hardware: Hardware | None = None) -> str:
    """`explain` as aligned text under a title line."""
    preset = f" (preset {plan.preset})" if plan.preset else ""
    return aligned(f"plan: {plan.stage}, depth {plan.depth}{preset}", explain(plan, hardware))


def aligned(title: str, rows: list[Row]) -> str:
    """Rows in columns under a title line."""
    names = max(len(name) for name, _, _ in rows)
    values = max(len(value) for _, value, _ in rows)
    lines = [f"  {name:<{names}}  {value:>{values}}  {rule}".rstrip() for name, value, rule in rows]
    return "\n".join([title, *lines])


def _model_rows(plan: Plan) -> list[Row]:
    model, rules = plan.model, plan.rules
    inherited = "as in pretraining"
    return [
        ("depth", str(plan.depth), rules.get("depth", inherited)),
        ("width", f"{model.n_embd:,}", rules.get("width", inherited)),
        ("head size", str(model.head_size), rules.get("head_size", inherited)),
        ("heads", str(model.n_head), rules.get("heads", inherited)),
        ("key/value heads", str(model.n_kv_head), rules.get("kv_heads", inherited)),
        ("vocabulary", f"{model.vocab_size:,}", rules.get("vocab_size", inherited)),
        ("context T", f"{model.sequence_len:,}", rules.get("sequence_len", inherited)),
        ("windows", model.window_pattern, rules.get("window_pattern", inherited)),
    ]


def _parameter_rows(plan: Plan) -> list[Row]:
    counts, model = plan.parameters, plan.model
    layers = len(model.value_embedding_layers)
    extras = {
        "residual and x0 scalars of every layer": model.layer_scalars,
        "smear": model.smear,
        "backout": model.backout,
    }
    scalars = ", ".join(name for name, present in extras.items() if present)
    return [
        ("matrices", f"{counts.matrices:,}", "attention and MLP of every layer, gates of value embeddings"),
        ("unembedding", f"{counts.unembedding:,}", f"vocabulary padded to {model.padded_vocab_size:,} · width"),
        ("embedding", f"{counts.embedding:,}", "the same"),
        (
            "value embeddings",
            f"{counts.value_embeddings:,}",
            f"in {layers} layers: every other one, the last always" if layers else "this model has none",
        ),
        ("scalars", f"{counts.scalars:,}", scalars or "this model has none"),
        ("parameters", f"{counts.total:,}", "sum of the five"),
        ("scaling parameters P", f"{counts.scaling:,}", "matrices + unembedding"),
        ("FLOPs per token", f"{plan.flops_per_token:.4g}", "6 · P + Σ over layers 12 · width · window"),
    ]


def _horizon_rows(plan: Plan) -> list[Row]:
    rules = plan.rules
    return [
        ("compute-optimal tokens D", f"{plan.optimal_tokens:,}", rules.get("optimal_tokens", "as in pretraining")),
        ("batch B, tokens", f"{plan.batch_tokens:,}", rules["batch_tokens"]),
        ("micro-batch rows m", str(plan.micro_batch_rows), rules.get("micro_batch_rows", "as in pretraining")),
        ("micro-batches per step G", str(plan.micro_batches), rules["micro_batches"]),
        ("steps", f"{plan.steps:,}", rules["steps"]),
        ("tokens", f"{plan.tokens:,}", "steps · B"),
        ("tokens per scaling parameter", f"{plan.tokens / plan.parameters.scaling:.3g}", "tokens / P"),
        ("training FLOPs", f"{plan.flops:.3e}", "FLOPs per token · tokens"),
    ]


def _optimizer_rows(plan: Plan) -> list[Row]:
    rates, model = plan.rates, plan.model
    scale = plan.rules.get("rate_scale", "")
    rows = [
        ("rate, embedding", f"{rates.embedding:.4g}", scale + "0.3 · sqrt(B/2^19) · (width/768)^-1/2, AdamW"),
        ("rate, value embeddings", f"{rates.value_embedding:.4g}", "half the embedding rate"),
        ("rate, unembedding", f"{rates.unembedding:.4g}", scale + "0.008 · sqrt(B/2^19) · (width/768)^-1/2, AdamW"),
        ("rate, matrices", f"{rates.matrix:.4g}", scale + "0.02 · sqrt(B/2^19), Muon"),
        ("rate, x0 scalars", f"{rates.scalar:.4g}", scale + "0.5 · sqrt(B/2^19), AdamW"),
        ("rate, residual scalars", f"{rates.residual_scalar:.4g}", "a hundredth of it"),
        ("rate, smear and backout", f"{rates.smear:.4g}", "fixed"),
    ]
    absent = {
        "rate, value embeddings": not model.value_embeddings,
        "rate, x0 scalars": not model.layer_scalars,
        "rate, residual scalars": not model.layer_scalars,
        "rate, smear and backout": not (model.smear or model.backout),
    }
    rows = [row for row in rows if not absent.get(row[0])]
    if plan.stage == SFT:
        rows = [(name, value, plan.rules["rates"]) for name, value, _ in rows]
        return [
            *rows,
            ("weight decay", "0", plan.rules["weight_decay"]),
            ("warm-up steps", "0", "none in finetuning"),
            ("warm-down steps", f"{plan.warmdown_steps:,}", "the whole stage, linearly to 0"),
            ("Muon momentum", f"{schedules.SFT_MOMENTUM}", "constant"),
        ]
    share = f"{schedules.FINAL_RATE_FRACTION:.0%}"
    ramp = f"up over {schedules.MOMENTUM_RAMP_STEPS} steps, down in the warm-down; the lower of the two"
    return [
        *rows,
        ("weight decay", f"{plan.weight_decay:.4g}", "0.28 · sqrt(B/2^19) · D_ref/D, a cosine to 0, matrices only"),
        ("warm-up steps", str(plan.warmup_steps), f"min({schedules.WARMUP_STEPS}, steps / 10), linear"),
        (
            "warm-down steps",
            f"{plan.warmdown_steps:,}",
            f"the last {schedules.WARMDOWN_FRACTION:.0%}, linear to {share}",
        ),
        (
            "Muon momentum",
            f"{schedules.MOMENTUM_START} → {schedules.MOMENTUM_PEAK} → {schedules.MOMENTUM_END:.2f}",
            ramp,
        ),
    ]


def _memory_rows(plan: Plan, hardware: Hardware | None) -> list[Row]:
    model, workers = plan.model, hardware.workers if hardware else 1
    weights, optimizer = model.weight_bytes(), model.optimizer_bytes(workers)
    activations = model.activation_bytes(plan.micro_batch_rows)
    whole = model.worker_bytes(plan.micro_batch_rows, workers)
    group = f"shared by {workers} workers" if workers > 1 else "held by 1 worker"
    return [
        ("memory, weights", _gib(weights), "4 bytes per parameter (fp32)"),
        ("memory, gradients", _gib(weights), "4 bytes per parameter"),
        ("memory, optimizer", _gib(optimizer), f"4 bytes per Muon weight, 8 per AdamW weight, {group}"),
        (
            "memory, activations",
            _gib(activations),
            f"m·T tokens · layers · (15 width + 4 kv width) · 2 bytes, + {LOGITS_CHUNK_BYTES >> 20} MiB of logits",
        ),
        ("memory per worker", _gib(whole), "sum; an estimate, plus the runtime's own"),
    ]


def _cost_rows(plan: Plan, hardware: Hardware) -> list[Row]:
    step = training_step(plan, hardware)
    hours = plan.steps * step.seconds / 3600
    peak = f"{hardware.workers * hardware.peak_flops:.3g}"
    on_demand, spot, reached = hardware.on_demand_per_hour, hardware.spot_per_hour, hardware.reached
    assumed = f"assumed: products reach {reached.products:.0%} of the peak, memory {reached.bandwidth:.0%} of the sheet"
    rows = [
        ("hardware", hardware.name, f"{hardware.memory_bytes / 2**30:.0f} GiB per worker; {assumed}"),
        *((f"  {part.name}", f"{part.seconds / step.seconds:.1%}", part.limit) for part in step.parts),
        ("a step", duration(step.seconds), "predicted: the sum of these; on GPUs never measured by us"),
        ("tokens per second", f"{step.tokens_per_s:,.0f}", "B / a step"),
        ("MFU", f"{step.mfu:.1%}", f"FLOPs per token · tokens per second / {peak} FLOP/s (dense bf16)"),
    ]
    if hardware.fp8_flops:
        fp8 = training_step(plan, hardware, fp8=True)
        assumed = f"layers in fp8, assumed to reach {reached.fp8_products:.0%} of {hardware.fp8_flops:.3g} FLOP/s"
        rows.append(("tokens per second, fp8", f"{fp8.tokens_per_s:,.0f}", assumed))
    return [
        *rows,
        ("time", duration(hours * 3600), "steps · a step; without evaluation and start-up"),
        ("money, on demand", f"${hours * on_demand:,.2f}", f"assumed ${on_demand:,.2f} per hour"),
        ("money, spot", f"${hours * spot:,.2f}", f"assumed ${spot:,.2f} per hour, before work lost to preemption"),
    ]


def _gib(count: int) -> str:
    return f"{count / 2**30:,.2f} GiB"


def duration(seconds: float) -> str:
    """`3.1 ms`, `250 ms`, `4.2 s`, `42 s`, `3 min 20 s`, `2 h 05 min`, `3 d 04 h`; nothing is `0 s`."""
    milliseconds, whole = round(seconds * 1000), round(seconds)
    if seconds > 0 and milliseconds < 1000:
        return f"{seconds * 1000:.2g} ms" if milliseconds < 10 else f"{milliseconds} ms"
    if whole < 60:
        return f"{seconds:.1f} s" if 0 < seconds < 9.95 else f"{whole} s"
    for unit, size, smaller, part in (("d", 86400, "h", 3600), ("h", 3600, "min", 60), ("min", 60, "s", 1)):
        if whole >= size:
            return f"{whole // size} {unit} {whole % size // part:02d} {smaller}"
    raise AssertionError("unreachable: 60 seconds or more is at least a minute")
