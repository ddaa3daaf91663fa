"""Attention of new tokens to keys and values that lie in blocks: torch's `varlen_attn` with a block table.

Not run on a GPU; tests put an implementation of its documentation in its place. Reason for no kernel of ours: this
reads each block once where it lies, splits nothing, pads nothing, and takes windows and grouped heads. See flash.py for
the GPUs and packages that can.
"""

import torch

from nanochat_ray.model.ragged import BLOCK


def paged_attention(
    q_NHK: torch.Tensor,
    keys_PGK: torch.Tensor,
    values_PGK: torch.Tensor,
    starts: torch.Tensor,
    lengths_S: torch.Tensor,
    table_SJ: torch.Tensor,
    max_queries: int,
    max_keys: int,
    context: int,
    window: int,
) -> torch.Tensor:
    """Attention (N, H, K) of the last tokens of S sequences to all within the window, whose keys are stored already.

    Args:
        keys_PGK: positions of all blocks, P = 16 · blocks, as `values_PGK`; all of them must be finite numbers, since
            a kernel may read a whole block and give what no window reaches the weight 0.
        starts: (S + 1,) int32; sequence s owns queries starts[s] … starts[s + 1] − 1.
        lengths_S: (S,) int32, positions of each sequence, the new ones among them.
        table_SJ: (S, J) int32, the block of positions 16·j … 16·j + 15; must name some block where none is needed.
        max_queries: of a sequence, or more.
        max_keys: as `max_queries`.
        context: positions that any sequence may ever have; a window that reaches as far is none.
    """
    from torch.nn.attention.varlen import varlen_attn

    left = window if window < context - 1 else -1  # whoever the neighbours are: each choice has its own rounding
    y_NHK = varlen_attn(
        q_NHK,
        keys_PGK.unflatten(0, (-1, BLOCK)),
        values_PGK.unflatten(0, (-1, BLOCK)),
        starts,
        None,
        max_queries,
        max_keys,
        window_size=(left, 0),
        enable_gqa=q_NHK.shape[1] != keys_PGK.shape[1],
        seqused_k=lengths_S,
        block_table=table_SJ,
        num_splits=1,  # so that a sequence's sums do not depend on how long its neighbours are
    )
    assert isinstance(y_NHK, torch.Tensor)
    return y_NHK
