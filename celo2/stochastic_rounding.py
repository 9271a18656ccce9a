"""Rounding of a wide value into a low-precision parameter, so that small updates are kept on average."""

from __future__ import annotations

import torch
from torch import Tensor

_MASK64 = (1 << 64) - 1


def mix64(x: int) -> int:
    """Finaliser of splitmix64 on one integer modulo 2**64 (Steele, Lea and Flood, OOPSLA 2014)."""
    x = (x + 0x9E3779B97F4A7C15) & _MASK64
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & _MASK64
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & _MASK64
    return x ^ (x >> 31)


def rounding_seed(position: int, step: int) -> int:
    """Seed for the parameter at `position` at `step`, below 2**32: a CPU generator takes no more bits."""
    return mix64(mix64(position) ^ step) >> 32


def round_stochastically_(target: Tensor, value: Tensor, seed: int) -> Tensor:
    """Write `value` into `target` in place; unbiased for a bfloat16 target, to nearest for every other dtype.

    `value` is float32 (float64 for a float64 target), of `target`'s shape. A bfloat16 is the upper half of a float32:
    16 random bits are added to the lower half, which is then cut off, so the expectation is `value` itself. The bits
    depend on `seed` and the element's position only. Non-finite values and carries out of the finite range keep their
    usual meaning (infinity stays infinity).
    """
    if target.dtype != torch.bfloat16:
        return target.copy_(value)
    generator = torch.Generator(device=value.device).manual_seed(seed)
    noise = torch.randint(0, 1 << 16, value.shape, dtype=torch.int32, device=value.device, generator=generator)
    bits = value.contiguous().view(torch.int32) + noise
    rounded = (bits & -65536).view(torch.float32)
    return target.copy_(torch.where(torch.isfinite(value), rounded, value))
