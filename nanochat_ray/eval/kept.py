"""What a stage's evaluations found, as one file each: `base/base_eval.json` and `sft/chat_eval.json`.

    {"step", "model_digest", "train_bpb", "val_bpb", "tokens_per_split", "samples", "core": score}
    {"step", "model_digest", "tasks", "samples", "chat_core": score}

A score is what `measure.measure` makes. All figures of a file are of the same weights.
"""

import math
from collections.abc import Mapping
from typing import Any

from nanochat_ray.cli import warn
from nanochat_ray.errors import UserError
from nanochat_ray.storage import Folder, retrying

BASE_EVAL, CHAT_EVAL = "base_eval.json", "chat_eval.json"
SCORES = {BASE_EVAL: "core", CHAT_EVAL: "chat_core"}


def read_evaluation(stage: Folder, file: str) -> dict[str, Any]:
    """What a stage's file has; {} where there is none.

    Raises:
        UserError: it is not what an evaluation writes; names it.
    """
    found = retrying(lambda: stage.read_json(file) if stage.exists(file) else {}, stage, warn)
    if found == {}:
        return {}
    score = found.get(SCORES[file]) if isinstance(found, dict) else None
    if not isinstance(found, dict) or not isinstance(found.get("step"), int) or not (score is None or _is_score(score)):
        raise UserError(f"{stage / file} is not what an evaluation writes; delete it and evaluate again")
    return found


def keep(stage: Folder, file: str, step: int, digest: str, figures: Mapping[str, Any]) -> dict[str, Any]:
    """Add figures to those that a stage's file has of the same weights, in place of those of others; returns all.

    Raises:
        UserError: the storage refuses.
    """
    known = read_evaluation(stage, file)
    if known.get("model_digest") != digest:
        known = {}
    everything = {**known, "step": step, "model_digest": digest, **figures}
    retrying(lambda: stage.write_json(file, everything), stage, warn, when_full=False)
    return everything


def _is_score(score: Any) -> bool:
    if not isinstance(score, dict) or not isinstance(score.get("tasks"), dict) or not score["tasks"]:
        return False
    tasks = score["tasks"].values()
    return _is_interval(score.get("mean")) and all(
        isinstance(task, dict)
        and isinstance(task.get("examples"), int)
        and _is_interval(task.get("accuracy"))
        and _is_interval(task.get("centred"))
        for task in tasks
    )


def _is_interval(found: Any) -> bool:
    return isinstance(found, dict) and all(
        isinstance(found.get(end), int | float) and math.isfinite(found[end]) for end in ("value", "low", "high")
    )
