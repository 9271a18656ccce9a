"""How a parameter is sharded, and which slices of its matrices that gives each rank.

`fully_shard` (FSDP2) cuts a parameter along one axis into contiguous, possibly uneven or empty chunks; tensor
parallelism cuts another axis, or the same one before it. What a rank has is a box of the parameter, and holds slices of
matrices, whether or not the view's matrices align with it. Everything here is arithmetic on shapes and ranks, the same
on every rank, so the collectives of a step need no negotiation.
"""

from __future__ import annotations

import hashlib
import heapq
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.placement_types import Placement, _StridedShard

from celo2.matrices import MatrixView


class Cut(NamedTuple):
    """A cut of `axis` of a tensor into `parts`, as `torch.chunk` cuts: rank r has part r // stride % parts."""

    axis: int
    parts: int
    stride: int = 1

    def part(self, rank: int) -> int:
        return rank // self.stride % self.parts


@dataclass(frozen=True)
class ShardSpec:
    """How the step of a parameter is divided over a mesh: `cuts` are axes of the tensor and of the mesh, in order.

    Each cuts what the ones before it have left. With `zero1` every rank has the parameter and its gradient whole
    (DistributedDataParallel), and steps its rows.
    """

    mesh: DeviceMesh
    cuts: tuple[tuple[int, int], ...]
    zero1: bool = False

    @property
    def axes(self) -> tuple[int, ...]:
        """Axes of the tensor that are cut, the first cut first."""
        return tuple(axis for axis, _ in self.cuts)

    def only_cut(self) -> tuple[int, int]:
        """Return the axes of the tensor and of the mesh where there is one cut. Raises ValueError for several."""
        if len(self.cuts) > 1:
            raise ValueError(f"sharded on {len(self.cuts)} axes of {self.mesh}: VeLO takes parameters sharded on one")
        return self.cuts[0]

    def own_cuts(self) -> tuple[tuple[Cut, ...], int]:
        """Return the cuts by this rank's number in the mesh, and that."""
        coordinate = self.mesh.get_coordinate()
        assert coordinate is not None
        sizes = [self.mesh.size(axis) for axis in range(self.mesh.ndim)]
        strides = [math.prod(sizes[axis + 1 :]) for axis in range(self.mesh.ndim)]
        cuts = tuple(Cut(axis, sizes[along], strides[along]) for axis, along in self.cuts)
        return cuts, sum(index * stride for index, stride in zip(coordinate, strides, strict=True))

    def rows_of(self, tensor: Tensor) -> Tensor:
        """View this rank's rows of a whole tensor of at least one axis."""
        cuts, rank = self.own_cuts()
        start, stop = box(tensor.shape, cuts, rank)[0]
        return tensor.detach()[start:stop]


def shard_spec_of(parameter: Tensor, name: str = "parameter") -> ShardSpec | None:
    """Return how a DTensor is sharded; None for a plain tensor, or one that every rank has whole.

    Raises ValueError for a partial tensor, one strided otherwise than by FSDP2 after tensor parallelism, and one
    offloaded from its mesh's devices to the CPU.
    """
    if not isinstance(parameter, DTensor):
        return None
    mesh, cuts = parameter.device_mesh, list[tuple[int, int]]()
    strided: list[tuple[int, int, int]] = []
    for along, placement in enumerate(parameter.placements):
        if isinstance(placement, Replicate):
            continue
        axis = placement.dim % max(1, parameter.ndim) if isinstance(placement, Shard | _StridedShard) else 0
        if type(placement) is Shard:
            cuts.append((axis, along))
        elif isinstance(placement, _StridedShard):
            # it cuts what the later axes of the mesh have left of the tensor's
            strided.append((axis, along, int(placement.split_factor)))
        else:
            raise ValueError(
                f"{name} of shape {tuple(parameter.shape)} has placements {parameter.placements}: only Shard and "
                "Replicate are supported (FSDP2, HSDP, and tensor parallelism)"
            )
    for axis, along, factor in reversed(strided):
        if factor != math.prod(mesh.size(other) for where, other in cuts if where == axis and other > along):
            raise ValueError(
                f"{name} of shape {tuple(parameter.shape)} has placements {parameter.placements} on {mesh}: strided "
                "otherwise than by fully_shard after tensor parallelism"
            )
        cuts.append((axis, along))
    if not cuts:
        return None
    where = parameter.to_local().device.type
    if where not in (mesh.device_type, "meta"):
        raise ValueError(
            f"{name} of shape {tuple(parameter.shape)} is on the {where} and its mesh of {mesh.device_type} devices: "
            "parameters offloaded by FSDP2 (CPUOffloadPolicy) are not supported; leave the policy out, or halve the "
            "state with state_dtype='bfloat16'"
        )
    return ShardSpec(mesh, tuple(cuts))


