"""A step of many sequences at once: what the scheduler hands to whoever runs the model. Plain integers, no torch.

Sequences of different lengths are laid end to end, so nothing is padded. Keys and values live in blocks of `BLOCK`
positions; a sequence's block table says which block holds which of its positions. Layers with the same attention window
form a *group*, and each group has its own blocks and tables: a block that has fallen out of a short window is free
again, although layers that see everything still need theirs.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from nanochat_ray.plan.shape import ModelShape

BLOCK = 16  # positions in a block


@dataclass(frozen=True)
class RaggedBatch:
    """N tokens of S sequences; those of one sequence stand together, in order, and continue what it has stored.

    ids        (N,) int32
    previous   (N,) int32: the id before it in its sequence, −1 at position 0 (the smear needs its embedding)
    positions  (N,) int32: index in its sequence
    starts     (S + 1,) int32: sequence s owns tokens starts[s] … starts[s + 1] − 1
    tables     per group (S, width) int32: the block that holds positions 16·j … 16·j + 15 of sequence s, −1 where no
               window reaches any more; columns beyond a sequence's last position mean nothing
    wanted     (R,) int32, ascending: tokens after which logits are wanted
    """

    ids: np.ndarray
    previous: np.ndarray
    positions: np.ndarray
    starts: np.ndarray
    tables: tuple[np.ndarray, ...]
    wanted: np.ndarray


@dataclass(frozen=True)
class WindowGroup:
    """Layers that share a window, and so blocks: position i of them attends to positions i − window … i."""

    window: int
    layers: tuple[int, ...]


def window_groups(shape: ModelShape) -> tuple[WindowGroup, ...]:
    """The groups of a model, shortest window first."""
    windows: Sequence[int] = shape.windows
    return tuple(
        WindowGroup(window, tuple(layer for layer, other in enumerate(windows) if other == window))
        for window in sorted(set(windows))
    )


class StepModel(Protocol):
    """A model with the blocks of its sequences: reads a batch, stores keys and values, gives logits.

    vocab_size   of the logits
    context      positions a sequence may have
    groups       see `window_groups`
    """

    vocab_size: int
    context: int
    groups: tuple[WindowGroup, ...]

    def block_bytes(self, group: int) -> int:
        """Memory of one block of a group, in bytes."""
        ...

    def allocate(self, blocks: Sequence[int]) -> None:
        """Make room for so many blocks per group; whatever was stored is lost."""
        ...

    def forward(self, batch: RaggedBatch) -> np.ndarray:
        """Soft-capped logits (R, vocab_size) in float32 after the wanted tokens."""
        ...
