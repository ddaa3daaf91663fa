"""Bits per byte on a held-out split: comparable between tokenizers, and the same for every number of workers."""

import math
from collections.abc import Callable, Iterable

import numpy as np
import torch

from nanochat_ray.stream.rows import IGNORED_TARGET, MicroBatch, to_inputs_and_targets

# (inputs int64 [m, T], targets int64 [m, T]) → nats fp32 [m, T], 0 where the target is ignored
TokenLosses = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def evaluate_bpb(
    token_losses: TokenLosses,
    micro_batches: Iterable[MicroBatch],
    token_bytes: np.ndarray,
    device: torch.device,
    sum_over_workers: Callable[[torch.Tensor], torch.Tensor] = lambda table: table,
) -> float:
    """Total nats / ln 2 / total bytes, over targets that stand for bytes (special tokens count neither way).

    Args:
        micro_batches: this worker's share; the sums over all shares are what counts.
        token_bytes: int32 [vocab], UTF-8 bytes of each token, 0 for special tokens.
        sum_over_workers: of a float64 [2] tensor.

    Raises:
        ZeroDivisionError: there is no byte to predict in any share.
    """
    bytes_V = torch.from_numpy(token_bytes)
    totals = torch.zeros(2, dtype=torch.float64)
    with torch.no_grad():  # not inference mode: the model may keep tables it builds here for training
        for micro_batch in micro_batches:
            inputs_BT, targets_BT = map(torch.from_numpy, to_inputs_and_targets(micro_batch.tokens_MT))
            nats_BT = token_losses(inputs_BT.to(device), targets_BT.to(device)).double().cpu()
            target_bytes_BT = torch.where(targets_BT == IGNORED_TARGET, 0, bytes_V[targets_BT.clamp(min=0)])
            totals[0] += nats_BT[target_bytes_BT > 0].sum()
            totals[1] += target_bytes_BT.sum()
    nats, total_bytes = sum_over_workers(totals).tolist()
    return nats / math.log(2) / total_bytes
