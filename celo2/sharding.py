"""How a parameter is sharded, and which slices of its matrices that gives each rank.

A parameter sharded by `fully_shard` (FSDP2) is cut along one axis into contiguous, possibly uneven or empty chunks; a
chunk holds slices of matrices, whether or not the view's matrices align with it. Everything here is arithmetic on
shapes and ranks, the same on every rank, so the collectives of a step need no negotiation.
"""

from __future__ import annotations

import hashlib
import heapq
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor import zeros as dtensor_zeros
from torch.distributed.tensor.placement_types import Placement

from celo2.matrices import MatrixView


@dataclass(frozen=True)
class ShardSpec:
    """How the step of a parameter is divided: along `axis` of the tensor, over the `ranks` of `group`.

    With `zero1` every rank has the parameter and its gradient whole (DistributedDataParallel), and steps its rows.
    """

    axis: int
    group: dist.ProcessGroup
    ranks: int
    rank: int
    zero1: bool = False

    def rows_of(self, tensor: Tensor) -> Tensor:
        """View this rank's rows of a whole tensor of at least one axis."""
        start, stop = chunk(tensor.shape[0], self.ranks, self.rank)
        return tensor.detach()[start:stop]


def shard_spec_of(parameter: Tensor, name: str = "parameter") -> ShardSpec | None:
    """Return how a DTensor is sharded; None for a plain tensor, or one that every rank has whole.

    Raises ValueError for a tensor sharded on two axes (tensor parallelism), unevenly strided or partial, and for one
    offloaded from its mesh's devices to the CPU.
    """
    if not isinstance(parameter, DTensor):
        return None
    mesh, shards = parameter.device_mesh, []
    for mesh_axis, placement in enumerate(parameter.placements):
        if type(placement) is Shard:
            shards.append((mesh_axis, placement.dim % max(1, parameter.ndim)))
        elif not isinstance(placement, Replicate):
            raise ValueError(
                f"{name} of shape {tuple(parameter.shape)} has placements {parameter.placements}: only Shard on one "
                "mesh axis, with Replicate on the others, is supported (FSDP2, HSDP)"
            )
    if not shards:
        return None
    if len(shards) > 1:
        raise ValueError(
            f"{name} of shape {tuple(parameter.shape)} has placements {parameter.placements}: sharded on "
            f"{len(shards)} mesh axes (tensor parallelism, or fully_shard over a 2-D mesh of shards), which is not "
            "supported; shard on one axis and replicate on the others"
        )
    where = parameter.to_local().device.type
    if where not in (mesh.device_type, "meta"):
        raise ValueError(
            f"{name} of shape {tuple(parameter.shape)} is on the {where} and its mesh of {mesh.device_type} devices: "
            "parameters offloaded by FSDP2 (CPUOffloadPolicy) are not supported; leave the policy out, or halve the "
            "state with state_dtype='bfloat16'"
        )
    mesh_axis, axis = shards[0]
    group = mesh.get_group(mesh_axis)
    return ShardSpec(axis, group, mesh.size(mesh_axis), mesh.get_local_rank(mesh_axis))


def same_placements(parameter: Tensor, gradient: Tensor) -> bool:
    """Whether a gradient lies on the ranks as its parameter does."""
    if isinstance(parameter, DTensor) and isinstance(gradient, DTensor):
        return parameter.placements == gradient.placements
    return not isinstance(parameter, DTensor) and not isinstance(gradient, DTensor)


