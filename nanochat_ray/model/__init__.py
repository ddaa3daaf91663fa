"""The network, its loss and its optimizer: plain torch modules and functions, no Ray.

    gpt.py          the network; one forward for training, one cached path for inference
    attention.py    rotary positions and windowed causal attention, chosen by device
    cache.py        keys and values of what the network has read
    loss.py         unembedding, softcap and cross-entropy in chunks
    operations.py   the seam that kernels fill: norm, attention, loss …
    execution.py    how training runs: our kernels, torch.compile or eager
    updates.py      AdamW and Muon as pure functions
    sharding.py     which worker owns which part of the optimizer's work
    optim.py        the optimizer over any number of workers

Suffixes name the axes of a tensor: B rows, T positions, D model width, H query heads, G key/value heads, K head size,
S cached positions, V vocabulary, N = B·T tokens, C tokens of a chunk.
"""
