"""What ranks send each other in a step: `Local` for a process that steps alone, `Ranks` for those of a plan."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from celo2.exchanges import UNIT, Exchange

if TYPE_CHECKING:
    import torch.distributed as dist
    from torch.distributed.device_mesh import DeviceMesh

    from celo2.plan import Plan


class Work(Protocol):
    """A collective under way."""

    def wait(self) -> Any: ...


class Comm(Protocol):
    """The collectives of a step; every rank of a plan calls them in the same order."""

    def all_reduce(self, number: int, message: Tensor) -> None:
        """Add up a message of the plan over the ranks, in place; `number` is its place among the three."""

    def to_owners(self, received: Tensor, sent: Tensor) -> Work | None:
        """Start to send directions to the ranks that orthogonalise them; None when there are none."""

    def from_owners(self, received: Tensor, sent: Tensor) -> Work:
        """Start to send them back, with the arguments in the same order as there: from `received` into `sent`."""

    def all_reduce_shared(self, tensor: Tensor) -> None:
        """Add up a tensor over the ranks that share matrices with this one, in place."""

    def note_flags(self, flags: Tensor) -> None:
        """Keep the sums of the entries' flags, for `check_flags`; waits for no device."""

    def check_flags(self) -> None:
        """Raise RuntimeError when ranks did not agree on which parameters had gradients in the last noted step."""

    def gather_rows(self) -> None:
        """Bring the rows of whole parameters that each rank has stepped to all ranks (ZeRO-1)."""


class Local:
    """The one process of a step: nothing is sent."""

    def all_reduce(self, number: int, message: Tensor) -> None:
        pass

    def to_owners(self, received: Tensor, sent: Tensor) -> None:
        return None

    def from_owners(self, received: Tensor, sent: Tensor) -> Work:
        raise AssertionError("no directions were sent")

    def all_reduce_shared(self, tensor: Tensor) -> None:
        raise AssertionError("no matrices are shared")

    def note_flags(self, flags: Tensor) -> None:
        pass

    def check_flags(self) -> None:
        pass

    def gather_rows(self) -> None:
        pass


class Ranks:
    """The ranks of `group`, which step the entries of `plan` together; `mesh` is given with ZeRO-1.

    Collective: every rank makes it. Raises RuntimeError when they were given different parameters.
    """

    def __init__(self, plan: Plan, group: dist.ProcessGroup, device: torch.device, mesh: DeviceMesh | None = None):
        from celo2.sharding import agree

        self.plan, self.group, self.device, self.mesh = plan, group, device, mesh
        agree(plan.describe(), group, "the set of sharded parameters")
        masks = plan.masks()
        self.masks = None if masks is None else [torch.from_numpy(mask).to(device) for mask in masks]
        self._noted: tuple[Tensor, torch.cuda.Event | None] | None = None
        self._groups: dict[str, dist.ProcessGroup] = {}
        # of what passes through this rank, both ways
        self._orders = [
            [None if exchange.order is None else torch.from_numpy(exchange.order).to(device) for exchange in way]
            for way in (plan.to_owners, plan.from_owners)
        ]

    def all_reduce(self, number: int, message: Tensor) -> None:
        import torch.distributed as dist

        if message.numel():
            if self.masks is not None:
                message.mul_(self.masks[number])
            dist.all_reduce(message, group=self.group)

    def to_owners(self, received: Tensor, sent: Tensor) -> Work | None:
        if not self.plan.owner:
            return None
        if not self._groups:
            self._groups = self._make_groups()
        return self._travel(self.plan.to_owners, self._orders[0], received, _taken(sent, self.plan.sent_ranges))

    def from_owners(self, received: Tensor, sent: Tensor) -> Work:
        return self._travel(self.plan.from_owners, self._orders[1], sent, _taken(received, self.plan.returned_ranges))

    def all_reduce_shared(self, tensor: Tensor) -> None:
        import torch.distributed as dist

        dist.all_reduce(tensor, group=self._groups["shared"])

    def _travel(
        self, exchanges: Sequence[Exchange], orders: Sequence[Tensor | None], out: Tensor, given: Tensor
    ) -> Work:
        """Make all exchanges but the last one, which is under way when this returns."""
        for exchange, order in zip(exchanges[:-1], orders, strict=False):
            assert order is not None
            middle = given.new_empty(sum(exchange.receives))
            self._exchange(exchange, middle, given).wait()
            given = middle.view(-1, UNIT).index_select(0, order).view(-1)
        return self._exchange(exchanges[-1], out, given)

    def _exchange(self, exchange: Exchange, out: Tensor, given: Tensor) -> Work:
        import torch.distributed as dist

        size = self.plan.comm_dtype.itemsize
        # as bytes: every backend takes them
        work: Work | None = dist.all_to_all_single(
            out.view(torch.uint8),
            given.view(torch.uint8),
            [count * size for count in exchange.receives],
            [count * size for count in exchange.sends],
            group=self._groups[exchange.among],
            async_op=True,
        )
        assert work is not None  # this rank is in the group
        return work

    def _make_groups(self) -> dict[str, dist.ProcessGroup]:
        """Return the process groups of neighbours, which all ranks make together, the first time."""
        from celo2.sharding import groups_of_neighbours

        plan, groups = self.plan, {"all": self.group}
        if plan.two_levels:
            groups["rail"], groups["node"] = groups_of_neighbours(self.device.type, plan.ranks, plan.ranks_per_node)
        if plan.sharers == plan.ranks:
            groups["shared"] = self.group
        elif plan.sharers > 1:
            _, groups["shared"] = groups_of_neighbours(self.device.type, plan.ranks, plan.sharers)
        return groups

    def note_flags(self, flags: Tensor) -> None:
        if flags.device.type != "cuda":
            self._noted = flags.clone(), None
        elif not torch.cuda.is_current_stream_capturing():
            host = torch.empty(flags.shape, dtype=flags.dtype, pin_memory=True)
            host.copy_(flags, non_blocking=True)
            event: torch.cuda.Event = torch.cuda.Event()  # type: ignore[no-untyped-call]
            event.record()
            self._noted = host, event

    def check_flags(self) -> None:
        """Waits for the copy, which ends early in the step. A CUDA graph neither notes nor checks."""
        if self._noted is None or (self.device.type == "cuda" and torch.cuda.is_current_stream_capturing()):
            return
        (flags, event), self._noted = self._noted, None
        if event is not None:
            event.synchronize()
        for entry, flag in zip(self.plan.entries, flags.tolist(), strict=True):
            if flag not in (0, self.plan.ranks):
                raise RuntimeError(
                    f"{entry.slot.name} has a gradient on {flag:g} of {self.plan.ranks} ranks: all or none must have "
                    "one"
                )

    def shares(self, whole: list[Tensor], shards: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """Return gradients that count in full on every rank, and those of which this rank has a share, for the norm."""
        if self.mesh is None:
            return whole, shards
        # a norm that is the same on all ranks to the last bit
        from celo2.zero1 import shares

        return [], [*shards, *shares(whole, self.mesh)]

    def gather_rows(self) -> None:
        if self.mesh is not None:
            from celo2.zero1 import gather_rows

            parameters = [entry.slot.parameter for entry in self.plan.entries]
            gather_rows([parameter for parameter in parameters if parameter.grad is not None], self.mesh)


def _taken(message: Tensor, ranges: Sequence[tuple[int, int]]) -> Tensor:
    """Return ranges of a message one after another: a view where they are one, as without replicas."""
    parts = [message[start:stop] for start, stop in ranges]
    return torch.cat(parts) if len(parts) > 1 else parts[0] if parts else message[:0]
