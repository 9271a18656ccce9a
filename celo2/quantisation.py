"""Momenta in 8 bits: signed multiples of a scale that 64 neighbouring columns of a row share.

The scale is the largest magnitude of the 64 over 127; a value rounds to one of its two neighbours at random, without
bias, so that the small increments of a slow momentum are kept on average. The kernels do the same in registers; this is
the form for a CPU, a whole parameter at a time.
"""

from __future__ import annotations

import torch
from torch import Tensor

QUANTUM = 64
LARGEST = 127.0


def quanta(columns: int) -> int:
    """Number of scales of a row."""
    return -(-columns // QUANTUM)


def _per_element(scale: Tensor, columns: int) -> Tensor:
    return scale.repeat_interleave(QUANTUM, dim=-1)[..., :columns]


def dequantise(levels: Tensor, scale: Tensor) -> Tensor:
    """Return float32 values of int8 `levels` [B, m, n] and their scales [B, m, quanta]."""
    return levels.float() * _per_element(scale, levels.shape[-1])


def quantise_(levels: Tensor, scale: Tensor, value: Tensor, seed: int) -> None:
    """Write float32 `value` [B, m, n] as int8 `levels` and their scales, by random bits of `seed` (below 2**32)."""
    columns = value.shape[-1]
    padded = torch.nn.functional.pad(value, (0, quanta(columns) * QUANTUM - columns))
    largest = padded.reshape(*value.shape[:-1], -1, QUANTUM).abs().amax(-1)
    scale.copy_(largest / LARGEST)
    inverse = torch.where(largest > 0, LARGEST / largest, 0.0)
    generator = torch.Generator(device=value.device).manual_seed(seed)
    noise = torch.rand(value.shape, dtype=torch.float32, device=value.device, generator=generator)
    level = (value * _per_element(inverse, columns) + noise).floor_()
    levels.copy_(level.clamp_(-LARGEST, LARGEST))
