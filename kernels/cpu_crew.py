"""The threads that a kernel's compiled code runs on, and addresses of tensors for it."""

import ctypes
import functools
import os
from ctypes import c_void_p

import torch


def crew_of(library: ctypes.CDLL, constructor: str) -> c_void_p:
    """torch.get_num_threads() threads of this process, made by a function of the library at first use.

    They sleep between calls until the process ends. Threads do not survive a fork: a child gets its own.
    """
    return _crew_of(library, constructor, os.getpid(), torch.get_num_threads())


@functools.cache
def _crew_of(library: ctypes.CDLL, constructor: str, process: int, threads: int) -> c_void_p:
    make = getattr(library, constructor)
    make.restype = c_void_p
    return c_void_p(make(threads))


def address(tensor: torch.Tensor | None) -> c_void_p:
    """Of the tensor's first element; the null pointer for none."""
    return c_void_p(None if tensor is None else tensor.data_ptr())
