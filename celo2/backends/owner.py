"""Directions on their way between messages and matrices, and Newton-Schulz on the matrices that a rank owns."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from celo2.backends.parts import upload
from celo2.batched_newton_schulz import (
    orthogonalize_,
    orthogonalize_part_,
    orthogonalize_small_,
    rehearse_products,
    takes_one_program,
)
from celo2.comm import Comm
from celo2.compilation import launch
from celo2.exchanges import Owned, Transfer, padded
from celo2.kernels import sharing
from celo2.newton_schulz import EPS
from celo2.plan import Plan
from celo2.scratch import Scratch
from celo2.shard_layout import Slice


class Move(NamedTuple):
    """A part of a message that lies in a slice of its matrix as well, of which `start` is the first element."""

    transfer: Transfer
    start: int
    within: Slice
    number: int = 0
    """Of the matrix's sum of squares."""
    size: int = 1
    """Elements of the whole matrix."""


class Moves:
    """Parts of a message that one launch copies, from slices of matrices or into them.

    On the way into the message they may be scaled to an RMS of 1, by `squares`, float32, the matrices' sums of squares.
    """

    def __init__(self, moves: Sequence[Move], squares: Tensor) -> None:
        self.squares, device = squares, squares.device
        self.blocks = (512, 512) if device.type == "cpu" else (16, 128)
        parts = np.zeros((len(moves), sharing.PART_COLUMNS.value), dtype=np.int64)
        tiles = []
        for index, (transfer, start, within, number, size) in enumerate(moves):
            piece, stride = transfer.piece, within.columns
            target = start + (piece.row - within.row) * stride + piece.column - within.column
            parts[index] = transfer.offset, target, piece.rows, piece.columns, stride, number, size
            tiles += [
                (index, row, column)
                for row in range(0, piece.rows, self.blocks[0])
                for column in range(0, piece.columns, self.blocks[1])
            ]
        self.aligned = not (parts[:, [0, 1, 3, 4]] % 16).any()
        self.tiles = len(tiles)
        self.parts = upload(parts, device)
        self.tile_list = upload(np.array(tiles, dtype=np.int32).reshape(-1, 3), device)

    def launch(self, message: Tensor, matrices: Tensor, *, into_message: bool, scaled: bool = False) -> None:
        if not self.tiles:
            return
        launch(sharing.move_parts_kernel, (self.tiles,),
            self.parts, self.tile_list, message, matrices, self.squares, BACK=into_message, SCALED=scaled,
            ALIGNED=self.aligned, BLOCK_ROWS=self.blocks[0], BLOCK_COLUMNS=self.blocks[1],
        )  # fmt: skip


class Owner:
    """Newton-Schulz on the matrices that this rank owns: from the message that brings them into one that returns them.

    Directions are orthogonalised in `ns_dtype`, as without sharding.
    """

    def __init__(self, plan: Plan, ns_dtype: torch.dtype, scratch: Scratch) -> None:
        device, self.exact_products = scratch.device, plan.exact_products
        places: dict[tuple[int, int], tuple[int, int, Owned]] = {}  # number, first element
        groups: list[tuple[int, int, int, Owned]] = []
        number = element = 0
        for owned, matrices in plan.owned.items():
            groups.append((element, number, len(matrices), owned))
            for key in matrices:
                places[key] = number, element, owned
                number, element = number + 1, element + owned.block.numel
            element = padded(element)
        self.matrices = scratch.take("owned", element, dtype=ns_dtype)
        self.squares = torch.empty(number, dtype=torch.float32, device=device)
        self.groups = [
            (
                self.matrices[start : start + count * owned.block.numel].view(
                    count, owned.block.rows, owned.block.columns
                ),
                self.squares[first : first + count],
                owned,
            )
            for start, first, count, owned in groups
        ]
        moves = []
        for transfer in plan.receives:
            number, element, owned = places[transfer.entry, transfer.matrix]
            moves.append(Move(transfer, element, owned.block, number, owned.m * owned.n))
        self.moves = Moves(moves, self.squares)

    def rehearse(self, message: Tensor) -> None:
        for into_message in (False, True):
            self.moves.launch(message, self.matrices, into_message=into_message, scaled=into_message)
        for x, squares, owned in self.groups:
            rehearse_products(x, owned.ns_steps, squares, owned)

    def orthogonalize(self, message: Tensor, comm: Comm) -> None:
        """Replace the parts of directions in a message by those of updates, of an RMS of 1 over each matrix."""
        self.moves.launch(message, self.matrices, into_message=False)
        for x, squares, owned in self.groups:
            if owned.parts > 1:
                orthogonalize_part_(x, owned, squares, comm.all_reduce_shared, exact=self.exact_products)
            elif takes_one_program(x, owned.ns_steps):
                orthogonalize_small_(x, owned.ns_steps, squares)
            else:
                # row by row: one float32 sum over all elements loses digits
                norm = torch.linalg.vector_norm(torch.linalg.vector_norm(x, dim=-1, dtype=torch.float32), dim=-1)
                orthogonalize_(x, norm.add_(EPS).reciprocal_(), owned.ns_steps, squares)
        self.moves.launch(message, self.matrices, into_message=True, scaled=True)
