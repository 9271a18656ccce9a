"""Newton-Schulz on the matrices that a rank owns, through the kernels."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from celo2.backends.parts import upload
from celo2.batched_newton_schulz import (
    orthogonalize_,
    orthogonalize_small_,
    rehearse_products,
    takes_one_program,
)
from celo2.compilation import launch
from celo2.kernels import sharing
from celo2.newton_schulz import EPS
from celo2.plan import Plan, padded
from celo2.scratch import Scratch


class Owner:
    """Newton-Schulz on the matrices that this rank owns: from the message that brings them into one that returns them.

    Directions are orthogonalised in `ns_dtype`, as without sharding.
    """

    def __init__(self, plan: Plan, ns_dtype: torch.dtype, scratch: Scratch) -> None:
        device = scratch.device
        self.blocks = (512, 512) if device.type == "cpu" else (16, 128)
        places: dict[tuple[int, int], tuple[int, int, int, int]] = {}  # number, first element, rows, columns
        groups: list[tuple[int, int, int, int, int, int]] = []
        number = element = 0
        for (m, n, ns_steps), matrices in plan.owned.items():
            groups.append((element, number, len(matrices), m, n, ns_steps))
            for key in matrices:
                places[key] = number, element, m, n
                number, element = number + 1, element + m * n
            element = padded(element)
        self.matrices = scratch.take("owned", element, dtype=ns_dtype)
        self.squares = torch.empty(number, dtype=torch.float32, device=device)
        self.groups = [
            (
                self.matrices[start : start + count * m * n].view(count, m, n),
                self.squares[first : first + count],
                ns_steps,
            )
            for start, first, count, m, n, ns_steps in groups
        ]
        parts = np.zeros((len(plan.receives), sharing.PART_COLUMNS.value), dtype=np.int64)
        tiles = []
        for index, transfer in enumerate(plan.receives):
            number, element, m, n = places[transfer.entry, transfer.matrix]
            piece = transfer.piece
            target = element + piece.row * n + piece.column
            parts[index] = transfer.offset, target, piece.rows, piece.columns, n, number, m * n
            tiles += [
                (index, row, column)
                for row in range(0, piece.rows, self.blocks[0])
                for column in range(0, piece.columns, self.blocks[1])
            ]
        self.aligned = not (parts[:, [0, 1, 3, 4]] % 16).any()
        self.tiles = len(tiles)
        self.parts = upload(parts, device)
        self.tile_list = upload(np.array(tiles, dtype=np.int32).reshape(-1, 3), device)

    def _move(self, message: Tensor, back: bool) -> None:
        launch(sharing.move_parts_kernel, (self.tiles,),
            self.parts, self.tile_list, message, self.matrices, self.squares, BACK=back, ALIGNED=self.aligned,
            BLOCK_ROWS=self.blocks[0], BLOCK_COLUMNS=self.blocks[1],
        )  # fmt: skip

    def rehearse(self, message: Tensor) -> None:
        for back in (False, True):
            self._move(message, back)
        for x, squares, ns_steps in self.groups:
            rehearse_products(x, ns_steps, squares)

    def orthogonalize(self, message: Tensor) -> None:
        """Replace the parts of directions in a message by those of updates, of an RMS of 1 over each matrix."""
        if not self.tiles:
            return
        self._move(message, back=False)
        for x, squares, ns_steps in self.groups:
            if takes_one_program(x, ns_steps):
                orthogonalize_small_(x, ns_steps, squares)
                continue
            # row by row: one float32 sum over all elements loses digits
            norm = torch.linalg.vector_norm(torch.linalg.vector_norm(x, dim=-1, dtype=torch.float32), dim=-1)
            orthogonalize_(x, norm.add_(EPS).reciprocal_(), ns_steps, squares)
        self._move(message, back=True)
