"""How a parameter is placed on a mesh of ranks, and which process group they step in together."""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.placement_types import Placement, _StridedShard

from celo2.shard_layout import Cut, box, home


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

    @property
    def ranks(self) -> int:
        """How many ranks have a part of their own."""
        return math.prod(self.mesh.size(along) for _, along in self.cuts)

    def only_cut(self, name: str = "parameter") -> tuple[int, int]:
        """Return the axes of the tensor and of the mesh where there is one cut. Raises ValueError for several."""
        if len(self.cuts) > 1:
            raise ValueError(f"{name} is sharded on {len(self.cuts)} axes of {self.mesh}: VeLO takes one")
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

    def ranks_per_node(self, given: int | None) -> int:
        """Return how many ranks that follow each other are in a node: as `given`, or as torchrun placed them; or 1.

        Neighbours have process groups of their own, which all ranks of the job make: a team of some of them has none.
        Raises ValueError for a number that is given and cannot be.
        """
        local = min(self.ranks, int(os.environ.get("LOCAL_WORLD_SIZE", "1")) if given is None else given)
        reason = None
        if local > 1 and self.ranks != dist.get_world_size():
            reason = f"needs parameters on all {dist.get_world_size()} ranks, and they are on {self.mesh}"
        elif self.ranks % local:
            reason = f"does not divide the {self.ranks} ranks of {self.mesh}"
        if reason is not None and given is not None:
            raise ValueError(f"ranks_per_node={given} {reason}")
        return local if reason is None else 1

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


# by device type and shape, with the default group of which they were made
_NEIGHBOURS: dict[tuple[str, int, int], tuple[dist.ProcessGroup | None, DeviceMesh]] = {}


def groups_of_neighbours(device_type: str, ranks: int, width: int) -> tuple[dist.ProcessGroup, dist.ProcessGroup]:
    """Return the groups of the ranks of this one's place among each `width` neighbours, and of its neighbours.

    Made once in a process; collective over all ranks of the job then.
    """
    key, world = (device_type, ranks // width, width), dist.group.WORLD
    if key not in _NEIGHBOURS or _NEIGHBOURS[key][0] is not world:
        _NEIGHBOURS[key] = world, init_device_mesh(device_type, key[1:])
    mesh = _NEIGHBOURS[key][1]
    return mesh.get_group(0), mesh.get_group(1)


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
