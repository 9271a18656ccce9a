"""Triton kernels of the rule, imported as `celo2.kernels`; `celo2.backends.triton` launches them."""
