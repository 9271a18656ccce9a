"""What a step takes and what its ranks send each other: arithmetic on shapes, the same on every rank.

A `Slot` is a parameter with all that a step needs to know of it. A `Plan` has those whose step is divided among ranks
(sharded by FSDP2, or by rows with ZeRO-1), where each one's part of every message begins, and which rank orthogonalises
each matrix. No element of a tensor is read here, and no message is sent.

The messages of a step, in order:

1. `gradients`, all-reduced: the squared norm, and of every matrix the sums of g^2 along the axes that are cut;
2. `features`, all-reduced: the 18 sums of squares of every matrix, and 6 of the vectors along each cut axis;
3. `directions`, all-reduced: a sum of squares of the direction of every matrix that is not orthogonalised;
4. the directions themselves, sent to each matrix's owner by an all-to-all, and the result back by another. A large
   matrix has several owners, neighbours in a node, each with a block of its columns (`celo2.owners`): in between they
   add up its Gram matrices, and squares.

Over many nodes an all-to-all goes in two: first to the rank of the own node that has the owner's place in its, then to
the owner. A rank then has its node's and its place's ranks for peers, and sends between nodes along one rail.

Several ranks may have the same part of a parameter: replicas of HSDP, or ranks of another axis of the mesh. The first
of them counts in every sum, and the masks leave the others out. Each replica orthogonalises for itself; or, over all
replicas, a part is sent by the rank whose place among them is the owner's, and the result goes to all that have it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from celo2.exchanges import Exchange, Owned, Transfer, by_node, joined, lay_out, padded, reordered
from celo2.matrices import MatrixView
from celo2.owners import assign_owners, block_of, choose_parts, pays_two_levels, shares_of, sums_of_shared
from celo2.shard_layout import Cut, ShardLayout, Slice, home
from celo2.state import compute_dtype, is_dtensor, local
from celo2.theta import Theta

if TYPE_CHECKING:
    from celo2.sharding import ShardSpec, Team

# the first entries of the message of gradients: squared norm, and whether a rank asks to skip the step; a flag for each
# entry of the plan follows, 1 where it has a gradient
HEADER = 2
COMM_DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}


def resolved_comm_dtype(name: str, device: torch.device) -> str:
    """Return what directions travel in: of "auto", float16 on a GPU, float32 on a CPU."""
    return name if name != "auto" else "float32" if device.type == "cpu" else "float16"


@dataclass(frozen=True, eq=False)
class Slot:
    """A parameter of the optimizer, its state, and the options of its group.

    `position` is its number among all parameters of the optimizer; `options` are those of its group as they are now,
    while `orthogonalize` and `ns_steps` decide what ranks send each other and stay as they were planned; `spec` says
    how its step is divided among ranks, None where each takes all of it.
    """

    name: str
    group: int
    position: int
    parameter: Tensor
    states: dict[str, Tensor]
    view: MatrixView
    theta: Theta
    orthogonalize: bool
    ns_steps: int
    options: dict[str, Any]
    spec: ShardSpec | None

    @property
    def is_vector(self) -> bool:
        """Whether it has fewer than two axes: no matrix."""
        return self.parameter.ndim < 2

    @property
    def clips(self) -> bool:
        """Whether the rule's clip of an element can act: it cannot behind a global norm of at most that."""
        return self.max_grad_norm is None

    @property
    def max_grad_norm(self) -> float | None:
        limit: float | None = self.options["max_grad_norm"]
        return limit

    @property
    def compute_dtype(self) -> torch.dtype:
        return compute_dtype(self.parameter)

    @property
    def shard(self) -> Tensor:
        """What this rank steps of the parameter, on its storage."""
        return self._part(self.parameter.detach())

    @property
    def gradient(self) -> Tensor:
        """The gradient of `shard`."""
        assert self.parameter.grad is not None
        return self._part(self.parameter.grad)

    @property
    def state(self) -> dict[str, Tensor]:
        """The state of `shard`, on the storage of the optimizer's."""
        return {key: local(value) for key, value in self.states.items()}

    def _part(self, tensor: Tensor) -> Tensor:
        if is_dtensor(tensor):
            return local(tensor)
        return self.spec.rows_of(tensor) if self.spec is not None and self.spec.zero1 else tensor

    def describe(self) -> tuple[Any, ...]:
        """What ranks must agree on."""
        return (
            *(self.name, tuple(self.parameter.shape), self.parameter.dtype, self.view, self.group),
            *(None if self.spec is None else self.spec.axes, self.theta.sha256, self.orthogonalize, self.ns_steps),
        )


