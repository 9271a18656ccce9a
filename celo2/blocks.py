"""How matrices are cut into tiles, for the interpreter and for each kind of GPU."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import torch

# columns of a tile: of matrices that are wide enough, and of heads
WIDEST, NARROWEST = 128, 64
VECTOR_BLOCK = 256
CONTROL_BLOCK = 1024


@dataclass(frozen=True)
class Blocks:
    """Sizes of a program's work: a tile of `rows` x `columns`, of which a kernel takes `step_rows` at a time.

    Vectors are cut in chunks of `columns`, so `rows` divides it.
    """

    rows: int = 64
    columns: int = WIDEST
    step_rows: int = 4
    apply_rows: int = 8
    parts: int = 16
    """Partial sums of rows or columns that are read at once."""
    sums: int = 1024
    """Partial sums of a matrix that are read at once."""
    warps: int = 4
    """Of the kernels that go over elements."""

    def __post_init__(self) -> None:
        assert self.columns % self.rows == 0 and self.rows % self.step_rows == 0, self

    @classmethod
    def choose(cls, columns: int, device: torch.device) -> Blocks:
        """Blocks for a matrix of that many columns."""
        if device.type == "cpu":
            # the interpreter's time is in calls, not in elements
            width = min(512, max(NARROWEST, 1 << (columns.bit_length() - 1)))
            return cls(rows=width, columns=width, step_rows=width, apply_rows=width)
        # 512 elements a step: four a thread
        width = WIDEST if columns >= WIDEST else NARROWEST
        return replace(cls(columns=width, step_rows=512 // width), **MEASURED.get((_target(device), width), {}))


# what the sweep of `make gpu-check` found to be faster than the defaults: target and columns to sizes
MEASURED: dict[tuple[str, int], dict[str, Any]] = {}


@cache
def _target(device: torch.device) -> str:
    """Name a GPU's instruction set: "sm_90", "gfx942"."""
    properties = torch.cuda.get_device_properties(device)
    return properties.gcnArchName.split(":")[0] if torch.version.hip else f"sm_{properties.major}{properties.minor}"
