"""Checkpoints off the critical path: the loop waits for a copy in memory, a thread does the rest.

The thread writes, hashes, commits and prunes at the lowest priority, and tries again for minutes when the storage
fails, while training goes on. Only the loop's own thread learns of it, when it asks; so events have one writer.
Host memory holds one more copy of all that is saved.
"""

import os
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass

import torch

from nanochat_ray.cli import warn
from nanochat_ray.errors import UserError
from nanochat_ray.storage import RETRY_FOR_S, retrying
from nanochat_ray.train.checkpoint import Checkpoints, Tensors, TrainState
from nanochat_ray.train.lease import Fence

LOWEST_PRIORITY = 19


@dataclass(frozen=True)
class Saved:
    """A checkpoint that is committed.

    Attributes:
        stall_s: how long the loop stood still for it.
        seconds: from the loop's decision to the commit.
    """

    step: int
    bytes: int
    stall_s: float
    seconds: float


class Saver:
    """Writes the checkpoints of worker 0, one at a time.

    Args:
        keep: newest checkpoints that stay; the best one does, too.
        committed_step: the newest checkpoint that is there already; 0: none.
        after: what else to do in the thread when a checkpoint is committed, in time for the next one.
        fence: of the lease under which the stage is written.
    """

    def __init__(
        self,
        checkpoints: Checkpoints,
        keep: int,
        committed_step: int,
        after: Callable[[], object],
        fence: Fence | None = None,
        warn: Callable[[str], None] = warn,
        retry_for_s: float = RETRY_FOR_S,
        sleep: Callable[[float], object] = time.sleep,
    ):
        self._checkpoints, self._keep, self._fence = checkpoints, keep, fence
        self._committed_step, self._after = committed_step, after
        self._warn, self._retry_for_s, self._sleep = warn, retry_for_s, sleep
        self._buffers: dict[str, torch.Tensor] = {}
        self._finished: list[Saved] = []
        self._error: BaseException | None = None
        self._thread: threading.Thread | None = None

    @property
    def busy(self) -> bool:
        """Whether a checkpoint is being written; to save now would mean to wait for it."""
        return self._thread is not None and self._thread.is_alive()

    def save(self, state: TrainState, model: Tensors, optimizer: Tensors, began: float) -> None:
        """Copy the tensors and let the thread write them; waits for the checkpoint before, if it is on its way.

        Args:
            model: on its device.
            optimizer: on the CPU; the live state if the model is there, too, otherwise nobody else's.
            began: when the loop began to save, on `time.monotonic`.

        Raises:
            UserError: the checkpoint before could not be written.
        """
        self.wait()
        # What was not needed before is kept for the next time: fresh memory costs more than the copy.
        on_host = self._copies(model, "model"), self._copies(optimizer, "optimizer", all_of_it=_is_on_cpu(model))
        if any(tensor.is_cuda for tensor in model.values()):
            torch.cuda.current_stream().synchronize()
        stall_s = time.monotonic() - began
        self._thread = threading.Thread(
            target=self._run, args=(state, *on_host, began, stall_s), name="saver", daemon=True
        )
        self._thread.start()
        _set_priority(self._thread, LOWEST_PRIORITY)  # hashing must not take a core from a step

    def finished(self) -> list[Saved]:
        """What was committed since the last call.

        Raises:
            UserError: a checkpoint could not be written for `retry_for_s`, or another attempt owns the stage.
        """
        if self._error is not None:
            raise self._error
        done = self._finished[:]
        del self._finished[: len(done)]  # the thread may have added one in between
        return done

    def wait(self) -> None:
        """Return when all that was given to `save` is committed.

        Raises:
            UserError: as `finished`.
        """
        if self._thread is not None:
            _set_priority(self._thread, os.getpriority(os.PRIO_PROCESS, 0))  # now training waits for it
            self._thread.join()
        if self._error is not None:
            raise self._error

    def _copies(self, tensors: Tensors, kind: str, all_of_it: bool = True) -> Tensors:
        return {
            name: self._copy(f"{kind} {name}", tensor) if all_of_it or tensor.is_cuda else tensor
            for name, tensor in tensors.items()
        }

    def _copy(self, key: str, tensor: torch.Tensor) -> torch.Tensor:
        tensor = tensor.detach()
        buffer = self._buffers.get(key)
        if buffer is None or buffer.shape != tensor.shape or buffer.dtype != tensor.dtype:
            # Pinned memory is copied to at the bus's speed, and while the next copies are being queued.
            buffer = self._buffers[key] = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
        return buffer.copy_(tensor, non_blocking=tensor.is_cuda)  # `save` waits for CUDA's only

    def _run(self, state: TrainState, model: Tensors, optimizer: Tensors, began: float, stall_s: float) -> None:
        try:
            size = self._write(state, model, optimizer)
            self._committed_step = state.cursor.step
            self._finished.append(Saved(state.cursor.step, size, stall_s, time.monotonic() - began))
            self._prune(state)
            self._after()
        except BaseException as error:  # whatever it is, the loop raises it
            self._error = error

    def _write(self, state: TrainState, model: Tensors, optimizer: Tensors) -> int:
        try:
            return retrying(
                lambda: self._checkpoints.save(state, model, optimizer, self._fence),
                self._checkpoints.folder,
                self._warn,
                self._retry_for_s,
                sleep=self._sleep,
            )
        except UserError as error:
            last = f"that of step {self._committed_step}" if self._committed_step else "none yet"
            raise UserError(
                f"step {state.cursor.step} was not saved: {error}; the last checkpoint is {last}"
            ) from error

    def _prune(self, state: TrainState) -> None:
        try:
            self._checkpoints.prune(self._keep, state.best_step)
        except OSError as error:
            self._warn(f"old ones in {self._checkpoints.folder} were not deleted ({error}); the next save tries again")


def _is_on_cpu(tensors: Tensors) -> bool:
    return all(tensor.device.type == "cpu" for tensor in tensors.values())


def _set_priority(thread: threading.Thread, priority: int) -> None:
    """Where threads have a priority of their own; only the superuser may raise it again."""
    if sys.platform == "linux" and thread.native_id is not None:
        with suppress(ProcessLookupError, PermissionError):
            os.setpriority(os.PRIO_PROCESS, thread.native_id, priority)
