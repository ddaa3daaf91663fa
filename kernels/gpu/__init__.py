"""Kernels for NVIDIA GPUs. None was ever run on a GPU: figures are checked in Triton's interpreter, code is compiled.

Each file: its reason, the reference, the kernel, the custom operation (so that torch.compile and meta tensors see it as
one), the autograd wrapper. Kernels have one block size each, chosen so that nothing spills on sm_80, sm_90 and sm_100;
whoever has such a GPU finds here where tuning would start.
"""
