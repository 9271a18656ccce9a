"""Triton kernels, imported as `celo2.kernels`; this version has none: `celo2.phases` runs the rule in PyTorch."""
