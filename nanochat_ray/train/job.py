"""What a stage of training is, as plain data, and what it has left in the storage. No Ray: any process may ask."""

import argparse
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from nanochat_ray.cli import warn
from nanochat_ray.data.corpus import Unit
from nanochat_ray.errors import UserError
from nanochat_ray.plan import Plan, differences
from nanochat_ray.storage import Folder
from nanochat_ray.stream.cursor import StreamIdentity
from nanochat_ray.stream.rows import RowSource
from nanochat_ray.tokenizer import Tokenizer
from nanochat_ray.train.cadence import Cadence
from nanochat_ray.train.checkpoint import Checkpoints, Loaded, TrainState
from nanochat_ray.train.events import read_events
from nanochat_ray.train.lease import Fence
from nanochat_ray.train.origin import START
from nanochat_ray.train.watchdog import PATIENCE, Patience

EVALS_PER_RUN = 4
EVAL_FRACTION = 50
MIN_EVAL_TOKENS, MAX_EVAL_TOKENS = 2**14, 40 * 2**19


@dataclass(frozen=True)
class TrainingJob:
    """All that a stage of training is, as plain data: what to train, on which rows, how often to look and save."""

    stage: Folder
    plan: Plan
    tokenizer: Tokenizer
    source: RowSource
    train_units: tuple[Unit, ...]
    validation_units: tuple[Unit, ...]
    corpus_fingerprint: str
    eval_micro_batches: int
    cadence: Cadence
    keep_checkpoints: int
    dtype: str | None  # None: what the hardware multiplies best
    kernels: str  # auto | on | off
    compile: str  # auto | on | off
    fence: Fence  # of the lease under which this is written
    sample_tokens: int = 0  # of each continuation of a fixed prompt at evaluations; 0: none
    initial_model: Folder | None = None  # a finished stage whose weights to begin with, or this one if it was imported
    initial_digest: str | None = None  # of those weights
    patience: Patience = PATIENCE  # with workers that hang
    attempt: str = ""
    attempt_began: float = 0.0  # seconds since the epoch

    @staticmethod
    def from_flags(args: argparse.Namespace, **given: Any) -> "TrainingJob":
        """A job whose cadence and numerics come from `cli.TRAINING_FLAGS`, the rest from `given`."""
        plan: Plan = given["plan"]
        eval_tokens = args.eval_tokens or max(plan.tokens // EVAL_FRACTION, MIN_EVAL_TOKENS)
        return TrainingJob(
            eval_micro_batches=max(1, min(eval_tokens, MAX_EVAL_TOKENS) // (plan.batch_tokens // plan.micro_batches)),
            cadence=Cadence(args.eval_every or -(-plan.steps // EVALS_PER_RUN), args.checkpoint_every),
            keep_checkpoints=args.keep_checkpoints,
            dtype=args.dtype,
            kernels=args.kernels,
            compile=args.compile,
            sample_tokens=args.sample_tokens,
            **given,
        )

    @property
    def identity(self) -> StreamIdentity:
        return StreamIdentity(
            corpus=self.corpus_fingerprint,
            tokenizer=self.tokenizer.fingerprint,
            sequence_len=self.plan.model.sequence_len,
            micro_batch_rows=self.plan.micro_batch_rows,
            micro_batches=self.plan.micro_batches,
            seed=self.plan.seed,
        )

    def saved_state(self, deeply: bool = True) -> TrainState | None:
        """The newest valid state, or None before the first step was saved: imported weights, at step 0, are no state.

        Args:
            deeply: verify the tensors, too; otherwise only their sizes (see `Checkpoints.newest_whole`).

        Raises:
            UserError: it belongs to another plan or another stream; names each difference.
        """
        checkpoints = Checkpoints.of(self.stage)
        step = checkpoints.newest_valid(warn) if deeply else checkpoints.newest_whole(warn)
        if step is None:
            return None
        state = checkpoints.state(step)
        if state.cursor.step == START:
            return None
        self._require_own(state)
        return state

    def load(self, warn: Callable[[str], None] = warn) -> Loaded | None:
        """As `saved_state`, with the tensors."""
        loaded = Checkpoints.of(self.stage).load(warn)
        if loaded is None or loaded.state.cursor.step == START:
            return None
        self._require_own(loaded.state)
        return loaded

    def _require_own(self, state: TrainState) -> None:
        state.cursor.require_identity(self.identity)
        if state.initial_model != self.initial_digest:
            raise UserError(
                f"{self.stage} began with other weights than {self.initial_model} has now; train it again with --fresh"
            )
        changed = differences(state.plan, self.plan)
        if changed:
            raise UserError(
                f"{self.stage} was trained to step {state.cursor.step} with another plan: {'; '.join(changed)}. "
                "Give the old values, use another --run, or start anew with --fresh"
            )


def training_figures(stage: Folder) -> dict[str, Any]:
    """The last loss and evaluation of a stage, its tokens, and the median speed of its steps."""
    events = read_events(stage)
    steps = [event for event in events if event["kind"] == "step"]
    evals = [event for event in events if event["kind"] == "eval"]
    return {
        "steps": len(steps),
        "tokens": steps[-1]["tokens"],
        "loss": steps[-1]["loss"],
        "val_bpb": evals[-1]["val_bpb"],
        "tok_per_s": statistics.median(event["tok_per_s"] for event in steps),
        "goodput": steps[-1].get("goodput"),
    }