def chunk(length: int, ranks: int, rank: int) -> tuple[int, int]:
    """Return [start, stop) of a rank's part of an axis, as `torch.chunk` cuts it: the last may be short or empty."""
    size = -(-length // ranks)
    return min(length, rank * size), min(length, (rank + 1) * size)


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
    """The matrices [B, m, n] of a parameter of `shape` under a view, sharded along `axis`.

    `kind` says what a rank has of a matrix: `"rows"`, `"columns"`, or `"whole"` ones (a leading axis is sharded).
    """

    shape: torch.Size
    view: MatrixView
    axis: int
    matrices: tuple[int, int, int]
    kind: str

    @classmethod
    def of(cls, shape: torch.Size, view: MatrixView, axis: int, name: str = "parameter") -> ShardLayout:
        """Raises ValueError for a flattened parameter sharded along a flattened axis, and for a batch cut twice."""
        if view.batches(len(shape)):
            kind = "columns" if axis == len(shape) - 1 else "rows" if axis == len(shape) - 2 else "whole"
            if kind != "whole" and view.blocks > 1:
                raise ValueError(
                    f"{name} of shape {tuple(shape)}, a batch of matrices cut into {view.blocks} blocks, is sharded "
                    f"along axis {axis}: shard a leading axis"
                )
            return cls(shape, view, axis, view.shape(shape), kind)
        if len(shape) > 2 and axis > 0:
            raise ValueError(
                f"{name} of shape {tuple(shape)}, flattened to one matrix, is sharded along axis {axis}: shard axis 0, "
                "or give flatten=False for a matrix for each of the leading axes"
            )
        return cls(shape, view, axis, view.shape(shape), "rows" if axis == 0 else "columns")

    def slices(self, ranks: int, rank: int) -> list[Slice]:
        """Return what a rank has, in the order of its memory's matrices; nothing for an empty shard."""
        batch, m, n = self.matrices
        start, stop = chunk(self.shape[self.axis], ranks, rank)
        if start == stop or not batch * m * n:
            return []
        if self.kind == "whole":
            inner = self.shape[self.axis + 1 : -2].numel() * self.view.blocks
            if self.axis > 0:
                # each outer index has its own stretch of matrices
                outer, length = self.shape[: self.axis].numel(), self.shape[self.axis]
                return [Slice((o * length + start) * inner, (stop - start) * inner, 0, m, 0, n) for o in range(outer)]
            return [Slice(start * inner, (stop - start) * inner, 0, m, 0, n)]
        length = m if self.kind == "rows" else n
        # the axis of a view that cuts along the sharded axis: matrices follow each other along it
        follows = self.view.blocks > 1 and self.view.axis == (0 if self.kind == "rows" else 1)
        if not follows:
            if self.kind == "rows":
                return [Slice(0, batch, start, stop - start, 0, n)]
            return [Slice(0, batch, 0, m, start, stop - start)]
        slices = []
        position = start
        while position < stop:
            matrix, offset = divmod(position, length)
            whole = (stop - position) // length if offset == 0 else 0
            if whole:
                size, count = length, whole
            else:
                size, count = min(stop - position, length - offset), 1
            if self.kind == "rows":
                slices.append(Slice(matrix, count, offset, size, 0, n))
            else:
                slices.append(Slice(matrix, count, 0, m, offset, size))
            position += size * count
        return slices

    def views(self, shard: Tensor, ranks: int, rank: int) -> list[Tensor]:
        """Return [count, rows, columns] views of a rank's shard of the parameter, one for each piece."""
        slices = self.slices(ranks, rank)
        if not slices:
            return []
        if self.view.batches(len(self.shape)):
            # one batch over the leading axes; with several stretches, each is a run of it
            matrices = self.view.matrices(shard)
            counts = [piece.count for piece in slices]
            return list(torch.split(matrices, counts))
        flat = shard.view(shard.shape[0], -1)
        views, position = [], 0
        for piece in slices:
            if self.kind == "rows" and self.view.blocks > 1 and self.view.axis == 0:
                size = piece.count * piece.rows
                views.append(flat[position : position + size].view(piece.count, piece.rows, piece.columns))
                position += size
            elif self.kind == "columns" and self.view.blocks > 1 and self.view.axis == 1:
                size = piece.count * piece.columns
                part = flat[:, position : position + size]
                views.append(part.view(-1, piece.count, piece.columns).transpose(0, 1))
                position += size
            elif self.view.blocks == 1:
                views.append(flat.unsqueeze(0))
            elif self.view.axis == 0:  # columns of matrices that are stacked along the rows
                views.append(flat.view(piece.count, piece.rows, -1))
            else:
                views.append(flat.view(-1, piece.count, piece.columns).transpose(0, 1))
        return views

    def factor_views(self, factor: Tensor, sharded: bool, ranks: int, rank: int) -> list[Tensor]:
        """Return [count, rows or columns, 3] views of a local factor, one for each piece.

        `sharded` says whether the factor's own axis is; one that is whole on every rank has all matrices.
        """
        slices = self.slices(ranks, rank)
        batch = self.matrices[0]
        if not sharded:
            whole = MatrixView.factors(factor, batch)
            return [whole[piece.matrix : piece.matrix + piece.count] for piece in slices]
        if len(slices) <= 1:
            return [factor.view(piece.count, -1, 3) for piece in slices]
        if self.kind == "whole":
            counts = [piece.count for piece in slices]
            return list(torch.split(factor.view(sum(counts), -1, 3), counts))
        lengths = [piece.count * (piece.rows if self.kind == "rows" else piece.columns) for piece in slices]
        return [part.view(piece.count, -1, 3) for part, piece in zip(torch.split(factor, lengths), slices, strict=True)]

    def factor_axes(self) -> tuple[int | None, int | None]:
        """Return the axes along which the row and the column factor (`MatrixView.factor_shapes`) are sharded."""
        if self.view.batches(len(self.shape)):
            if self.kind == "whole":
                return self.axis, self.axis
            return (len(self.shape) - 2, None) if self.kind == "rows" else (None, len(self.shape) - 2)
        if self.kind == "rows":
            return (1 if self.view.blocks > 1 and self.view.axis == 1 else 0), None
        return None, (1 if self.view.blocks > 1 and self.view.axis == 0 else 0)


def zeros_placed(shape: Sequence[int], like: Tensor, axis: int | None, dtype: torch.dtype) -> DTensor:
    """Return zeros of `shape` on the mesh of `like`, sharded along `axis` where that is sharded; None replicates."""
    assert isinstance(like, DTensor)
    placements: list[Placement] = [
        (Replicate() if axis is None else Shard(axis)) if isinstance(placement, Shard) else placement
        for placement in like.placements
    ]
    return dtensor_zeros(*shape, dtype=dtype, device_mesh=like.device_mesh, placements=placements, requires_grad=False)


def newton_schulz_flops(m: int, n: int, steps: int) -> int:
    """Floating-point operations of Newton-Schulz on one matrix, the symmetric half of two products left out."""
    m, n = min(m, n), max(m, n)
    return steps * (m * m * n + m**3 + 2 * m * m * n)


def assign_owners(
    shapes: Sequence[tuple[int, int]], holders: Sequence[int | None], ranks: int, steps: int
) -> list[int]:
    """Return the rank that runs Newton-Schulz on each matrix: its holder when one rank has it whole, else by load.

    Longest processing time first, ties by number, so every rank comes to the same result.
    """
    loads = [0] * ranks
    owners = [-1] * len(shapes)
    costs = [newton_schulz_flops(m, n, steps) for m, n in shapes]
    for matrix, holder in enumerate(holders):
        if holder is not None:
            owners[matrix] = holder
            loads[holder] += costs[matrix]
    rest = [matrix for matrix, holder in enumerate(holders) if holder is None]
    least = [(load, rank) for rank, load in enumerate(loads)]
    heapq.heapify(least)
    for matrix in sorted(rest, key=lambda matrix: (-costs[matrix], matrix)):
        load, owner = least[0]
        owners[matrix] = owner
        heapq.heapreplace(least, (load + costs[matrix], owner))
    return owners


def gather(value: str | None, group: dist.ProcessGroup) -> list[str | None]:
    """Return every rank's value."""
    values: list[str | None] = [None] * dist.get_world_size(group)
    dist.all_gather_object(values, value, group=group)
    return values


def agree(description: Any, group: dist.ProcessGroup, what: str) -> None:
    """Compare a description of the plan over a group, once; raises RuntimeError on every rank when two differ."""
    digests = gather(hashlib.sha256(repr(description).encode()).hexdigest(), group)
    if len(set(digests)) > 1:
        ranks = [index for index, other in enumerate(digests) if other != digests[0]]
        raise RuntimeError(
            f"{what} differs between ranks (rank 0 of the group and ranks {ranks}): every rank must give the optimizer "
            "the same parameters, groups and options in the same order"
        )
