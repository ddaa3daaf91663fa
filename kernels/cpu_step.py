"""The network's step on a CPU, fused: a whole forward pass over a ragged batch in one call of compiled code.

    step = CpuStep(model, torch.bfloat16, threads=2)
    step.allocate([64, 64]); logits_RV = step.forward(batch)

The logits after a token depend on the tokens before it and on nothing else: not on what else is in the batch, how the
prompt was cut into steps, which blocks hold it, or the number of threads. Not "nearly": every bit. The code is in
kernels/cpu_step/, which kernels/cpu_build.py compiles at first use.

Measured through the engine on two Zen 4 cores, 12 layers of width 768, vocabulary 32768, 256 tokens before the reply:
in bf16 3.9, 4.7, 4.0 and 3.3 times plain torch's tokens/s for 1, 8, 16 and 32 replies; int8 1.9, 1.3, 1.4 and 1.4
times bf16. Without VNNI, AVX512-BF16 or either, int8 is the faster of the two as well. Its matrix products are equal
to the bit on all processors; logits are not, since attention's scores are bf16, which processors round differently.
"""

import ctypes
import mmap
import sys
import weakref
from collections.abc import Iterable, Sequence
from contextlib import suppress
from ctypes import POINTER, Structure, byref, c_float, c_int32, c_int64, c_void_p
from typing import cast

import numpy as np
import torch
from torch import nn

from kernels import cpu_build
from nanochat_ray.errors import UserError
from nanochat_ray.model.attention import RotaryTables
from nanochat_ray.model.gpt import GPT
from nanochat_ray.model.ragged import BLOCK, RaggedBatch, window_groups
from nanochat_ray.plan.shape import SMEAR_GATE_CHANNELS, ModelShape, round_up

SOURCES = "cpu_step"
LANES = 16  # columns of a panel of packed weights
CHANNEL_MULTIPLE = 32
DTYPES = (torch.float32, torch.bfloat16, torch.int8)  # of matrices, in the order of step.h


class _Shape(Structure):
    _fields_ = [
        *((name, c_int32) for name in ("matrices", "threads", "layers", "heads", "kv_heads", "head_size")),
        *((name, c_int32) for name in ("width", "vocab", "context")),
    ]


class _LayerWeights(Structure):
    _fields_ = [
        *((name, c_void_p) for name in ("qkv", "out", "up", "down", "value_embedding", "gate")),
        *((name, c_float) for name in ("resid_lambda", "x0_lambda")),
        *((name, c_int32) for name in ("window", "group", "place")),
    ]


class _Weights(Structure):
    _fields_ = [
        *((name, c_void_p) for name in ("layers", "embedding", "head", "cosines", "sines", "smear_gate")),
        *((name, c_float) for name in ("smear_lambda", "backout_lambda", "query_key_scale")),
    ]


class _Storage(Structure):
    _fields_ = [("data", c_void_p), ("blocks", c_int64), ("table", c_void_p), ("table_width", c_int32)]


class _Batch(Structure):
    _fields_ = [
        *((name, c_int32) for name in ("tokens", "sequences", "wanted_count")),
        *((name, c_void_p) for name in ("ids", "previous", "positions", "starts", "wanted")),
        ("groups", POINTER(_Storage)),
        ("logits", c_void_p),
    ]


def why_not(shape: ModelShape, dtype: torch.dtype) -> str | None:
    """Why this machine cannot run such a model with `CpuStep`, in words; None if it can. May compile: seconds."""
    if sys.byteorder != "little" or ctypes.sizeof(c_void_p) != 8:
        return "the CPU kernel needs a 64-bit little-endian processor"
    if dtype not in DTYPES:
        return f"the CPU kernel computes in float32, bfloat16 or int8, not {dtype}"
    if shape.head_size % CHANNEL_MULTIPLE:
        return f"the CPU kernel needs a head size that is a multiple of {CHANNEL_MULTIPLE}, not {shape.head_size}"
    return cpu_build.why_not(SOURCES)


