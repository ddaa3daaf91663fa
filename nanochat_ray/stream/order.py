"""The order of everything: pure functions of (seed, epoch) and of (micro-batch, workers).

The world size enters only `micro_batches_of`, which says who computes, never what.
"""

import numpy as np


def epoch_order(units: int, epoch: int, seed: int) -> np.ndarray:
    """Unit indices in the order in which an epoch visits them: the corpus order first, then seeded permutations.

    Returns:
        int64 [units]
    """
    if epoch == 0:
        return np.arange(units)
    return np.random.Generator(np.random.Philox(key=[seed, epoch])).permutation(units)


def row_order(rows: int, epoch: int, unit: int, seed: int) -> np.ndarray:
    """The order of a unit's rows within an epoch.

    Best-fit packing puts a unit's long documents last; unshuffled, every unit would draw the same wave into the loss.

    Returns:
        int64 [rows]
    """
    return np.random.Generator(np.random.Philox(key=[(seed << 32) ^ epoch, unit])).permutation(rows)


def micro_batches_of(step: int, micro_batches: int, first_step: int, rank: int, world_size: int) -> list[int]:
    """Indices of the global micro-batches that a worker runs in a step, ascending; may be empty.

    Micro-batch i belongs to step i // micro_batches. A stream that (re)starts at `first_step` deals its micro-batches
    to the workers in turn, beginning with worker 0.
    """
    begin, dealt_from = step * micro_batches, first_step * micro_batches
    return [i for i in range(begin, begin + micro_batches) if (i - dealt_from) % world_size == rank]
