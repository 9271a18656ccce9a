"""ZeRO-1: the step of parameters that every rank has whole, as with DistributedDataParallel, divided by rows.

Each rank keeps the state of its own rows of every matrix, placed as FSDP2 places it: `Shard(0)`. Its rows of a
parameter and of the gradient are views, and the step takes them as it takes shards; the rows that it has updated then
reach the other ranks by flat all-gathers of equal segments, in the parameters' dtype.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard

from celo2.matrices import MatrixView
from celo2.shard_layout import chunk
from celo2.sharding import ShardSpec
from celo2.state import compute_dtype
from celo2.stochastic_rounding import mix64

# of what one all-gather brings from all ranks together; two are under way at a time
BUCKET_BYTES = 64 << 20


def check_mesh(mesh: DeviceMesh) -> None:
    """Raise TypeError for what is not a DeviceMesh, ValueError for one of several axes or without this rank."""
    if not isinstance(mesh, DeviceMesh):
        raise TypeError(
            f"zero1_mesh is a {type(mesh).__name__}, expected a DeviceMesh of the DistributedDataParallel ranks: "
            "torch.distributed.device_mesh.init_device_mesh(device_type, (world_size,))"
        )
    if mesh.ndim != 1:
        raise ValueError(f"zero1_mesh={mesh!r} has {mesh.ndim} axes: take one of them, mesh['name']")
    if mesh.get_coordinate() is None:
        raise ValueError(f"zero1_mesh={mesh!r} does not hold rank {dist.get_rank()}, which is to step with it")


def check_parameter(parameter: Tensor, mesh: DeviceMesh) -> None:
    """Raise ValueError for a parameter whose step cannot be split over `mesh`."""
    shape = tuple(parameter.shape)
    if isinstance(parameter, DTensor):
        raise ValueError(
            f"with zero1_mesh, shape {shape}: a DTensor with placements {parameter.placements} on "
            f"{parameter.device_mesh}, and zero1_mesh is for parameters that every rank has whole, as with "
            "DistributedDataParallel; the step of sharded ones is split by their placements: leave zero1_mesh out"
        )
    if parameter.device.type != mesh.device_type:
        raise ValueError(
            f"with zero1_mesh, shape {shape}: on {parameter.device}, and zero1_mesh={mesh!r} is a mesh of "
            f"{mesh.device_type} devices; move the module first, and take a mesh of its devices"
        )


def check_order(parameter: Tensor, view: MatrixView) -> None:
    """Raise ValueError for a layout without the matrix view by rows in the parameter's own order."""
    if view.order(parameter) is not None:
        raise ValueError(
            f"with zero1_mesh, shape {tuple(parameter.shape)}: strides {parameter.stride()} are in another order "
            "(channels_last); store it contiguously (module.to(memory_format=torch.contiguous_format)), or leave "
            "zero1_mesh out"
        )
    view.matrices(parameter.detach())


def sharded_like(tensor: Tensor, mesh: DeviceMesh) -> DTensor:
    """Return a whole tensor as a DTensor that is sharded by rows; the local part is a view of this rank's rows."""
    rows = spec_on(mesh).rows_of(tensor)
    return DTensor.from_local(rows, mesh, [Shard(0)], run_check=False, shape=tensor.shape, stride=tensor.stride())


def check_divided(parameter: Tensor, state: dict[str, Tensor], view: MatrixView) -> None:
    """Raise ValueError for a parameter that its divided state no longer fits, or without the matrix view."""
    like = state["row_factor"]
    if parameter.device != like.device or compute_dtype(parameter) != like.dtype:
        raise ValueError(
            f"it is {parameter.dtype} on {parameter.device} now, and its state is {like.dtype} on {like.device}: "
            "convert the module before FusedCelo2(zero1_mesh=...) is constructed"
        )
    check_order(parameter, view)


def check_replicas(named: Sequence[tuple[str, Tensor]], mesh: DeviceMesh) -> None:
    """Raise RuntimeError on every rank of the mesh when a parameter or a gradient differs between them; collective."""
    mine = [(fingerprint(p), None if p.grad is None else fingerprint(p.grad)) for _, p in named]
    all_ranks: list[Any] = [None] * mesh.size(0)
    dist.all_gather_object(all_ranks, mine, group=mesh.get_group(0))
    if any(len(other) != len(mine) for other in all_ranks):
        return  # the plan has the message for these
    for index, what in ((0, "parameter"), (1, "gradient of")):
        for position, (name, _) in enumerate(named):
            values = [other[position][index] for other in all_ranks]
            # which parameters have gradients is compared in the step itself
            if len({value for value in values if value is not None}) > 1:
                cause = "a seed or weights of its own" if index == 0 else "no reduction, or one of its own"
                raise RuntimeError(
                    f"zero1_mesh: {what} {name} differs between ranks, as after {cause} on each; wrap the model in "
                    "DistributedDataParallel, and run backward through it. Nothing was stepped"
                )