@dataclass(frozen=True, eq=False)
class Entry:
    """A slot in the messages: its layout (None for fewer than two axes), this rank's slices, and where it begins.

    `home` is the first rank with the same part: the one that counts. Sums of g^2 are there along axes that are cut.
    """

    slot: Slot
    layout: ShardLayout | None
    slices: list[Slice]
    home: int
    counts: bool
    row_totals: int | None  # [B, m], where columns are cut
    column_totals: int | None  # [B, n], where rows are cut
    feature_sumsq: int
    feature_width: int
    direction_sumsq: int


class Plan:
    """The slots whose step is divided among the ranks of a team, as one of them sees them.

    `comm_dtype` is that of directions. Each replica orthogonalises for itself, or with `over_replicas` all do together.
    `ranks_per_node` neighbours may share large matrices. Raises ValueError for a parameter whose matrices cannot be
    sharded as it is.
    """

    def __init__(
        self, slots: Sequence[Slot], team: Team, comm_dtype: str, over_replicas: bool = False, ranks_per_node: int = 1
    ) -> None:
        self.team, self.ranks, self.rank = team, team.ranks, team.rank
        self.ranks_per_node = ranks_per_node
        # which form shared matrices take, as long as this plan: all ranks must add up alike
        self.exact_products = torch.get_float32_matmul_precision() == "highest"
        self.comm_dtype, self.over_replicas = COMM_DTYPES[comm_dtype], over_replicas
        self.entries: list[Entry] = []
        self.cuts: list[tuple[Cut, ...]] = []
        gradients, features, directions = HEADER + len(slots), 0, 0
        for slot in slots:
            assert slot.spec is not None
            cuts = team.cuts(slot.spec)
            self.cuts.append(cuts)
            first = home(cuts, self.rank)
            counts = first == self.rank
            if slot.is_vector:
                self.entries.append(Entry(slot, None, [], first, counts, None, None, features, 15, directions))
                features, directions = features + 15, directions + 1
                continue
            layout = ShardLayout.of(slot.parameter.shape, slot.view, cuts, slot.name)
            batch, m, n = layout.matrices
            row_totals = column_totals = None
            if layout.cuts_rows:
                column_totals, gradients = gradients, gradients + batch * n
            if layout.cuts_columns:
                row_totals, gradients = gradients, gradients + batch * m
            width = 0 if layout.whole else 18 + 6 * (layout.cuts_rows + layout.cuts_columns)
            slices = layout.slices(self.rank)
            self.entries.append(
                Entry(slot, layout, slices, first, counts, row_totals, column_totals, features, width, directions)
            )
            features += batch * width
            directions += 0 if layout.whole else batch
        self.lengths = gradients, features, directions
        # the same on every rank, with gradients or without
        self.shares_directions = directions > 0 and not all(entry.slot.orthogonalize for entry in self.entries)
        self._plan_transfers()

    def describe(self) -> list[Any]:
        """What all ranks must have alike."""
        described = zip(self.entries, self.cuts, strict=True)
        own = str(self.comm_dtype), self.over_replicas
        return [(*entry.slot.describe(), cuts, *own) for entry, cuts in described]

    def masks(self) -> list[NDArray[np.float32]] | None:
        """Return for each all-reduced message what this rank's part of it is multiplied by; None: 1, on every rank."""
        layouts = [entry.layout for entry in self.entries if entry.layout is not None]
        replicated = any(home(cuts, rank) != rank for cuts in set(self.cuts) for rank in range(self.ranks))
        if not replicated and not any(layout.cuts_rows and layout.cuts_columns for layout in layouts):
            return None
        gradients, features, directions = (np.ones(length, np.float32) for length in self.lengths)
        for entry in self.entries:
            layout, batch, first = entry.layout, 1, entry.feature_sumsq
            if layout is not None:
                batch, m, n = layout.matrices
                for start, length in ((entry.column_totals, batch * n), (entry.row_totals, batch * m)):
                    if start is not None:
                        gradients[start : start + length] = entry.counts
            own = features[first : first + batch * entry.feature_width].reshape(batch, -1)
            own[:] = entry.counts
            if layout is not None and layout.cuts_rows and layout.cuts_columns:
                # the vectors of a row are with the first of those that have it, those of a column as well
                for piece in entry.slices:
                    here = slice(piece.matrix, piece.matrix + piece.count)
                    own[here, 18:24] *= piece.column == 0
                    own[here, 24:30] *= piece.row == 0
            if layout is None or not layout.whole:
                directions[entry.direction_sumsq : entry.direction_sumsq + batch] = entry.counts
        return [gradients, features, directions]

    def slices(self, layout: ShardLayout) -> list[list[Slice]]:
        """Return what every rank has of a parameter; parameters of one layout have the same."""
        if layout not in self._slices:
            self._slices[layout] = [layout.slices(rank) for rank in range(self.ranks)]
        return self._slices[layout]

    def replica(self, index: int, rank: int) -> int:
        """Return the place of a rank among those that have the same part of an entry."""
        return rank - home(self.cuts[index], rank)

    def owner_of(self, index: int, matrix: int, rank: int) -> int:
        """Return which rank orthogonalises a matrix of an entry for a rank: of several, the first."""
        owner = self._owners[index, matrix]
        return owner if self.over_replicas else owner + self.replica(index, rank)

    def owners_of(self, index: int, matrix: int, rank: int) -> range:
        """Return all ranks that do."""
        first = self.owner_of(index, matrix, rank)
        return range(first, first + self.parts_each[index, matrix])

    def shares(self, index: int, matrix: int, rank: int, piece: Slice) -> Iterator[tuple[int, Slice]]:
        """Yield the owners of a slice that a rank has of a matrix, and what each takes of it."""
        owners = self.owners_of(index, matrix, rank)
        if len(owners) == 1:
            yield owners[0], piece
            return
        layout = self.entries[index].layout
        assert layout is not None
        yield from shares_of(piece, *layout.matrices[1:], owners, self._turn(index, matrix))

    def block(self, index: int, matrix: int, rank: int) -> Slice:
        """Return what of a matrix its owner `rank` iterates."""
        layout = self.entries[index].layout
        assert layout is not None
        return block_of(*layout.matrices[1:], self.parts_each[index, matrix], rank, self._turn(index, matrix))

    def _turn(self, index: int, matrix: int) -> int:
        return self._owners[index, matrix] // self.parts_each[index, matrix]

    def _own_parts(self, rank: int) -> list[list[tuple[int, int, Slice, int]]]:
        """For each owner what a rank has for it, (entry, matrix, part, slice): by entries, slices and matrices."""
        own: list[list[tuple[int, int, Slice, int]]] = [[] for _ in range(self.ranks)]
        for index, entry in enumerate(self.entries):
            if entry.layout is None or not entry.slot.orthogonalize:
                continue
            for number, piece in enumerate(self.slices(entry.layout)[rank]):
                for b in range(piece.matrix, piece.matrix + piece.count):
                    for owner, share in self.shares(index, b, rank, piece):
                        own[owner].append((index, b, share, number))
        return own

    def sends(self, index: int, rank: int, owner: int) -> bool:
        """Whether a rank sends its part of a matrix: of replicas one does."""
        return self.replica(index, rank) == self.replica(index, owner)

    def _plan_transfers(self) -> None:
        """Fix owners and the layout of both all-to-alls: by owner, then by entries, slices and matrices in order."""
        matrices, shapes, holders, candidates, limits = [], [], [], [], []
        homes: dict[tuple[Cut, ...], tuple[int, ...]] = {}
        offsets: dict[tuple[Cut, ...], int] = {}
        self._slices: dict[ShardLayout, list[list[Slice]]] = {}
        for index, entry in enumerate(self.entries):
            layout = entry.layout
            if layout is None or not entry.slot.orthogonalize:
                continue
            batch, m, n = layout.matrices
            held: list[list[int]] = [[] for _ in range(batch)]
            for rank, there in enumerate(self.slices(layout)):
                for piece in there:
                    if (piece.rows, piece.columns) == (m, n):
                        for b in range(piece.matrix, piece.matrix + piece.count):
                            held[b].append(rank)
            matrices += [(index, b) for b in range(batch)]
            shapes += [(m, n)] * batch
            holders += held
            cuts = self.cuts[index]
            if cuts not in homes:
                everyone = range(self.ranks)
                homes[cuts] = tuple(r for r in everyone if self.over_replicas or home(cuts, r) == r)
                # owners of other replicas are as many ranks away, and must be neighbours there as well
                away = () if self.over_replicas else (r - home(cuts, r) for r in everyone)
                offsets[cuts] = math.gcd(*away)
            candidates += [homes[cuts]] * batch
            limits += [offsets[cuts]] * batch
        steps = max((self.entries[index].slot.ns_steps for index, _ in matrices), default=5)
        parts = choose_parts(shapes, holders, candidates, limits, self.ranks, self.ranks_per_node, steps)
        ends = [(min(group), max(group)) for group in homes.values()]
        crosses = any(first // self.ranks_per_node != last // self.ranks_per_node for first, last in ends)
        elements = sum(
            math.prod(entry.layout.shape) // math.prod(cut.parts for cut in entry.layout.cuts)
            for entry in self.entries
            if entry.layout is not None and entry.slot.orthogonalize
        )
        self.two_levels = crosses and pays_two_levels(elements, self.ranks, self.ranks_per_node)
        """Whether what goes to another node passes through another rank of the own one."""
        owners = assign_owners(shapes, holders, candidates, self.ranks, steps, parts, scatter=self.two_levels)
        self._owners = dict(zip(matrices, owners, strict=True))
        self.parts_each = dict(zip(matrices, parts, strict=True))
        self.sharers = max(parts, default=1)
        """How many neighbours share each matrix that is shared."""
        self.owner = {key: self.owner_of(*key, self.rank) for key in matrices}
        """The first owner of each matrix."""

        # what comes to this rank from each, and goes back; a rank has room for all of its parts, and sends those that
        # its replicas do not
        coming: list[list[tuple[int, int, Slice, int]]] = [[] for _ in range(self.ranks)]
        returned: list[list[tuple[int, int, Slice]]] = [[] for _ in range(self.ranks)]
        mine = [key for key in matrices if self.rank in self.owners_of(*key, self.rank)]
        for index in sorted({index for index, _ in mine}):
            layout = self.entries[index].layout
            assert layout is not None
            for rank in range(self.ranks):
                same = self.sends(index, rank, self.rank)
                if not (same or self.over_replicas):
                    continue
                for number, piece in enumerate(self.slices(layout)[rank]):
                    for b in range(piece.matrix, piece.matrix + piece.count):
                        for owner, share in self.shares(index, b, rank, piece):
                            if owner == self.rank:
                                returned[rank].append((index, b, share))
                                if same:
                                    coming[rank].append((index, b, share, number))
        everyone = range(self.ranks)
        order: Sequence[int] = everyone
        if self.two_levels:
            # by place in a node, then by node: all that goes to the rank of the own node with that place
            order = np.arange(self.ranks).reshape(-1, self.ranks_per_node).T.ravel().tolist()
        by_owner, self.part_counts = lay_out(self._own_parts(self.rank), order)
        self.parts = [transfer for owner in order for transfer in by_owner[owner]]
        received, self.receive_counts = lay_out(coming, everyone)
        self.receives = [transfer for there in received for transfer in there]
        self._plan_replicas(by_owner, order, returned)
        self._plan_exchanges()
        self.parts_of: dict[tuple[int, int], list[Transfer]] = {}
        for transfer in self.parts:
            self.parts_of.setdefault((transfer.entry, transfer.number), []).append(transfer)
        self.owned: dict[Owned, list[tuple[int, int]]] = {}
        for index, b in mine:
            entry, count = self.entries[index], self.parts_each[index, b]
            assert entry.layout is not None
            turn = self._turn(index, b) % count
            key = Owned(*entry.layout.matrices[1:], entry.slot.ns_steps, count, turn, self.block(index, b, self.rank))
            self.owned.setdefault(key, []).append((index, b))

    def _plan_replicas(
        self,
        by_owner: Sequence[Sequence[Transfer]],
        order: Sequence[int],
        returned: Sequence[Sequence[tuple[int, int, Slice]]],
    ) -> None:
        """Fix which ranges of this rank's parts it sends, and of what it received, where to they go back."""
        self.send_counts, sent = [0] * self.ranks, []
        for owner in order:
            for transfer in by_owner[owner]:
                if self.sends(transfer.entry, self.rank, owner):
                    sent.append((transfer.offset, transfer.stop))
                    self.send_counts[owner] += transfer.stop - transfer.offset
        where = {
            (transfer.entry, transfer.matrix, transfer.piece.row, transfer.piece.column): transfer
            for transfer in self.receives
        }
        back = []
        self.return_counts = []
        for there in returned:
            found = [where[index, b, piece.row, piece.column] for index, b, piece in there]
            back += [(transfer.offset, transfer.stop) for transfer in found]
            self.return_counts.append(sum(transfer.stop - transfer.offset for transfer in found))
        self.sent_ranges, self.returned_ranges = joined(sent), joined(back)

    def _counts(self, rank: int) -> tuple[list[int], list[int]]:
        """Return how many elements of parts a rank has for each owner, and how many of those it sends."""
        kept, sent = [0] * self.ranks, [0] * self.ranks
        for owner, parts in enumerate(self._own_parts(rank)):
            for index, _, piece, _ in parts:
                size = padded(piece.rows * piece.columns)
                kept[owner] += size
                sent[owner] += size * self.sends(index, rank, owner)
        return kept, sent

    def _plan_exchanges(self) -> None:
        """Fix the all-to-alls of both ways."""
        if self.two_levels:
            width = self.ranks_per_node
            node, place = divmod(self.rank, width)
            mates = [self._counts(node * width + mate) for mate in range(width)]
            kept, sent = (by_node([of_mate[which] for of_mate in mates], width)[:, :, place] for which in (0, 1))
            sends, receives, returns, parts = (
                by_node(counts, width)
                for counts in (self.send_counts, self.receive_counts, self.return_counts, self.part_counts)
            )
            self.to_owners = [
                Exchange("node", place, sends.sum(0).tolist(), sent.sum(1).tolist(), reordered(sent)),
                Exchange("rail", node, sent.sum(0).tolist(), receives.sum(1).tolist()),
            ]
            self.from_owners = [
                Exchange("rail", node, returns.sum(1).tolist(), kept.sum(0).tolist(), reordered(kept.T)),
                Exchange("node", place, kept.sum(1).tolist(), parts.sum(0).tolist()),
            ]
            return
        self.to_owners = [Exchange("all", self.rank, self.send_counts, self.receive_counts)]
        self.from_owners = [Exchange("all", self.rank, self.return_counts, self.part_counts)]

    def shared_sums(self) -> list[int]:
        """Return the elements of each all-reduce among the ranks that share matrices with this one."""
        shared = [(owned, len(matrices)) for owned, matrices in self.owned.items() if owned.parts > 1]
        return [size for owned, count in shared for size in sums_of_shared(*owned[:3], count)]

    def bytes_sent(self) -> dict[str, int]:
        """Bytes that this rank gives to each kind of collective in a step; an all-to-all's part for itself left out.

        Shared matrices are taken to be iterated as `sums_of_shared` says. With ZeRO-1 `all-gather` is what it gives
        when all parameters have gradients.
        """
        lengths = self.lengths if self.shares_directions else self.lengths[:2]
        exchanged = sum(exchange.sent for exchange in (*self.to_owners, *self.from_owners))
        found = {"all-reduce": 4 * sum(lengths), "all-to-all": self.comm_dtype.itemsize * exchanged}
        if self.sharers > 1:
            found["all-reduce of shared matrices"] = 4 * sum(self.shared_sums())
        gathered = [entry.slot.parameter for entry in self.entries if entry.slot.spec and entry.slot.spec.zero1]
        if gathered:
            found["all-gather"] = sum(
                -(-p.shape[0] // self.ranks) * p.shape[1:].numel() * p.dtype.itemsize for p in gathered
            )
        return found
