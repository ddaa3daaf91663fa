"""Imported models as runs: `<run>/tokenizer` and, in a stage, its origin and a checkpoint of step 0.

    store_run(run, "base", Imported(shape, weights, tokenizer, origin))

Such a run is like any other: `jobs.pretrain` trains on from there, `jobs.sft` finetunes it, `jobs.base_eval` measures
it, `jobs.serve` and `jobs.chat` talk (see train/origin.py).
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from nanochat_ray.errors import UserError
from nanochat_ray.model.gpt import GPT
from nanochat_ray.plan import PRETRAIN, SFT, ModelShape, Plan, plan_for
from nanochat_ray.storage import Folder
from nanochat_ray.stream.cursor import Cursor, StreamIdentity
from nanochat_ray.tokenizer import Tokenizer
from nanochat_ray.train.checkpoint import Checkpoints, Tensors, TrainState
from nanochat_ray.train.events import read_events
from nanochat_ray.train.lease import Fence, Lease
from nanochat_ray.train.origin import START, Origin

STAGES = {"base": PRETRAIN, "sft": SFT}
NAMES_SHOWN = 4  # of a list in a message


@dataclass(frozen=True, eq=False)
class Imported:
    """A model with its tokenizer.

    Attributes:
        weights: fp32, on the CPU, by the names of `GPT`'s parameters; see `misfits`.
        origin: its `model` is the shape of the network.
    """

    weights: Tensors
    tokenizer: Tokenizer
    origin: Origin


def misfits(model: ModelShape, weights: Tensors) -> list[str]:
    """What keeps the weights from being those of such a model, one line per kind of fault; empty when they fit."""
    with torch.device("meta"):
        wanted = {name: tuple(parameter.shape) for name, parameter in GPT(model).named_parameters()}
    odd = [
        f"{name} is {_size(weights[name].shape)} instead of {_size(wanted[name])}"
        for name in sorted(wanted.keys() & weights.keys())
        if tuple(weights[name].shape) != wanted[name]
    ]
    faults = {
        "missing": sorted(wanted.keys() - weights.keys()),
        "surplus": sorted(weights.keys() - wanted.keys()),
        "of another shape": odd,
    }
    return [f"{len(names)} {fault}: {shortened(names)}" for fault, names in faults.items() if names]


def shortened(names: Sequence[str]) -> str:
    """The first few of a list, and how many more there are."""
    more = f" and {len(names) - NAMES_SHOWN} more" if len(names) > NAMES_SHOWN else ""
    return ", ".join(names[:NAMES_SHOWN]) + more


def store_run(run: Folder, stage: str, imported: Imported) -> bool:
    """Write a run, or a further stage of one; True when it was written, False when the same import was there already.

    Args:
        stage: "base" or "sft".

    Raises:
        UserError: weights and model or model and tokenizer do not belong together; the run has another tokenizer, or
            the stage other weights, which are never overwritten; or another process is at work on it.
        OSError: the storage failed.
    """
    _require_one_model(imported)
    folder = run / stage
    run.require_writable()
    new_tokenizer = _require_own_tokenizer(run, imported.tokenizer)
    with Lease.acquire(folder) as lease:
        if not _require_own_weights(folder, imported.origin):
            return False
        if new_tokenizer:
            imported.tokenizer.save(run / "tokenizer")
        imported.origin.write(folder)  # before the weights: without it, they would be taken for trained ones
        _save(folder, stage, imported, lease.fence)
    return True


def _require_one_model(imported: Imported) -> None:
    model = imported.origin.model
    if faults := misfits(model, imported.weights):
        raise UserError(f"the weights are not those of their model: {'; '.join(faults)}")
    if model.vocab_size != imported.tokenizer.vocab_size:
        raise UserError(
            f"the model has a vocabulary of {model.vocab_size:,}, the tokenizer one of "
            f"{imported.tokenizer.vocab_size:,}: they do not belong together; give the tokenizer it was trained with"
        )


def _require_own_tokenizer(run: Folder, tokenizer: Tokenizer) -> bool:
    """Whether the run has none yet; UserError when it has another one."""
    if not run.exists("tokenizer/tokenizer.json"):
        return True
    if Tokenizer.load(run / "tokenizer").fingerprint != tokenizer.fingerprint:
        raise UserError(f"{run} has another tokenizer, which is not overwritten: choose another name with --run")
    return False


def _require_own_weights(stage: Folder, origin: Origin) -> bool:
    """Whether the stage has no weights yet; UserError when it has others."""
    steps = Checkpoints.of(stage).steps()
    if steps and Origin.of(stage) == origin:
        return False
    if steps or read_events(stage):
        raise UserError(f"{stage} holds another model, which is not overwritten: choose another name with --run")
    return True


def _save(folder: Folder, stage: str, imported: Imported, fence: Fence) -> None:
    plan = _untrained(imported.origin.model, STAGES[stage])
    identity = StreamIdentity(
        corpus="imported",
        tokenizer=imported.tokenizer.fingerprint,
        sequence_len=plan.model.sequence_len,
        micro_batch_rows=plan.micro_batch_rows,
        micro_batches=plan.micro_batches,
        seed=plan.seed,
    )
    state = TrainState(plan, Cursor(identity, START))
    Checkpoints.of(folder).save(state, imported.weights, {}, fence)  # the first step begins with a fresh optimizer


def _untrained(model: ModelShape, stage: str) -> Plan:
    """The model's plan by rule with no steps: finetuning takes its batch and rates from it."""
    plan = plan_for(model, steps=1)
    rules = {**plan.rules, "steps": "imported, not trained here"}
    return replace(plan, stage=stage, steps=0, tokens=0, warmup_steps=0, warmdown_steps=0, rules=rules)


def _size(shape: Sequence[int]) -> str:
    return "×".join(map(str, shape)) or "a number"