def fingerprint(tensor: Tensor) -> int:
    """Return a hash of a tensor's bits in their order, 64 bits; the same for any number of threads."""
    bits = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()]
    flat = tensor.detach().reshape(-1).view(bits)
    total, length = 0, 1 << 20
    odd = 2 * torch.arange(min(length, flat.numel()), device=flat.device) + 1
    for number, start in enumerate(range(0, flat.numel(), length)):
        part = flat[start : start + length].long()
        # integers wrap, so the order of the sum makes no difference
        mixed = (part + 0x632BE59BD9B4E019) * odd[: part.numel()]
        mixed ^= mixed >> 29
        total = mix64(total ^ mix64(int(mixed.sum()) + number))
    return total


def spec_on(mesh: DeviceMesh) -> ShardSpec:
    """Return how the rows of a whole parameter are divided."""
    return ShardSpec(mesh, ((0, 0),), zero1=True)


def shares(gradients: Sequence[Tensor], mesh: DeviceMesh) -> list[Tensor]:
    """Return this rank's share of gradients that all ranks have whole, for a norm that is the same on all."""
    scalars = [gradient for gradient in gradients if not gradient.ndim]
    rows = [spec_on(mesh).rows_of(gradient) for gradient in gradients if gradient.ndim]
    return rows + (scalars if mesh.get_local_rank(0) == 0 else [])


class RowRange(NamedTuple):
    """Rows [first, first + rows) of every rank's chunk of a tensor, at `offset` of each rank's segment of a bucket."""

    tensor: int
    first: int
    rows: int
    offset: int


def plan_buckets(shapes: Sequence[torch.Size], ranks: int, limit: int) -> Iterator[tuple[list[RowRange], int]]:
    """Cut tensors of one dtype into buckets of at most `limit` elements on all ranks together, but at least a row each.

    Yields the ranges of a bucket and the length of a rank's segment, which is as long as the longest rank needs.
    """
    bucket: list[RowRange] = []
    size = 0
    for index, shape in enumerate(shapes):
        _, chunk_rows = chunk(shape[0], ranks, 0)
        width, first = shape[1:].numel(), 0
        while first < chunk_rows:
            room = (limit // ranks - size) // width
            if room < 1 and bucket:
                yield bucket, size
                bucket, size = [], 0
                continue
            rows = min(max(1, room), chunk_rows - first)
            bucket.append(RowRange(index, first, rows, size))
            first, size = first + rows, size + rows * width
    if bucket:
        yield bucket, size


class _Gather:
    """One all-gather: the own rows of some tensors on their way out, and those of the other ranks on their way in."""

    def __init__(self, tensors: Sequence[Tensor], ranges: list[RowRange], size: int, mesh: DeviceMesh) -> None:
        self.tensors, self.ranges, self.ranks = tensors, ranges, mesh.size(0)
        like, rank = tensors[0], mesh.get_local_rank(0)
        self.segment = torch.empty(size, dtype=like.dtype, device=like.device)
        targets, sources = [], []
        for part in ranges:
            start, stop = chunk(tensors[part.tensor].shape[0], self.ranks, rank)
            start = min(stop, start + part.first)
            source = tensors[part.tensor][start : min(stop, start + part.rows)]
            if source.numel():
                sources.append(source)
                targets.append(self.segment[part.offset : part.offset + source.numel()].view(source.shape))
        if targets:
            torch._foreach_copy_(targets, sources)
        self.segments = torch.empty(self.ranks, size, dtype=like.dtype, device=like.device)
        # its name since PyTorch 2.13
        all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
        # as bytes: every backend takes them
        self.work = all_gather(
            self.segments.view(-1).view(torch.uint8),
            self.segment.view(torch.uint8),
            group=mesh.get_group(0),
            async_op=True,
        )

    def finish(self) -> None:
        """Wait, and write every rank's rows into the tensors."""
        assert self.work is not None
        self.work.wait()
        targets, sources = [], []
        for part in self.ranges:
            tensor = self.tensors[part.tensor]
            length, shape = tensor.shape[0], tensor.shape[1:]
            _, chunk_rows = chunk(length, self.ranks, 0)
            # ranks with a whole chunk, and one that has the rest
            full, rest = divmod(length, chunk_rows)
            end = part.offset + part.rows * shape.numel()
            values = self.segments[:, part.offset : end].view(self.ranks, part.rows, *shape)
            rows = slice(part.first, part.first + part.rows)
            targets.append(tensor[: full * chunk_rows].view(full, chunk_rows, *shape)[:, rows])
            sources.append(values[:full])
            last = tensor[full * chunk_rows :][rows]
            if rest and last.shape[0]:
                targets.append(last)
                sources.append(values[full, : last.shape[0]])
        torch._foreach_copy_(targets, sources)


def gather_rows(tensors: Sequence[Tensor], mesh: DeviceMesh, bucket_bytes: int = BUCKET_BYTES) -> None:
    """Write each rank's rows of whole tensors, of one axis or more and not empty, to all ranks; collective."""
    under_way: _Gather | None = None
    for dtype in sorted({tensor.dtype for tensor in tensors}, key=str):
        chosen = [tensor.detach() for tensor in tensors if tensor.dtype == dtype]
        limit = bucket_bytes // dtype.itemsize
        for ranges, size in plan_buckets([tensor.shape for tensor in chosen], mesh.size(0), limit):
            started = _Gather(chosen, ranges, size, mesh)
            if under_way is not None:
                under_way.finish()
            under_way = started
    if under_way is not None:
        under_way.finish()
