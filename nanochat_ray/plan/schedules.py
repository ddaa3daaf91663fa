"""How learning rates, Muon's momentum and its weight decay change over the steps of a plan. Pure functions."""

import math

from nanochat_ray.plan.record import SFT, Plan

WARMUP_STEPS = 40
WARMDOWN_FRACTION = 0.65
FINAL_RATE_FRACTION = 0.05
MOMENTUM_RAMP_STEPS = 400
MOMENTUM_START, MOMENTUM_PEAK, MOMENTUM_END = 0.85, 0.97, 0.90
SFT_MOMENTUM = 0.95


def warmup_steps(steps: int) -> int:
    """40, or a tenth of a run that is shorter than 400 steps."""
    return min(WARMUP_STEPS, steps // 10)


def warmdown_steps(steps: int) -> int:
    return round(WARMDOWN_FRACTION * steps)


def lr_multiplier(plan: Plan, step: int) -> float:
    """Factor on every learning rate at `step` (0 … steps-1)."""
    if plan.stage == SFT:
        return (plan.steps - step) / plan.steps
    if step < plan.warmup_steps:
        return (step + 1) / plan.warmup_steps
    left = _warmdown_left(plan, step)
    return left + (1 - left) * FINAL_RATE_FRACTION


def muon_momentum(plan: Plan, step: int) -> float:
    """Muon's momentum at `step`: the lower of the ramp up and the warm-down, so that a short run never jumps."""
    if plan.stage == SFT:
        return SFT_MOMENTUM
    ramp = MOMENTUM_START + (MOMENTUM_PEAK - MOMENTUM_START) * min(1.0, step / MOMENTUM_RAMP_STEPS)
    left = _warmdown_left(plan, step)
    return min(ramp, left * MOMENTUM_PEAK + (1 - left) * MOMENTUM_END)


def weight_decay(plan: Plan, step: int) -> float:
    """Muon's weight decay at `step`: a cosine from λ to 0."""
    return plan.weight_decay * 0.5 * (1 + math.cos(math.pi * step / plan.steps))


def _warmdown_left(plan: Plan, step: int) -> float:
    """1 before the warm-down, then linearly to 0 at the end of the run."""
    return min(1.0, (plan.steps - step) / plan.warmdown_steps) if plan.warmdown_steps else 1.0
