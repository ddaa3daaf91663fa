"""The softcapped cross-entropy on a CPU: torch's matrix products, and compiled code for what is between and after them.

    loss = linear_cross_entropy(x_ND, weight_VD, targets_N, vocab_size, "sum", CpuLoss())

Reference: `nanochat_ray.model.loss.ChunkedLoss`. What its chain of elementwise operations reads and writes a dozen
times is here one pass over each row of logits, while the row is in a core's cache; and the weight's gradient is summed
in fp32 where it lies. The code is in kernels/cpu_loss/.

Measured on two Zen 4 cores, 4,096 tokens, vocabulary 32,768, bf16, forward and backward: at width 256 0.64 s against
0.92 to 1.10 s of the reference, at width 384 0.87 s against 1.44 s: 321 and 354 of the 415 GFLOP/s of a large matrix
product. Torch.compile of the loss over all logits at once took 1.32 s and 0.8 GB, this 0.1 GB. Alone, the elementwise
part is 6.5 times as fast, and the weight's gradient takes 0.88 times as long as torch's product and its sum.
"""

import mmap
from collections.abc import Iterator
from contextlib import suppress
from ctypes import c_int64, c_void_p

import torch

from kernels import cpu_build
from kernels.cpu_crew import address, crew_of
from nanochat_ray.model.loss import IGNORED, ChunkedLoss

SOURCES = "cpu_loss"
DTYPES = (torch.bfloat16, torch.float32)
# Of logits that exist at once. Of 4,096 tokens at a vocabulary of 32,768 and width 256, chunks of 2^24 bytes took
# 1.11 times as long (the weight's gradient is added up once per chunk), and 2^26 as long.
CHUNK_BYTES = 2**25
_LANES = 16
_BLOCK = 32  # as in kernels/cpu_loss/weight_gradient.cpp


def why_not(dtype: torch.dtype) -> str | None:
    """Why this machine cannot compute the loss with `CpuLoss`, in words; None if it can. May compile: seconds."""
    if dtype not in DTYPES:
        return f"the CPU's loss computes in bfloat16 or float32, not {dtype}"
    return cpu_build.why_not(SOURCES)


