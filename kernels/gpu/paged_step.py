"""The step of many sequences on a GPU: attention over blocks where they lie, and decoding replayed as CUDA graphs.

    print(activate_flash(device)); reason = why_not(device, dtype)  # FA3 or FA4 must be there
    model.use_operations(GpuOperations())                           # of ours, where Triton is
    step = PagedStep(model, capture=CudaGraphs(device))             # a StepModel
    step.allocate([64, 64]); logits_RV = step.forward(batch)

Not run on a GPU; tests run all but the graph itself on a CPU, with `varlen_attn` as documented. Reason: `TorchStep`
copies every key it attends to and pads sequences to the longest; and a step of one token per sequence launches more
than a dozen kernels a layer, which are likely shorter than their launches. A graph launches all of them at once.
"""

from collections.abc import Callable, Sequence

import numpy as np
import torch

from kernels.gpu.flash import why_no_pages
from kernels.gpu.paged_attention import paged_attention
from nanochat_ray.model.attention import flash_reason
from nanochat_ray.model.gpt import GPT
from nanochat_ray.model.ragged import BLOCK, RaggedBatch
from nanochat_ray.model.torch_step import TorchStep

LARGEST_GRAPH = 64  # sequences; with more, kernels are long enough to hide their launches

Work = Callable[[], torch.Tensor]


def why_not(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why this device cannot decode with `PagedStep`, in words; None if it can."""
    runs, reason = flash_reason(device, dtype)
    return why_no_pages() if runs else reason


class CudaGraphs:
    """Captures work on a GPU as CUDA graphs that share their memory, since they never run at once."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._pool = torch.cuda.graph_pool_handle()

    def __call__(self, work: Work) -> Work:
        """Work that has been captured: reads the tensors it read then, and gives the same tensor every time."""
        with torch.cuda.device(self._device):
            side = torch.cuda.Stream()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                work()  # what happens once (cuBLAS's workspace, compiling and loading of kernels) must not be captured
            torch.cuda.current_stream().wait_stream(side)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=self._pool):
                result = work()

        def replay() -> torch.Tensor:
            graph.replay()
            return result

        return replay


