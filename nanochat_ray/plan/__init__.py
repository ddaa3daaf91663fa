"""The one dial: from `depth` to every number of a training run. Standard library only.

plan = make_plan(depth=12)            # or make_plan(preset="tiny")
print(table(plan))                    # every number with the rule it came from
lr_multiplier(plan, step), muon_momentum(plan, step), weight_decay(plan, step)
"""

from nanochat_ray.plan.derivation import PRESETS, make_plan, plan_for, sft_plan
from nanochat_ray.plan.hardware import Hardware, find_hardware
from nanochat_ray.plan.printout import duration, explain, table
from nanochat_ray.plan.record import PRETRAIN, SFT, Plan, Rates, differences
from nanochat_ray.plan.schedules import lr_multiplier, muon_momentum, weight_decay
from nanochat_ray.plan.shape import ModelShape, ParameterCounts

__all__ = [
    "PRESETS",
    "PRETRAIN",
    "SFT",
    "Hardware",
    "ModelShape",
    "ParameterCounts",
    "Plan",
    "Rates",
    "differences",
    "duration",
    "explain",
    "find_hardware",
    "lr_multiplier",
    "make_plan",
    "muon_momentum",
    "plan_for",
    "sft_plan",
    "table",
    "weight_decay",
]
