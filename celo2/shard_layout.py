"""Which slices of a parameter's matrices each rank has.

`fully_shard` (FSDP2) cuts a parameter along one axis into contiguous, possibly uneven or empty chunks; tensor
parallelism cuts another axis, or the same one before it. What a rank has is a box of the parameter, and holds slices of
matrices, whether or not the view's matrices align with it. All of it is arithmetic on shapes and ranks, the same on
every rank, so the collectives of a step need no negotiation.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from celo2.matrices import MatrixView


class Cut(NamedTuple):
    """A cut of `axis` of a tensor into `parts`, as `torch.chunk` cuts: rank r has part r // stride % parts."""

    axis: int
    parts: int
    stride: int = 1

    def part(self, rank: int) -> int:
        return rank // self.stride % self.parts


def chunk(length: int, ranks: int, rank: int) -> tuple[int, int]:
    """Return [start, stop) of a rank's part of an axis, as `torch.chunk` cuts it: the last may be short or empty."""
    size = -(-length // ranks)
    return min(length, rank * size), min(length, (rank + 1) * size)


def box(shape: Sequence[int], cuts: Sequence[Cut], rank: int) -> list[tuple[int, int]]:
    """Return [start, stop) of every axis that a rank has of a tensor."""
    ranges = [(0, length) for length in shape]
    for cut in cuts:
        first, last = ranges[cut.axis]
        start, stop = chunk(last - first, cut.parts, cut.part(rank))
        ranges[cut.axis] = first + start, first + stop
    return ranges


def home(cuts: Sequence[Cut], rank: int) -> int:
    """Return the first of the ranks that have the same part of a parameter as `rank`, which counts for them all."""
    return sum(cut.part(rank) * cut.stride for cut in cuts)


@dataclass(frozen=True)
class Slice:
    """Part of `count` consecutive matrices from `matrix` on: rows [row, row + rows) and columns of each."""

    matrix: int
    count: int
    row: int
    rows: int
    column: int
    columns: int

    @property
    def numel(self) -> int:
        return self.count * self.rows * self.columns


@dataclass(frozen=True)
class ShardLayout:
    """The matrices [B, m, n] of a parameter of `shape` under a view, sharded by `cuts`.

    A rank may have some of the rows of a matrix, some of the columns, both, or whole ones (leading axes are sharded, or
    all cuts fall between heads).
    The factor over an axis is whole on every rank where the other axis is cut; else it is sharded as the parameter is.
    """

    shape: torch.Size
    view: MatrixView
    cuts: tuple[Cut, ...]
    matrices: tuple[int, int, int]
    cuts_rows: bool
    cuts_columns: bool

    @classmethod
    def of(cls, shape: torch.Size, view: MatrixView, cuts: Sequence[Cut], name: str = "parameter") -> ShardLayout:
        """Raises ValueError for a flattened parameter sharded along a flattened axis, and for a batch cut twice."""
        axes, batches = {cut.axis for cut in cuts}, view.batches(len(shape))
        rows, columns = (len(shape) - 2, len(shape) - 1) if batches else (0, 1)
        if batches and view.blocks > 1 and axes & {rows, columns}:
            raise ValueError(
                f"{name} of shape {tuple(shape)}, a batch of matrices cut into {view.blocks} blocks, is sharded "
                f"along axis {max(axes)}: shard a leading axis"
            )
        if len(shape) > 2 and not batches and max(axes) > 0:
            raise ValueError(
                f"{name} of shape {tuple(shape)}, flattened to one matrix, is sharded along axis {max(axes)}: shard "
                "axis 0, or give flatten=False for a matrix for each of the leading axes"
            )
        matrices = view.shape(shape)
        cuts_rows = rows in axes
        if cuts_rows and len(shape) == 2 and view.blocks > 1 and view.axis == 0 and axes == {0}:
            # heads that ranks have whole
            cuts_rows = not _cuts_between(shape, cuts, matrices[1])
        return cls(shape, view, tuple(cuts), matrices, cuts_rows, columns in axes)

    @property
    def whole(self) -> bool:
        """Whether ranks have whole matrices."""
        return not (self.cuts_rows or self.cuts_columns)

    @property
    def whole_factors(self) -> tuple[bool, bool]:
        """Whether the factors of all rows, and of all columns, are on every rank."""
        return self.cuts_columns, self.cuts_rows

    @property
    def shares_vectors(self) -> tuple[bool, bool]:
        """Whether no rank has the factors of all rows of a matrix, or of all columns."""
        return self.cuts_rows and not self.cuts_columns, self.cuts_columns and not self.cuts_rows

    def slices(self, rank: int) -> list[Slice]:
        """Return what a rank has, in the order of its memory's matrices; nothing for an empty shard."""
        batch, m, n = self.matrices
        ranges = box(self.shape, self.cuts, rank)
        if not batch * m * n or any(start == stop for start, stop in ranges):
            return []
        if self.view.batches(len(self.shape)):
            return self._batched_slices(ranges)
        (row, rows), (column, columns) = ((start, stop - start) for start, stop in (ranges[0], ranges[1]))
        if len(self.shape) > 2:
            column, columns = 0, n
        if self.view.blocks == 1:
            return [Slice(0, 1, row, rows, column, columns)]
        # along the axis of a view that cuts, matrices follow each other
        if self.view.axis == 0:
            found = _along(row, row + rows, m)
            return [Slice(matrix, count, start, size, column, columns) for matrix, count, start, size in found]
        found = _along(column, column + columns, n)
        return [Slice(matrix, count, row, rows, start, size) for matrix, count, start, size in found]

    def _batched_slices(self, ranges: Sequence[tuple[int, int]]) -> list[Slice]:
        """One slice for each stretch of matrices that follow each other."""
        (row, rows), (column, columns) = ranges[-2:]
        if self.view.blocks > 1:
            rows = self.matrices[1]
        lead = self.shape[:-2]
        last = max((axis for axis, ends in enumerate(ranges[:-2]) if ends != (0, lead[axis])), default=0)
        inner = lead[last + 1 :].numel() * self.view.blocks
        start, stop = ranges[last]
        slices = []
        for outer in itertools.product(*(range(*ends) for ends in ranges[:last])):
            number = 0
            for index, length in zip(outer, lead[:last], strict=True):
                number = number * length + index
            first = (number * lead[last] + start) * inner
            slices.append(Slice(first, (stop - start) * inner, row, rows - row, column, columns - column))
        return slices

    def views(self, shard: Tensor, rank: int) -> list[Tensor]:
        """Return [count, rows, columns] views of a rank's shard of the parameter, one for each piece."""
        slices = self.slices(rank)
        if not slices:
            return []
        if self.view.batches(len(self.shape)):
            # one batch over the leading axes; with several stretches, each is a run of it
            return list(torch.split(self.view.matrices(shard), [piece.count for piece in slices]))
        flat = shard.view(shard.shape[0], -1)
        if self.view.blocks == 1:
            return [flat.unsqueeze(0)]
        if self.view.axis == 0:
            parts = torch.split(flat, [piece.count * piece.rows for piece in slices])
            return [part.view(piece.count, piece.rows, -1) for part, piece in zip(parts, slices, strict=True)]
        parts = torch.split(flat, [piece.count * piece.columns for piece in slices], dim=1)
        return [
            part.view(-1, piece.count, piece.columns).transpose(0, 1) for part, piece in zip(parts, slices, strict=True)
        ]

    def factor_views(self, rows: Tensor, columns: Tensor, rank: int) -> tuple[list[Tensor], list[Tensor]]:
        """Return [count, length, last] views of a rank's row and column factors, one for each piece.

        The last axis is 3 for the factors themselves; the scales of 8-bit momenta have rows as well.
        """
        slices = self.slices(rank)
        parts = (
            [(piece.row, piece.rows) for piece in slices],
            [(piece.column, piece.columns) for piece in slices],
        )
        found = []
        for factor, ends, whole in zip((rows, columns), parts, self.whole_factors, strict=True):
            if whole:
                by_matrix = MatrixView.factors(factor, self.matrices[0])
                found.append(
                    [
                        by_matrix[piece.matrix : piece.matrix + piece.count, start : start + length]
                        for piece, (start, length) in zip(slices, ends, strict=True)
                    ]
                )
            else:
                found.append(_split(factor, slices, [length for _, length in ends]))
        return found[0], found[1]

    def factor_axes(self, axis: int) -> tuple[int | None, int | None]:
        """Return the axes of the row and column factor (`MatrixView.factor_shapes`) that are cut as `axis` is."""
        whole_rows, whole_columns = self.whole_factors
        if len(self.shape) == 2 and self.whole:
            # the blocks of the column factor, one for each matrix
            return 0, 0
        if self.view.batches(len(self.shape)):
            rows, columns = (axis, axis) if axis < len(self.shape) - 2 else (len(self.shape) - 2,) * 2
        else:
            rows = 1 if self.view.blocks > 1 and self.view.axis == 1 else 0
            columns = 1 if self.view.blocks > 1 and self.view.axis == 0 else 0
        return None if whole_rows else rows, None if whole_columns else columns


def _cuts_between(shape: Sequence[int], cuts: Sequence[Cut], length: int) -> bool:
    """Whether cuts of the first axis fall between the matrices of `length` rows that follow each other there."""
    if len(cuts) == 1:
        return chunk(shape[0], cuts[0].parts, 0)[1] % length == 0
    ranks = max(cut.parts * cut.stride for cut in cuts)
    return not any(end % length for rank in range(ranks) for end in box(shape, cuts, rank)[0])


def _along(start: int, stop: int, length: int) -> list[tuple[int, int, int, int]]:
    """Cut [start, stop) of an axis on which matrices of `length` follow each other.

    Returns for each run of matrices of which the same is there: the first, how many, and the part's start and size.
    """
    runs, position = [], start
    while position < stop:
        matrix, offset = divmod(position, length)
        count = (stop - position) // length if offset == 0 else 0
        size, count = (length, count) if count else (min(stop - position, length - offset), 1)
        runs.append((matrix, count, offset, size))
        position += size * count
    return runs


def _split(factor: Tensor, slices: Sequence[Slice], lengths: Sequence[int]) -> list[Tensor]:
    """View a factor that is sharded as its parameter is: pieces lie one after another."""
    if not slices:
        return []
    last = factor.shape[-1]
    flat = factor.view(-1, last)
    parts = torch.split(flat, [piece.count * length for piece, length in zip(slices, lengths, strict=True)])
    return [part.view(piece.count, -1, last) for part, piece in zip(parts, slices, strict=True)]