class PagedStep(TorchStep):
    """A network and the blocks of its sequences.

    Args:
        context: positions a sequence may have; None: as many as in training.
        capture: makes a graph of work; None: nothing is captured.
    """

    def __init__(self, model: GPT, context: int | None = None, capture: Callable[[Work], Work] | None = None) -> None:
        super().__init__(model, context)
        self._capture = capture
        # A graph keeps no tensor alive, and the model may replace its tables by longer ones at any time.
        self._rotary = model.rotary(self.context, model.device, model.dtype)
        self._graphs: dict[int, tuple[list[np.ndarray], torch.Tensor, Work]] = {}  # by number of sequences
        self._spare: tuple[int, ...] = ()  # per group the block that rows of padding write to and read

    def allocate(self, blocks: Sequence[int]) -> None:
        """Make room for so many blocks per group; whatever was stored is lost."""
        self._graphs.clear()  # they point to the former blocks
        super().allocate([count + 1 for count in blocks])
        self._spare = tuple(blocks)

    @torch.inference_mode()
    def forward(self, batch: RaggedBatch) -> np.ndarray:
        """Soft-capped logits (R, vocab_size) in float32 after the wanted tokens."""
        count = len(batch.ids)
        arrays = self._arrays(batch)
        every_one = len(batch.starts) == count + 1 == len(batch.wanted) + 1
        if self._capture is not None and every_one and count <= LARGEST_GRAPH:
            return self._replay(arrays, count)
        longest_new = int(np.diff(batch.starts).max())
        return self._logits(self._tensors(arrays), longest_new, int(batch.positions.max()) + 1).cpu().numpy()

    def _replay(self, arrays: list[np.ndarray], count: int) -> np.ndarray:
        """One token for each of `count` sequences, as a graph for the next power of two of them."""
        rows = 1 << (count - 1).bit_length()
        if rows not in self._graphs:
            padding = self._padding(rows)
            static = torch.from_numpy(_flat(padding)).to(self.model.device)
            inputs = _views(static, padding)
            assert self._capture is not None
            replay = self._capture(lambda: self._logits(inputs, 1, self.context))
            self._graphs[rows] = padding, static, replay
        padding, static, replay = self._graphs[rows]
        static.copy_(torch.from_numpy(_flat([_over(array, pad) for array, pad in zip(arrays, padding, strict=True)])))
        return replay()[:count].to("cpu", copy=True).numpy()  # the next replay writes there again

    def _padding(self, rows: int) -> list[np.ndarray]:
        """Inputs of `rows` sequences at position 0, in the spare blocks."""
        width = -(-self.context // BLOCK)
        zeros, ones = np.zeros(rows, np.int32), np.ones(rows, np.int32)
        counting = np.arange(rows + 1, dtype=np.int32)
        tables = [np.full((rows, width), spare, np.int32) for spare in self._spare]
        slots = [np.full(rows, spare * BLOCK, np.int32) for spare in self._spare]
        return [zeros, -ones, zeros, counting, ones, counting[:-1], *tables, *slots]

    def _arrays(self, batch: RaggedBatch) -> list[np.ndarray]:
        """What `_logits` takes, int32: ids, previous, positions, starts, lengths, wanted, tables, slots of new keys."""
        lengths = batch.positions[batch.starts[1:] - 1] + 1
        sequence_N = np.repeat(np.arange(len(batch.starts) - 1), np.diff(batch.starts))
        slots = [
            table[sequence_N, batch.positions // BLOCK] * BLOCK + batch.positions % BLOCK for table in batch.tables
        ]
        width = -(-int(lengths.max()) // BLOCK)
        tables = [
            np.where(table[:, :width] < 0, spare, table[:, :width])  # absent, because no window reaches it any more
            for table, spare in zip(batch.tables, self._spare, strict=True)
        ]
        parts = (batch.ids, batch.previous, batch.positions, batch.starts, lengths, batch.wanted, *tables, *slots)
        return [np.asarray(part, np.int32) for part in parts]

    def _tensors(self, arrays: list[np.ndarray]) -> list[torch.Tensor]:
        return _views(torch.from_numpy(_flat(arrays)).to(self.model.device), arrays)

    def _logits(self, inputs: list[torch.Tensor], max_queries: int, max_keys: int) -> torch.Tensor:
        ids, previous, positions, starts, lengths, wanted = inputs[:6]
        tables, slots = inputs[6 : 6 + len(self.groups)], inputs[6 + len(self.groups) :]

        def attend(
            layer: int, q_BTHK: torch.Tensor, k_BTGK: torch.Tensor, v_BTGK: torch.Tensor, window: int
        ) -> torch.Tensor:
            group, index = self._place[layer]
            keys, values = self._keys[group][index], self._values[group][index]
            keys[slots[group]], values[slots[group]] = k_BTGK[0], v_BTGK[0]
            y_NHK = paged_attention(
                q_BTHK[0], keys, values, starts, lengths, tables[group], max_queries, max_keys, self.context, window
            )
            return y_NHK.unsqueeze(0)

        x_ND = self.model.hidden_ragged(ids, previous, positions, self._rotary, attend)
        return self.model.logits(x_ND[wanted])


def _flat(arrays: list[np.ndarray]) -> np.ndarray:
    """All in one, so that one copy brings a step's inputs to the GPU."""
    return np.concatenate([array.ravel() for array in arrays])


def _views(flat: torch.Tensor, arrays: list[np.ndarray]) -> list[torch.Tensor]:
    parts = flat.split([array.size for array in arrays])
    return [part.view(array.shape) for part, array in zip(parts, arrays, strict=True)]


def _over(array: np.ndarray, padding: np.ndarray) -> np.ndarray:
    """The padding, and the array in its first corner."""
    whole = padding.copy()
    whole[tuple(slice(size) for size in array.shape)] = array
    return whole