def same_placements(parameter: Tensor, gradient: Tensor) -> bool:
    """Whether a gradient lies on the ranks as its parameter does."""
    if isinstance(parameter, DTensor) and isinstance(gradient, DTensor):
        return parameter.placements == gradient.placements
    return not isinstance(parameter, DTensor) and not isinstance(gradient, DTensor)


class Team:
    """The ranks that step together: those of the largest mesh, numbered as in a process group of them.

    Raises ValueError for a mesh that is no regular part of the largest.
    """

    def __init__(self, meshes: Sequence[DeviceMesh]) -> None:
        self.mesh = max(meshes, key=lambda mesh: mesh.size())
        self.members = tuple(sorted(self.mesh.mesh.flatten().tolist()))  # numbers of the world
        self._numbers = {rank: number for number, rank in enumerate(self.members)}
        self.ranks, self.rank = len(self.members), self._numbers[dist.get_rank()]
        self._strides: dict[tuple[DeviceMesh, int], int] = {}
        self._counts: dict[ShardSpec, bool] = {}
        for mesh in meshes:
            for along in range(mesh.ndim):
                self._strides[mesh, along] = self._stride(mesh, along)

    def cuts(self, spec: ShardSpec) -> tuple[Cut, ...]:
        """Return the cuts of a parameter by the numbers of the ranks here."""
        return tuple(Cut(axis, spec.mesh.size(along), self._strides[spec.mesh, along]) for axis, along in spec.cuts)

    def counts(self, spec: ShardSpec) -> bool:
        """Whether this rank is the first of those that have the same part of a parameter."""
        if spec not in self._counts:
            self._counts[spec] = home(self.cuts(spec), self.rank) == self.rank
        return self._counts[spec]

    def _stride(self, mesh: DeviceMesh, along: int) -> int:
        numbers = torch.tensor([self._numbers.get(rank, -1) for rank in mesh.mesh.flatten().tolist()])
        lines = numbers.view(mesh.mesh.shape).movedim(along, -1).reshape(-1, mesh.size(along))
        parts = lines.shape[1]
        stride = max(1, int(lines[0, 1] - lines[0, 0])) if parts > 1 else 1
        expected = lines[:, :1] + stride * torch.arange(parts)
        in_order = torch.equal(lines, expected) and bool((lines[:, 0] // stride % parts == 0).all())
        if numbers.min() < 0 or not in_order or self.ranks % (stride * parts):
            raise ValueError(
                f"parameters are sharded over {mesh} and {self.mesh}, and the one is no part of the other: one "
                "optimizer needs one mesh, or slices of one"
            )
        return stride

    def group(self) -> dist.ProcessGroup:
        """Return the process group of all; collective over its ranks where there is none yet."""
        if self.mesh.ndim == 1:
            return self.mesh.get_group(0)
        world = dist.group.WORLD
        if world is not None and self.ranks == dist.get_world_size():
            return world
        # those that are not in it need not call
        group = dist.new_group(list(self.members), use_local_synchronization=True)
        assert isinstance(group, dist.ProcessGroup)
        return group


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

    A rank may have some of the rows of a matrix, some of the columns, both, or whole ones (leading axes are sharded).
    A factor over rows or columns that may be on other ranks is whole on every rank where the other axis is cut too, or
    is the one that is cut.
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
        return cls(shape, view, tuple(cuts), view.shape(shape), rows in axes, columns in axes)

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
        slices, batch = self.slices(rank), self.matrices[0]
        whole_rows, whole_columns = self.whole_factors
        found_rows, found_columns = [], []
        if whole_rows:
            factor = MatrixView.factors(rows, batch)
            for piece in slices:
                there = slice(piece.row, piece.row + piece.rows)
                found_rows.append(factor[piece.matrix : piece.matrix + piece.count, there])
        else:
            found_rows = _split(rows, slices, [piece.rows for piece in slices])
        if whole_columns:
            factor = MatrixView.factors(columns, batch)
            for piece in slices:
                there = slice(piece.column, piece.column + piece.columns)
                found_columns.append(factor[piece.matrix : piece.matrix + piece.count, there])
        else:
            found_columns = _split(columns, slices, [piece.columns for piece in slices])
        return found_rows, found_columns

    def factor_axes(self, axis: int) -> tuple[int | None, int | None]:
        """Return the axes of the row and column factor (`MatrixView.factor_shapes`) that are cut as `axis` is."""
        whole_rows, whole_columns = self.whole_factors
        if self.view.batches(len(self.shape)):
            rows, columns = (axis, axis) if axis < len(self.shape) - 2 else (len(self.shape) - 2,) * 2
        else:
            rows = 1 if self.view.blocks > 1 and self.view.axis == 1 else 0
            columns = 1 if self.view.blocks > 1 and self.view.axis == 0 else 0
        return None if whole_rows else rows, None if whole_columns else columns


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


def placed_like(parameter: DTensor, axis_of: dict[int, int | None]) -> list[Placement]:
    """Return placements of a tensor whose axis `axis_of[axis]` is cut as `axis` of a parameter is; None: not at all."""
    placements: list[Placement] = []
    for placement in parameter.placements:
        axis = axis_of[placement.dim % max(1, parameter.ndim)] if hasattr(placement, "dim") else None
        if axis is None:
            placements.append(Replicate())
        elif isinstance(placement, _StridedShard):
            placements.append(_StridedShard(axis, split_factor=placement.split_factor))
        else:
            placements.append(Shard(axis))
    return placements


def zeros_placed(
    shape: Sequence[int], parameter: Tensor, axis_of: dict[int, int | None], dtype: torch.dtype
) -> DTensor:
    """Return zeros of `shape` on the mesh of a parameter, placed as `placed_like` says."""
    assert isinstance(parameter, DTensor)
    spec, cuts, rank = shard_spec_of(parameter), tuple[Cut, ...](), 0
    if spec is not None:
        cuts, rank = spec.own_cuts()
    own = [Cut(there, cut.parts, cut.stride) for cut in cuts if (there := axis_of[cut.axis]) is not None]
    local = [stop - start for start, stop in box(shape, own, rank)]
    strides = torch.empty(tuple(shape), device="meta").stride()
    return DTensor.from_local(
        torch.zeros(local, dtype=dtype, device=parameter.to_local().device),
        parameter.device_mesh,
        placed_like(parameter, axis_of),
        run_check=False,
        shape=torch.Size(shape),
        stride=strides,
    )


def newton_schulz_flops(m: int, n: int, steps: int) -> int:
    """Floating-point operations of Newton-Schulz on one matrix, the symmetric half of two products left out."""
    m, n = min(m, n), max(m, n)
    return steps * (m * m * n + m**3 + 2 * m * m * n)


def assign_owners(
    shapes: Sequence[tuple[int, int]], holders: Sequence[Sequence[int]], ranks: int, steps: int
) -> list[int]:
    """Return the rank that runs Newton-Schulz on each matrix: one of its holders when some have it whole, else by load.

    Longest processing time first, ties by number, so every rank comes to the same result.
    """
    loads = [0] * ranks
    owners = [-1] * len(shapes)
    costs = [newton_schulz_flops(m, n, steps) for m, n in shapes]
    for matrix, having in enumerate(holders):
        if having:
            owners[matrix] = min(having, key=lambda rank: (loads[rank], rank))
            loads[owners[matrix]] += costs[matrix]
    rest = [matrix for matrix, having in enumerate(holders) if not having]
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