class CpuStep:
    """A network and the blocks of its sequences: a `StepModel`.

    Matrices are copied, packed for the kernel; embeddings are shared with the model if they have the dtype already. So
    the caller may drop the model, but must make a new step when its weights change. Threads do not survive a fork: make
    it in the process that uses it. One Python thread at a time may call `forward`, which releases the GIL.

    Args:
        dtype: of matrices, keys and values, torch.bfloat16 or torch.float32; residuals and norms are fp32 in either.
            torch.int8: of matrices and of what enters them, with a factor per column and per token; keys, values and
            embeddings are bf16.
        threads: that share the work, the caller among them; the others sleep between steps.
        context: positions a sequence may have; None: as many as in training.
        extra_flags: for the compiler; tests use them to get the code of other machines.

    Raises:
        UserError: this machine cannot compile it, or the model has a shape it does not know; see `why_not`.
    """

    def __init__(
        self,
        model: GPT,
        dtype: torch.dtype,
        threads: int,
        extra_flags: tuple[str, ...] = (),
        context: int | None = None,
    ):
        config = model.config
        reason = why_not(config, dtype)
        if reason is not None:
            raise UserError(reason)
        if threads < 1:
            raise ValueError(f"{threads} threads cannot compute anything")
        self.vocab_size = config.vocab_size
        self.context = context or config.sequence_len
        self.groups = window_groups(config)
        self._matrices = dtype
        self._dtype = torch.bfloat16 if dtype == torch.int8 else dtype
        self._kv_width = config.kv_width
        self._library = cpu_build.load(SOURCES, extra_flags)
        self._library.cpu_step_new.restype = c_void_p
        self._storage: list[mmap.mmap] = []
        self._blocks: tuple[int, ...] = (0,) * len(self.groups)
        self._kept: list[object] = []  # what the compiled code points to
        shape = _Shape(
            DTYPES.index(dtype), threads, config.n_layer, config.n_head, config.n_kv_head, config.head_size,
            config.n_embd, config.vocab_size, self.context,
        )  # fmt: skip
        with torch.no_grad():
            weights = self._weights(model)
        self._step = c_void_p(self._library.cpu_step_new(byref(shape), byref(weights)))
        self.close = weakref.finalize(self, self._library.cpu_step_free, self._step)  # also at exit; once

    def block_bytes(self, group: int) -> int:
        """Memory of one block of a group, in bytes: keys and values of 16 positions in all its layers."""
        return len(self.groups[group].layers) * self._layer_block_bytes

    def allocate(self, blocks: Sequence[int]) -> None:
        """Make room for so many blocks per group; whatever was stored is lost. Memory is taken as it is written."""
        if len(blocks) != len(self.groups) or min(blocks) < 0:
            raise ValueError(f"{list(blocks)} are not numbers of blocks for {len(self.groups)} groups")
        self._storage = []  # before the new: there may not be room for both
        self._storage = [_memory(count * self.block_bytes(group)) for group, count in enumerate(blocks)]
        self._blocks = tuple(blocks)

    def stored(self, group: int) -> np.ndarray:
        """The group's memory itself, (layers, blocks, bytes of a block in one layer) uint8."""
        shape = (len(self.groups[group].layers), self._blocks[group], self._layer_block_bytes)
        return np.frombuffer(self._storage[group], np.uint8, int(np.prod(shape))).reshape(shape)

    def forward(self, batch: RaggedBatch) -> np.ndarray:
        """Soft-capped logits (R, vocab_size) in float32 after the wanted tokens.

        Raises:
            ValueError: the batch contradicts itself, or names ids, positions or blocks that do not exist.
        """
        batch = _with_plain_arrays(batch)
        self._check(batch)
        logits_RV = np.empty((len(batch.wanted), self.vocab_size), np.float32)
        groups = (_Storage * len(self.groups))()
        for group, (memory, table) in enumerate(zip(self._storage, batch.tables, strict=True)):
            groups[group] = _Storage(_address(memory), self._blocks[group], table.ctypes.data, table.shape[1])
        arrays = (batch.ids, batch.previous, batch.positions, batch.starts, batch.wanted)
        sizes = (len(batch.ids), len(batch.starts) - 1, len(batch.wanted))
        call = _Batch(*sizes, *(array.ctypes.data for array in arrays), groups, logits_RV.ctypes.data)
        if self._library.cpu_step_forward(self._step, byref(call)):
            raise MemoryError(f"no memory for a step of {len(batch.ids)} tokens")
        return logits_RV

    @property
    def _layer_block_bytes(self) -> int:
        return 2 * BLOCK * self._kv_width * self._dtype.itemsize

    def _check(self, batch: RaggedBatch) -> None:
        """Whatever would make the compiled code read or write where it must not."""
        count = len(batch.ids)
        starts, positions = batch.starts, batch.positions
        if not self.close.alive or len(batch.tables) != len(self._storage):
            raise ValueError("the step is closed, or nothing is allocated, or the batch has tables of another model")
        lengths = np.diff(starts)
        if len(starts) < 2 or starts[0] != 0 or starts[-1] != count or lengths.min() < 1:
            raise ValueError(f"starts {starts.tolist()} do not cut {count} tokens into sequences of at least one")
        if len(batch.previous) != count or len(positions) != count:
            raise ValueError(f"{count} ids, {len(batch.previous)} previous ids and {len(positions)} positions")
        if batch.ids.min() < 0 or max(batch.ids.max(), batch.previous.max()) >= self.vocab_size:
            raise ValueError(f"ids must lie in 0 … {self.vocab_size - 1}")
        firsts = positions[starts[:-1]]
        lasts = firsts + lengths - 1
        steady = np.repeat(firsts - starts[:-1], lengths) + np.arange(count, dtype=np.int32)
        if not np.array_equal(steady, positions) or firsts.min() < 0 or lasts.max() >= self.context:
            raise ValueError(f"positions must ascend by one in each sequence, within 0 … {self.context - 1}")
        if len(batch.wanted) and (
            batch.wanted[0] < 0 or batch.wanted[-1] >= count or (np.diff(batch.wanted) < 1).any()
        ):
            raise ValueError(f"wanted {batch.wanted.tolist()} must ascend within 0 … {count - 1}")
        for group, table, blocks in zip(self.groups, batch.tables, self._blocks, strict=True):
            last_columns = lasts // BLOCK
            whole = table.ndim == 2 and len(table) == len(firsts) and table.shape[1] > last_columns.max()
            if not whole or not _holds_blocks(
                table, np.maximum(firsts - group.window, 0) // BLOCK, last_columns, blocks
            ):
                raise ValueError(
                    f"the table of window {group.window} lacks blocks that are needed, or names some ≥ {blocks}"
                )

    def _weights(self, model: GPT) -> _Weights:
        """Packs everything; the results live as long as the step."""
        config = model.config
        matrices: dict[str, torch.Tensor] = {"head": model.lm_head.weight[: config.vocab_size]}
        for layer, block in enumerate(model.blocks):
            attention = block.attn
            matrices[f"{layer}.qkv"] = torch.cat([m.weight for m in (attention.c_q, attention.c_k, attention.c_v)])
            matrices[f"{layer}.out"] = attention.c_proj.weight
            matrices[f"{layer}.up"] = block.mlp.c_fc.weight
            matrices[f"{layer}.down"] = block.mlp.c_proj.weight
        packed = self._pack(matrices)
        layers = (_LayerWeights * config.n_layer)()
        for group, of_group in enumerate(self.groups):
            for place, layer in enumerate(of_group.layers):
                gate, name = model.blocks[layer].attn.ve_gate, str(layer)
                layers[layer] = _LayerWeights(
                    *(packed[f"{layer}.{matrix}"] for matrix in ("qkv", "out", "up", "down")),
                    None
                    if gate is None
                    else self._keep(cast(nn.Embedding, model.value_embeds[name]).weight, self._dtype),
                    None if gate is None else self._keep(gate.weight, torch.float32),
                    *(_number(model.resid_lambdas, 1.0, layer), _number(model.x0_lambdas, 0.0, layer)),
                    *(of_group.window, group, place),
                )
        tables = RotaryTables(config.head_size, config.rotary_base)
        cosines, sines = tables(self.context, torch.device("cpu"), torch.float32)
        no_gate = torch.zeros(SMEAR_GATE_CHANNELS)
        self._kept.append(layers)
        return _Weights(
            ctypes.addressof(layers),
            self._keep(cast(nn.Embedding, model.transformer["wte"]).weight, self._dtype),
            packed["head"],
            self._keep(cosines, torch.float32),
            self._keep(sines, torch.float32),
            self._keep(no_gate if model.smear_gate is None else model.smear_gate.weight, torch.float32),
            *(_number(model.smear_lambda, 0.0), _number(model.backout_lambda, 0.0), config.query_key_scale),
        )

    def _keep(self, tensor: torch.Tensor, dtype: torch.dtype) -> int:
        """Address of a tensor's rows in a dtype on the CPU."""
        tensor = tensor.detach().to("cpu", dtype).contiguous()
        self._kept.append(tensor)
        return tensor.data_ptr()

    def _pack(self, matrices: dict[str, torch.Tensor]) -> dict[str, int]:
        """Addresses of weights (N, K) as panels [N / 16][K / word][16][word], word = 1 fp32, 2 bf16 or 4 int8.

        N is padded. Behind each panel of int8 stand the factors of its columns, 16 fp32.
        """
        stored = torch.uint8 if self._matrices == torch.int8 else self._matrices
        word, scaled = 4 // stored.itemsize, self._matrices == torch.int8
        sizes = [round_up(len(weight), LANES) * (weight.shape[1] // word + scaled) * 4 for weight in matrices.values()]
        memory = _memory(sum(sizes))
        self._kept.append(memory)
        addresses, offset = {}, 0
        for (name, weight), size in zip(matrices.items(), sizes, strict=True):
            rows, channels = weight.shape
            padded = torch.zeros(round_up(rows, LANES), channels, dtype=weight.dtype)
            padded[:rows] = weight
            room = torch.frombuffer(memory, dtype=stored, count=size // stored.itemsize, offset=offset)
            panels = room.view(-1, channels // word + scaled, LANES, word)
            if scaled:
                padded, factors = _eight_bits(padded)
                panels[:, -1] = factors.view(torch.uint8).view(-1, LANES, word)
                panels = panels[:, :-1]
            panels.copy_(padded.view(-1, LANES, channels // word, word).transpose(1, 2))
            addresses[name] = _address(memory) + offset
            offset += size
        return addresses


def _eight_bits(weight_NK: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Weights as factor · (q − 128): q (N, K) uint8 in 1 … 255; factors (N, 1) fp32, NaN for weights not finite."""
    weight_NK = weight_NK.float()
    factor_N1 = weight_NK.abs().amax(dim=1, keepdim=True) / 127
    factor_N1[~factor_N1.isfinite()] = torch.nan
    quotient_NK = weight_NK / factor_N1.clamp(min=torch.finfo(torch.float32).tiny)
    return (quotient_NK.round() + 128).to(torch.uint8), factor_N1


def _number(scalars: torch.Tensor | None, neutral: float, index: int = 0) -> float:
    """A learned scalar, or, of an extra that the model does not have, the one with which it changes no bit."""
    return neutral if scalars is None else scalars[index].item()


def _holds_blocks(table_SJ: np.ndarray, first_S: np.ndarray, last_S: np.ndarray, blocks: int) -> bool:
    """Whether each row names existing blocks in its columns first … last."""
    columns_J = np.arange(table_SJ.shape[1], dtype=np.int32)
    needed_SJ = (columns_J >= first_S[:, None]) & (columns_J <= last_S[:, None])
    absent_SJ = table_SJ.view(np.uint32) >= blocks  # negative numbers are large ones
    return not (needed_SJ & absent_SJ).any()


def _with_plain_arrays(batch: RaggedBatch) -> RaggedBatch:
    def plain(arrays: Iterable[np.ndarray]) -> list[np.ndarray]:
        return [np.ascontiguousarray(array, dtype=np.int32) for array in arrays]

    vectors = plain((batch.ids, batch.previous, batch.positions, batch.starts))
    ids, previous, positions, starts = vectors
    return RaggedBatch(ids, previous, positions, starts, tuple(plain(batch.tables)), *plain((batch.wanted,)))


def _memory(size: int) -> mmap.mmap:
    """Zeroed memory of at least this size on huge pages where there are any: streaming it then misses no TLB."""
    memory = mmap.mmap(-1, max(size, 1))
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with suppress(OSError):  # a kernel without them
            memory.madvise(mmap.MADV_HUGEPAGE)
    return memory


def _address(memory: mmap.mmap) -> int:
    return ctypes.addressof(ctypes.c_char.from_buffer(memory))
