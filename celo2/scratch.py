"""Scratch memory that several plans of the kernels share.

One plan steps at a time, in the order of its device's stream, and nothing in here outlives a step.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor


class Scratch:
    """Buffers of a device by name, as large as the largest plan has asked for.

    A plan that needs more gets a new buffer. The old one lives as long as a plan that has its address in a table.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._buffers: dict[tuple[str, torch.dtype], Tensor] = {}

    def take(self, name: str, *shape: int, dtype: torch.dtype = torch.float32, most: int = 0) -> Tensor:
        """Return a contiguous tensor of any contents; other plans that take this name write to the same memory.

        `most` is how many elements a later plan may ask for.
        """
        size = torch.Size(shape).numel()
        buffer = self._buffers.get((name, dtype))
        if buffer is None or buffer.numel() < size:
            buffer = torch.empty(max(size, most), dtype=dtype, device=self.device)
            self._buffers[name, dtype] = buffer
        return buffer[:size].view(shape)

    def take_all(
        self, name: str, sizes: Sequence[tuple[int, torch.dtype]], most: Mapping[torch.dtype, int]
    ) -> list[Tensor]:
        """Return a tensor for each size and dtype, those of a dtype side by side; `most` as for `take`."""
        lengths: dict[torch.dtype, int] = {}
        starts = []
        for size, dtype in sizes:
            starts.append(lengths.get(dtype, 0))
            # at multiples of at least 128 bytes
            lengths[dtype] = starts[-1] + padded(size)
        whole = {dtype: self.take(name, size, dtype=dtype, most=most.get(dtype, 0)) for dtype, size in lengths.items()}
        return [whole[dtype][start : start + size] for start, (size, dtype) in zip(starts, sizes, strict=True)]


def padded(size: int) -> int:
    """Round up to a multiple of 64 elements."""
    return -(-size // 64) * 64
