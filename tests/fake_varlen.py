"""`torch.nn.attention.varlen.varlen_attn` as its documentation says, in plain fp32 loops: torch has it for GPUs."""

import torch


def varlen_attn(
    query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *,
    window_size=(-1, -1), enable_gqa=False, seqused_k=None, block_table=None, num_splits=None,
):  # fmt: skip
    """Sequence by sequence; asks for what the kernels ask for, and looks at no key that does not take part."""
    heads, kv_heads = query.shape[1], key.shape[-2]
    assert heads == kv_heads or (enable_gqa and heads % kv_heads == 0)
    assert cu_seq_q.dtype == torch.int32
    assert (block_table is None) == (seqused_k is None)
    if block_table is not None:
        assert block_table.dtype == seqused_k.dtype == torch.int32
        assert cu_seq_k is None
        assert block_table.min() >= 0
        assert block_table.max() < len(key)
    out = torch.full_like(query, torch.nan)
    for index in range(len(cu_seq_q) - 1):
        own = slice(int(cu_seq_q[index]), int(cu_seq_q[index + 1]))
        queries = own.stop - own.start
        if block_table is None:
            keys, values = (part[int(cu_seq_k[index]) : int(cu_seq_k[index + 1])] for part in (key, value))
        else:
            page = key.shape[1]
            position = torch.arange(int(seqused_k[index]))
            slots = block_table[index, position // page].long() * page + position % page
            keys, values = (part.flatten(0, 1)[slots] for part in (key, value))
        assert queries <= max_q
        assert len(keys) <= max_k
        for row in range(queries):
            at = len(keys) - queries + row  # the last query stands at the last key
            left, right = window_size
            seen = slice(0 if left < 0 else max(0, at - left), None if right < 0 else at + right + 1)
            k_SGK, v_SGK = keys[seen].float(), values[seen].float()
            q_GRK = query[own.start + row].float().unflatten(0, (kv_heads, -1))
            weights_GRS = torch.softmax(torch.einsum("grk,sgk->grs", q_GRK, k_SGK) / query.shape[-1] ** 0.5, dim=-1)
            out[own.start + row] = torch.einsum("grs,sgk->grk", weights_GRS, v_SGK).flatten(0, 1).to(out.dtype)
    return out
