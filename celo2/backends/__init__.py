"""Backends of `celo2.step`: the phases in PyTorch, and through the Triton kernels."""
