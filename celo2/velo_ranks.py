"""What ranks that share the parameters of a `VeLO` tell each other besides sums: the loss, and who has gradients."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from celo2.groups import named_parameters
from celo2.state import is_dtensor, shard_spec_of

if TYPE_CHECKING:
    import torch.distributed as dist


def groups_of_ranks(groups: Sequence[dict[str, Any]]) -> list[dist.ProcessGroup]:
    """Return the process groups of the sharded parameters: the one of their shards, then those of replicas.

    Raises ValueError for parameters that are sharded over several groups, naming one.
    """
    found: dict[str, tuple[Any, Any]] = {}
    for group in groups:
        for name, parameter in named_parameters(group):
            if is_dtensor(parameter) and (spec := shard_spec_of(parameter)) is not None:
                found[name] = spec.mesh.get_group(spec.only_cut(name)[1]), spec.mesh
    if not found:
        return []
    from torch.distributed import get_process_group_ranks

    first, mesh = next(iter(found.values()))
    for name, (other, _) in found.items():
        # equal meshes that were made twice have groups of their own
        if get_process_group_ranks(other) != get_process_group_ranks(first):
            raise ValueError(f"{name} is sharded over other ranks than {next(iter(found))}: use one mesh for all")
    own = [mesh.get_group(axis) for axis in range(mesh.ndim)]
    return [first, *(group for group in own if group != first)]


class VeLORanks:
    """Whether the ranks have been found to have the same parameters and options."""

    def __init__(self) -> None:
        self._agreed: list[int] = []

    def agree(
        self,
        param_groups: Sequence[dict[str, Any]],
        order: Callable[[Tensor], tuple[int, ...]],
        loss: Tensor,
        bad: Tensor,
        groups: Sequence[Any],
        active: Sequence[str],
    ) -> Tensor:
        """Return the mean loss over ranks, and add up `bad`, in place.

        Raises RuntimeError on every rank when they have other parameters, options, or gradients.
        """
        import torch.distributed as dist

        from celo2.sharding import agree

        members = [
            (name, parameter)
            for group in param_groups
            for name, parameter in named_parameters(group)
            if is_dtensor(parameter) and shard_spec_of(parameter) is not None
        ]
        known = [id(parameter) for _, parameter in members]
        if known != self._agreed:
            described = [(name, tuple(p.shape), p.dtype, order(p)) for name, p in members]
            options = [(group["weights"], group["num_steps"], group["weight_decay"]) for group in param_groups]
            agree([described, options], groups[0], "the set of sharded parameters")
            self._agreed = known
        flags = torch.tensor([float(name in active) for name, _ in members], dtype=bad.dtype, device=bad.device)
        message = torch.cat([torch.stack([loss.to(bad.dtype), bad]), flags])
        count = 1
        for group in groups:
            dist.all_reduce(message, group=group)
            count *= dist.get_world_size(group)
        bad.copy_(message[1])
        for (name, _), flag in zip(members, message[2:].tolist(), strict=True):
            if flag not in (0, count):
                raise RuntimeError(f"{name} has a gradient on {flag:g} of {count} ranks: all or none must have one")
        return (message[0] / count).to(loss.dtype)