class CpuLoss(ChunkedLoss):
    """Losses and gradients on torch.get_num_threads() threads, whose number changes no bit of the elementwise part.

    Several Python threads may use it at once. After a fork a child gets threads of ours of its own, but torch's, which
    multiply matrices, do not survive: where they ran before, the child hangs unless it calls torch.set_num_threads(1)
    before its first product.

    Args:
        extra_flags: for the compiler; tests use them to get the code of other machines.
        own_products: whether the weight's gradient in bf16 is our own product; None: where that is faster.

    Raises:
        UserError: this machine cannot compile it; see `why_not`.
    """

    def __init__(self, extra_flags: tuple[str, ...] = (), own_products: bool | None = None):
        self._library = cpu_build.load(SOURCES, extra_flags)
        self._own_products = _multiplies_bf16_pairs() if own_products is None else own_products
        self._rooms: list[mmap.mmap] = []  # for logits, that nobody uses now; a list's pop and append need no lock

    def losses(
        self, x_ND: torch.Tensor, weight_VD: torch.Tensor, targets_N: torch.Tensor, vocab_size: int
    ) -> torch.Tensor:
        targets_N = _checked(x_ND, weight_VD, targets_N, vocab_size)
        cast_VD = weight_VD[:vocab_size].to(x_ND.dtype)
        losses_N = x_ND.new_empty(len(x_ND), dtype=torch.float32)
        for part, z_CV in self._chunks(x_ND, vocab_size):
            torch.mm(x_ND[part], cast_VD.T, out=z_CV)
            self._rows(z_CV, targets_N[part], None, losses_N[part])
        return losses_N

    def losses_and_gradients(
        self,
        x_ND: torch.Tensor,
        weight_VD: torch.Tensor,
        targets_N: torch.Tensor,
        vocab_size: int,
        scale_N: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        targets_N = _checked(x_ND, weight_VD, targets_N, vocab_size)
        cast_VD, scale_N = weight_VD[:vocab_size].to(x_ND.dtype), scale_N.to(torch.float32).contiguous()
        losses_N, grad_x_ND = x_ND.new_empty(len(x_ND), dtype=torch.float32), x_ND.new_empty(x_ND.shape)
        grad_weight_VD = weight_VD.new_empty(weight_VD.shape, dtype=torch.float32)  # contiguous, as the code writes it
        grad_weight_VD[vocab_size if len(x_ND) else 0 :] = 0
        own_VD = grad_weight_VD[:vocab_size]
        for part, z_CV in self._chunks(x_ND, vocab_size):
            torch.mm(x_ND[part], cast_VD.T, out=z_CV)
            self._rows(z_CV, targets_N[part], scale_N[part], losses_N[part])  # z_CV is its own gradient from here on
            torch.mm(z_CV, cast_VD, out=grad_x_ND[part])
            self._add_weight_gradient(own_VD, z_CV, x_ND[part], part.start == 0)
        return losses_N, grad_x_ND, grad_weight_VD

    def _chunks(self, x_ND: torch.Tensor, vocab_size: int) -> Iterator[tuple[slice, torch.Tensor]]:
        """Parts of the tokens, and room (C, V) for their logits, the same for all: fresh memory costs page faults."""
        chunk = max(1, CHUNK_BYTES // (vocab_size * x_ND.element_size()))
        size = min(chunk, len(x_ND)) * vocab_size * x_ND.element_size()
        room = self._rooms.pop() if self._rooms else None
        if room is None or len(room) < size:
            room = _huge_pages(max(1, size))
        for start in range(0, len(x_ND), chunk):
            part = slice(start, min(start + chunk, len(x_ND)))
            rows = part.stop - part.start
            yield part, torch.frombuffer(room, dtype=x_ND.dtype, count=rows * vocab_size).view(rows, vocab_size)
        self._rooms.append(room)

    def _rows(
        self, z_CV: torch.Tensor, targets_C: torch.Tensor, scale_C: torch.Tensor | None, losses_C: torch.Tensor
    ) -> None:
        """Fill in the losses of raw logits; with a scale, the logits become the gradient of Σ scale·loss."""
        rows, vocab = z_CV.shape
        scratch = None
        if scale_C is not None:
            scratch = scale_C.new_empty(torch.get_num_threads(), -(-vocab // _LANES) * _LANES)
        pointers = map(address, (targets_C, scale_C, losses_C, scratch))
        sizes = c_int64(rows), c_int64(vocab)
        self._library.cpu_loss_rows(self._crew(), z_CV.dtype == torch.bfloat16, address(z_CV), *sizes, *pointers)

    def _add_weight_gradient(
        self, sum_VD: torch.Tensor, grad_CV: torch.Tensor, x_CD: torch.Tensor, first: bool
    ) -> None:
        """sum = Gᵀ·x for the first chunk, then sum += Gᵀ·x; in fp32."""
        (tokens, width), vocab = x_CD.shape, grad_CV.shape[1]
        if x_CD.dtype == torch.float32:
            torch.addmm(sum_VD, grad_CV.T, x_CD, beta=0 if first else 1, out=sum_VD)
        elif self._own_products and width % _LANES == 0:
            pairs = -(-tokens // 2)
            panels = x_CD.new_empty(pairs * width, dtype=torch.int32)
            blocks = x_CD.new_empty(torch.get_num_threads() * pairs * _BLOCK, dtype=torch.int32)
            x_CD = x_CD.contiguous()
            self._library.cpu_loss_weight_gradient(
                self._crew(), address(grad_CV), address(x_CD), *map(c_int64, (tokens, vocab, width)),
                address(sum_VD), first, address(panels), address(blocks),
            )  # fmt: skip
        else:
            of_chunk_VD = grad_CV.T @ x_CD
            arguments = address(sum_VD), address(of_chunk_VD), c_int64(sum_VD.numel()), first
            self._library.cpu_loss_accumulate(self._crew(), *arguments)

    def _crew(self) -> c_void_p:
        return crew_of(self._library, "cpu_loss_crew")


def _checked(x_ND: torch.Tensor, weight_VD: torch.Tensor, targets_N: torch.Tensor, vocab_size: int) -> torch.Tensor:
    """The targets as the compiled code reads them, which does not look whether they or anything else exist."""
    devices = {x.device.type for x in (x_ND, weight_VD, targets_N)}
    if x_ND.dtype not in DTYPES or devices != {"cpu"}:
        raise ValueError(f"the CPU's loss takes bfloat16 or float32 on the CPU, not {x_ND.dtype} on {sorted(devices)}")
    if targets_N.shape != x_ND.shape[:1]:
        raise ValueError(f"{len(x_ND)} hidden states need as many targets, not {tuple(targets_N.shape)}")
    if len(targets_N) and (targets_N.min() < IGNORED or targets_N.max() >= vocab_size):
        raise ValueError(f"targets must lie in {IGNORED} … {vocab_size - 1}")
    return targets_N.to(torch.int64).contiguous()


def _multiplies_bf16_pairs() -> bool:
    """AVX512-BF16, and no matrix unit, which torch's library knows how to use."""
    capabilities = torch.cpu.get_capabilities()
    return bool(capabilities.get("avx512_bf16")) and not capabilities.get("amx_bf16")


def _huge_pages(size: int) -> mmap.mmap:
    """Memory of this process alone, also after a fork; on huge pages where there are any."""
    if hasattr(mmap, "MAP_PRIVATE"):
        memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    else:
        memory = mmap.mmap(-1, size)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with suppress(OSError):  # a kernel without them
            memory.madvise(mmap.MADV_HUGEPAGE)
    return memory
