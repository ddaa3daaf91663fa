"""The softcapped cross-entropy on a CPU: torch's matrix products, and compiled code between and after them.

    loss = linear_cross_entropy(x_ND, weight_VD, targets_N, vocab_size, "sum", CpuLoss())

Reference: `nanochat_ray.model.loss.ChunkedLoss`. What its chain of elementwise operations reads and writes a dozen
times is here one pass over each row of logits, while the row is in a core's cache. The code is in kernels/cpu_loss/.

Measured on two Zen 4 cores, 4,096 tokens × width 256 × vocabulary 32,768, bf16, forward and backward: 0.69 s against
1.10 s of the reference, 298 of the 393 GFLOP/s of a large matrix product; the elementwise part 6.5 times as fast.
"""

import mmap
import threading
from collections.abc import Iterator
from contextlib import suppress
from ctypes import c_int64

import torch

from kernels import cpu_build
from kernels.cpu_crew import address, crew_of
from nanochat_ray.errors import UserError
from nanochat_ray.model.loss import IGNORED, ChunkedLoss

SOURCES = "cpu_loss"
DTYPES = (torch.bfloat16, torch.float32)
# Of logits that exist at once. Of 4,096 tokens at a vocabulary of 32,768 and width 256, chunks of 2^24 bytes took
# 1.11 times as long (the weight's gradient is added up once per chunk), and 2^26 as long.
CHUNK_BYTES = 2**25
_LANES = 16


def why_not(dtype: torch.dtype) -> str | None:
    """Why this machine cannot compute the loss with `CpuLoss`, in words; None if it can. May compile: seconds."""
    if dtype not in DTYPES:
        return f"the CPU's loss computes in bfloat16 or float32, not {dtype}"
    try:
        cpu_build.load(SOURCES)
    except UserError as error:
        return str(error)
    return None


class CpuLoss(ChunkedLoss):
    """Losses and gradients on torch.get_num_threads() threads, whose number changes no bit of the elementwise part.

    It may be used after a fork and by several Python threads, one after the other.

    Args:
        extra_flags: for the compiler; tests use them to get the code of other machines.

    Raises:
        UserError: this machine cannot compile it; see `why_not`.
    """

    def __init__(self, extra_flags: tuple[str, ...] = ()):
        self._library = cpu_build.load(SOURCES, extra_flags)
        self._busy = threading.Lock()
        self._room = _huge_pages(1)

    def losses(
        self, x_ND: torch.Tensor, weight_VD: torch.Tensor, targets_N: torch.Tensor, vocab_size: int
    ) -> torch.Tensor:
        cast_VD = weight_VD[:vocab_size].to(x_ND.dtype)
        targets_N = _checked(targets_N, vocab_size)
        losses_N = torch.empty(len(x_ND))
        with self._busy:
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
        cast_VD = weight_VD[:vocab_size].to(x_ND.dtype)
        targets_N, scale_N = _checked(targets_N, vocab_size), scale_N.contiguous()
        losses_N, grad_x_ND = torch.empty(len(x_ND)), torch.empty_like(x_ND)
        grad_weight_VD = torch.empty_like(weight_VD, dtype=torch.float32)
        grad_weight_VD[vocab_size if len(x_ND) else 0 :] = 0
        own_VD = grad_weight_VD[:vocab_size]
        of_chunk_VD = torch.empty_like(cast_VD) if x_ND.dtype != torch.float32 else None
        with self._busy:
            for part, z_CV in self._chunks(x_ND, vocab_size):
                first = part.start == 0
                torch.mm(x_ND[part], cast_VD.T, out=z_CV)
                self._rows(z_CV, targets_N[part], scale_N[part], losses_N[part])  # z_CV is its own gradient from here
                torch.mm(z_CV, cast_VD, out=grad_x_ND[part])
                if of_chunk_VD is None:
                    torch.addmm(own_VD, z_CV.T, x_ND[part], beta=0 if first else 1, out=own_VD)
                else:
                    torch.mm(z_CV.T, x_ND[part], out=of_chunk_VD)
                    arguments = (address(own_VD), address(of_chunk_VD), c_int64(own_VD.numel()), first)
                    self._library.cpu_loss_accumulate(crew_of(self._library, "cpu_loss_crew"), *arguments)
        return losses_N, grad_x_ND, grad_weight_VD

    def _chunks(self, x_ND: torch.Tensor, vocab_size: int) -> Iterator[tuple[slice, torch.Tensor]]:
        """Parts of the tokens, and room (C, V) for their logits, the same for all: fresh memory costs page faults."""
        chunk = max(1, CHUNK_BYTES // (vocab_size * x_ND.element_size()))
        size = min(chunk, len(x_ND)) * vocab_size
        if len(self._room) < size * x_ND.element_size():
            self._room = _huge_pages(size * x_ND.element_size())
        for start in range(0, len(x_ND), chunk):
            part = slice(start, min(start + chunk, len(x_ND)))
            rows = part.stop - part.start
            yield part, torch.frombuffer(self._room, dtype=x_ND.dtype, count=rows * vocab_size).view(rows, vocab_size)

    def _rows(
        self, z_CV: torch.Tensor, targets_C: torch.Tensor, scale_C: torch.Tensor | None, losses_C: torch.Tensor
    ) -> None:
        """Fill in the losses of raw logits; with a scale, the logits become the gradient of Σ scale·loss."""
        rows, vocab = z_CV.shape
        scratch = None if scale_C is None else torch.empty(torch.get_num_threads(), -(-vocab // _LANES) * _LANES)
        pointers = map(address, (targets_C, scale_C, losses_C, scratch))
        sizes = c_int64(rows), c_int64(vocab)
        self._library.cpu_loss_rows(
            crew_of(self._library, "cpu_loss_crew"), z_CV.dtype == torch.bfloat16, address(z_CV), *sizes, *pointers
        )


def _checked(targets_N: torch.Tensor, vocab_size: int) -> torch.Tensor:
    """The targets as the compiled code reads them, which does not look whether they exist."""
    if len(targets_N) and (targets_N.min() < IGNORED or targets_N.max() >= vocab_size):
        raise ValueError(f"targets must lie in {IGNORED} … {vocab_size - 1}")
    return targets_N.to(torch.int64).contiguous()


def _huge_pages(size: int) -> mmap.mmap:
    """Memory on huge pages where there are any. With them the loss takes 2 to 5 % less time."""
    memory = mmap.mmap(-1, size)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with suppress(OSError):  # a kernel without them
            memory.madvise(mmap.MADV_HUGEPAGE)
    return memory
