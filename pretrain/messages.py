"""Who does what in a step, and what travels for it: taken from the sharded model and the optimizer themselves."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import torch.distributed as dist
from torch import Tensor

from celo2 import FusedCelo2
from celo2.groups import group_view, named_parameters
from celo2.newton_schulz import newton_schulz_flops
from celo2.owners import sums_of_shared
from celo2.plan import Plan
from celo2.pretrain.device import DTYPES
from celo2.pretrain.machines import Links, Machine, needs_workspace, newton_schulz_launches
from celo2.pretrain.model import GPT
from celo2.pretrain.parallel import Parallel
from celo2.state import local
from celo2.zero1 import BUCKET_BYTES, plan_buckets


@dataclass(frozen=True)
class Messages:
    """A kind of collective: how many a step, bytes that leave a rank in all of them (the most of any), seconds."""

    name: str
    count: int
    sent: float
    seconds: float

    @classmethod
    def of(cls, name: str, times: int, costs: Sequence[tuple[float, float]]) -> "Messages":
        """`times` a step all of `costs`, each bytes and seconds."""
        return cls(name, times * len(costs), times * sum(c[0] for c in costs), times * sum(c[1] for c in costs))


class Loads:
    """Newton-Schulz by rank: FLOPs, seconds, elements owned and held, and those that are sent to owners and back."""

    def __init__(self, ranks: int, machine: Machine) -> None:
        self.machine = machine
        self.flops, self.seconds = [0] * ranks, [0.0] * ranks
        self.owned, self.held, self.away, self.back = [0] * ranks, [0] * ranks, [0] * ranks, [0] * ranks
        # between nodes: what passes through a rank on its way there and back, and what arrives at its owner
        self.through, self.through_back, self.arriving = [0] * ranks, [0] * ranks, [0] * ranks
        # of that what comes from another rank; and what is sent out of a copy, to several owners
        self.passed, self.divided = [0] * ranks, [0] * ranks
        # of rank, rows, columns, iterations, ranks that share
        self.batches: Counter[tuple[int, int, int, int, int]] = Counter()

    @classmethod
    def of(cls, optimizer: FusedCelo2, step: Plan | None, machine: Machine) -> "Loads":
        """Those of the ranks of a sharded step, or of the one that has everything."""
        loads = cls(1 if step is None else step.ranks, machine)
        if step is None:
            for group in optimizer.param_groups:
                for _, parameter in named_parameters(group):
                    if group["orthogonalize"] and parameter.ndim > 1 and optimizer.rule_of(parameter) == "celo2":
                        batch, m, n = group_view(group).shape(parameter.shape)
                        loads.own(0, m, n, group["ns_steps"], batch, batch * m * n)
            loads.held = loads.owned
            return loads
        for index, entry in enumerate(step.entries):
            layout = entry.layout
            if layout is None or not entry.slot.orthogonalize:
                continue
            batch, m, n = layout.matrices
            for rank, there in enumerate(step.slices(layout)):
                for matrix in range(batch):
                    owners = step.owners_of(index, matrix, rank)
                    if rank in owners:
                        block = step.block(index, matrix, rank)
                        loads.own(rank, m, n, entry.slot.ns_steps, 1, block.numel, len(owners))
                for piece in there:
                    loads.held[rank] += piece.numel
                    for matrix in range(piece.matrix, piece.matrix + piece.count):
                        shares = list(step.shares(index, matrix, rank, piece))
                        loads.divided[rank] += (len(shares) > 1) * piece.rows * piece.columns
                        for owner, share in shares:
                            if owner != rank:
                                size, is_sent = share.rows * share.columns, step.sends(index, rank, owner)
                                loads._send(step, rank, owner, size, is_sent=is_sent)
        return loads

    def _send(self, step: Plan, rank: int, owner: int, size: int, *, is_sent: bool) -> None:
        """Count elements that a rank has for an owner, and sends or only gets back."""
        self.away[rank] += size * is_sent
        self.back[owner] += size
        width = step.ranks_per_node
        if step.two_levels and rank // width != owner // width:
            relay = rank // width * width + owner % width
            self.passed[relay] += size * (relay != rank)
            self.through[relay] += size * is_sent
            self.through_back[relay] += size
            self.arriving[owner] += size

    def own(self, rank: int, m: int, n: int, steps: int, count: int, elements: int, parts: int = 1) -> None:
        self.flops[rank] += count * newton_schulz_flops(m, n, steps, parts)
        self.seconds[rank] += count * self.machine.newton_schulz_seconds(m, n, steps, parts)
        self.owned[rank] += elements
        self.batches[rank, m, n, steps, parts] += count

    @property
    def balance(self) -> float:
        """FLOPs of the rank with most, over the mean."""
        return max(self.flops) * len(self.flops) / sum(self.flops) if self.batches else 1.0

    @property
    def launches(self) -> int:
        """Of the rank with most shapes."""
        launches = Counter[int]()
        for rank, *shape in self.batches:
            launches[rank] += newton_schulz_launches(*shape)
        return max(launches.values(), default=0)

    @property
    def workspace(self) -> int:
        """Bytes: the largest batch of equal matrices twice, five of m x m of each in float16, and sums of shared ones.

        What one program takes whole needs none.
        """
        batches = (
            (count, m * n // parts, min(m, n) ** 2 * (5 if parts == 1 else 8))
            for (_, m, n, steps, parts), count in self.batches.items()
            if parts > 1 or needs_workspace(m, n, steps)
        )
        return max((2 * count * (2 * elements + square) for count, elements, square in batches), default=0)

    def sums(self, rank: int) -> list[int]:
        """Return the elements of each all-reduce of a rank with those that it shares matrices with, in float32."""
        shared = [(batch[1:4], count) for batch, count in self.batches.items() if batch[0] == rank and batch[4] > 1]
        return [size for shape, count in shared for size in sums_of_shared(*shape, count)]


def model_messages(
    model: GPT, parallel: Parallel, links: Links, replicas: Links, dtype: str, micro_steps: int, reductions: int
) -> tuple[list[Messages], dict[str, int]]:
    """What `fully_shard` or DDP sends in a step of so many micro-batches and reductions, and the buffers for it.

    Blocks are gathered in both passes; the rest is a group that stays between them. Gradients travel in float32.
    """
    if parallel.mode == "ddp":
        # as it sorts them once the first backward pass has shown their order
        parameters: list[Tensor] = list(model.parameters())
        parameters.reverse()
        limits = [dist._DEFAULT_FIRST_BUCKET_BYTES, 25 * 2**20]  # type: ignore[attr-defined]
        buckets, _ = dist._compute_bucket_assignment_by_size(parameters, limits)  # type: ignore[attr-defined]
        costs = [replicas.ring(4 * sum(parameters[index].numel() for index in bucket), 2) for bucket in buckets]
        return [Messages.of("all-reduce of gradients", reductions, costs)], {}
    if not parallel.sharded:
        return [], {}
    # messages are padded to the first rank's shards
    blocks = [parallel.shards * sum(local(p).numel() for p in block.parameters()) for block in model.blocks]
    everything = parallel.shards * sum(local(p).numel() for p in model.parameters())
    root, size = everything - sum(blocks), DTYPES[dtype].itemsize
    messages = [
        Messages.of("all-gather", micro_steps, [links.ring(size * count) for count in (root, *blocks, *blocks)]),
        Messages.of("reduce-scatter", reductions, [links.ring(4 * count) for count in (root, *blocks)]),
    ]
    if parallel.replicas > 1:
        costs = [replicas.ring(4 * count / parallel.shards, 2) for count in (root, *blocks)]
        messages.append(Messages.of("all-reduce of replicas", reductions, costs))
    # a block computes while the next one arrives; a group's gradients wait beside their message
    gathered = size * (root + max(blocks) * min(2, len(blocks)))
    return messages, {"gathered": gathered, "reduced": (size + 4) * max(root, *blocks)}


def rule_messages(step: Plan, loads: Loads, links: Links, within: Links) -> tuple[list[Messages], int, float]:
    """What the learned rule sends in a step, bytes of its messages, and bytes that gathering would send.

    Directions go to an owner `within` its replica, and what it returns to all replicas.
    """
    item, lengths = step.comm_dtype.itemsize, list(step.lengths)
    if not step.shares_directions:
        lengths.pop()  # sums of squares of directions that nobody orthogonalises
    messages = [Messages.of("all-reduce", 1, [links.ring(4 * length, 2) for length in lengths])]
    if step.owner:
        messages.append(_exchanges(step, loads, links, within))
    if step.sharers > 1:
        among = Links(links.machine, step.sharers, step.sharers)
        costs = [[among.ring(4 * size, 2) for size in loads.sums(rank)] for rank in range(step.ranks)]
        most = max(costs, key=lambda of_rank: sum(seconds for _, seconds in of_rank))
        messages.append(Messages.of("all-reduce of shared", 1, most))
    # what passes through lies there twice, as it came and as it goes on
    parts = zip(loads.held, loads.owned, loads.divided, loads.through_back, strict=True)
    buffers = item * max(h + o + d + 2 * t for h, o, d, t in parts) + 4 * sum(lengths)
    gathered = item * sum(loads.held) / step.ranks * (within.ranks - 1)
    return messages, buffers, gathered


def _exchanges(step: Plan, loads: Loads, links: Links, within: Links) -> Messages:
    """The all-to-alls of directions and of what comes back for them, over one level or two."""
    item, exchanges = step.comm_dtype.itemsize, (*step.to_owners, *step.from_owners)
    # over two levels what does not stay in the node is sent by this rank and by the one it passes through
    passing = zip(loads.away, loads.back, loads.passed, strict=True)
    sent = item * max(a + b + 2 * p for a, b, p in passing)
    if not step.two_levels:
        assert item * (loads.away[0] + loads.back[0]) == step.bytes_sent()["all-to-all"]
        # with one replica what comes back is what was sent
        busiest = item * max(*loads.back, *(loads.held if step.over_replicas else loads.away))
        back = links if step.over_replicas else within
        seconds = within.exchange(item * max(*loads.away, *loads.back)) + back.exchange(busiest)
        return Messages("all-to-all", len(exchanges), sent, seconds)
    machine, width = links.machine, step.ranks_per_node
    node = Links(machine, width, width)
    rail = Links(machine, (links if step.over_replicas else within).ranks // width, 1)
    arriving = max(loads.arriving)
    forward = node.exchange(item * max(*loads.away, *loads.through)) + rail.exchange(
        item * max(arriving, *loads.through)
    )
    backward = rail.exchange(item * max(arriving, *loads.through_back)) + node.exchange(
        item * max(*loads.through_back, *loads.held)
    )
    return Messages("all-to-all", len(exchanges), sent, forward + backward)


def row_messages(step: Plan, links: Links) -> tuple[Messages, int]:
    """How updated rows of whole float32 parameters reach the other ranks, and bytes of the two buffers under way."""
    shapes = [entry.slot.parameter.shape for entry in step.entries]
    segments = [4 * size for _, size in plan_buckets(shapes, links.ranks, BUCKET_BYTES // 4)]
    costs = [links.ring(links.ranks * segment) for segment in segments]
    return Messages.of("all-gather", 1, costs), 2 * (links.ranks + 1) * max(segments, default=0)
