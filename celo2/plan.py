"""What a step takes and what its ranks send each other: arithmetic on shapes, the same on every rank.

A `Slot` is a parameter with all that a step needs to know of it. A `Plan` has those whose step is divided among ranks
(sharded by FSDP2, or by rows with ZeRO-1), where each one's part of every message begins, and which rank orthogonalises
each matrix. No element of a tensor is read here, and no message is sent.

The messages of a step, in order:

1. `gradients`, all-reduced: the squared norm, and of every matrix the sums of g^2 along the axis that is cut;
2. `features`, all-reduced: the 18 sums of squares of every matrix, and 6 of the vectors along the cut axis;
3. `directions`, all-reduced: a sum of squares of the direction of every matrix that is not orthogonalised;
4. the directions themselves, sent to each matrix's owner by an all-to-all, and the result back by another.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from celo2.matrices import MatrixView
from celo2.state import compute_dtype, is_dtensor, local
from celo2.theta import Theta

if TYPE_CHECKING:
    from celo2.sharding import ShardLayout, ShardSpec, Slice

# the first entries of the message of gradients: squared norm, and whether a rank asks to skip the step; a flag for each
# entry of the plan follows, 1 where it has a gradient
HEADER = 2
COMM_DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}


def padded(length: int) -> int:
    """Round up to a multiple of 16 elements, so that every part of a message begins at 16 bytes."""
    return -(-length // 16) * 16


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
            *(None if self.spec is None else self.spec.axis, self.theta.sha256, self.orthogonalize, self.ns_steps),
        )


@dataclass(frozen=True, eq=False)
class Entry:
    """A slot in the messages: its layout (None for fewer than two axes), this rank's slices, and where it begins."""

    slot: Slot
    layout: ShardLayout | None
    slices: list[Slice]
    grad_sumsq: int
    feature_sumsq: int
    direction_sumsq: int


class Transfer(NamedTuple):
    """Elements of an all-to-all that are a part of a matrix: of a slice of an entry, the matrix's own part of it."""

    entry: int
    matrix: int  # of the parameter
    piece: Slice
    number: int  # of the slice among its rank's
    offset: int


def _lay_out(parts: list[list[tuple[int, int, Slice, int]]]) -> tuple[list[Transfer], list[int]]:
    """Give the parts of a message their offsets, one rank after the other; return them, and each rank's elements."""
    transfers, counts, offset = [], [], 0
    for there in parts:
        start = offset
        for index, matrix, piece, number in there:
            transfers.append(Transfer(index, matrix, piece, number, offset))
            offset += padded(piece.rows * piece.columns)
        counts.append(offset - start)
    return transfers, counts


class Plan:
    """The slots whose step is divided among `ranks`, as rank `rank` sees them; `comm_dtype` is that of directions.

    Raises ValueError for a parameter whose matrices cannot be sharded as it is.
    """

    def __init__(self, slots: Sequence[Slot], ranks: int, rank: int, comm_dtype: str) -> None:
        from celo2.sharding import ShardLayout

        self.ranks, self.rank, self.comm_dtype = ranks, rank, COMM_DTYPES[comm_dtype]
        self.entries: list[Entry] = []
        gradients, features, directions = HEADER + len(slots), 0, 0
        for slot in slots:
            assert slot.spec is not None
            if slot.is_vector:
                self.entries.append(Entry(slot, None, [], gradients, features, directions))
                features, directions = features + 15, directions + 1
                continue
            layout = ShardLayout.of(slot.parameter.shape, slot.view, slot.spec.axis, slot.name)
            self.entries.append(Entry(slot, layout, layout.slices(ranks, rank), gradients, features, directions))
            batch, m, n = layout.matrices
            if layout.kind != "whole":
                gradients += batch * (n if layout.kind == "rows" else m)
                features += batch * 24
                directions += batch
        self.lengths = gradients, features, directions
        # the same on every rank, with gradients or without
        self.shares_directions = directions > 0 and not all(entry.slot.orthogonalize for entry in self.entries)
        self._plan_transfers()

    def describe(self) -> list[Any]:
        """What all ranks must have alike."""
        return [(*entry.slot.describe(), str(self.comm_dtype)) for entry in self.entries]

    def _plan_transfers(self) -> None:
        """Fix owners and the layout of both all-to-alls: by owner, then by entries, slices and matrices in order."""
        from celo2.sharding import assign_owners

        matrices, shapes, holders = [], [], []
        # parameters of one layout have the same slices
        slices: dict[ShardLayout, list[list[Slice]]] = {}
        for index, entry in enumerate(self.entries):
            layout = entry.layout
            if layout is None:
                continue
            if layout not in slices:
                slices[layout] = [layout.slices(self.ranks, rank) for rank in range(self.ranks)]
            if not entry.slot.orthogonalize:
                continue
            batch, m, n = layout.matrices
            held: list[int | None] = [None] * batch
            for rank, there in enumerate(slices[layout]):
                for piece in there:
                    if (piece.rows, piece.columns) == (m, n):
                        held[piece.matrix : piece.matrix + piece.count] = [rank] * piece.count
            matrices += [(index, b) for b in range(batch)]
            shapes += [(m, n)] * batch
            holders += held
        steps = max((self.entries[index].slot.ns_steps for index, _ in matrices), default=5)
        owners = assign_owners(shapes, holders, self.ranks, steps)
        self.owner = dict(zip(matrices, owners, strict=True))

        # (entry, matrix, slice, its number) for each rank, in order: what goes there, and what comes from there
        going: list[list[tuple[int, int, Slice, int]]] = [[] for _ in range(self.ranks)]
        coming: list[list[tuple[int, int, Slice, int]]] = [[] for _ in range(self.ranks)]
        mine = {index for (index, _), owner in self.owner.items() if owner == self.rank}
        for index, entry in enumerate(self.entries):
            if entry.layout is None or not entry.slot.orthogonalize:
                continue
            for number, piece in enumerate(slices[entry.layout][self.rank]):
                for b in range(piece.matrix, piece.matrix + piece.count):
                    going[self.owner[index, b]].append((index, b, piece, number))
            for rank in range(self.ranks) if index in mine else ():
                for number, piece in enumerate(slices[entry.layout][rank]):
                    for b in range(piece.matrix, piece.matrix + piece.count):
                        if self.owner[index, b] == self.rank:
                            coming[rank].append((index, b, piece, number))
        self.sends, self.send_counts = _lay_out(going)
        self.receives, self.receive_counts = _lay_out(coming)
        self.sends_of: dict[tuple[int, int], list[Transfer]] = {}
        for transfer in self.sends:
            self.sends_of.setdefault((transfer.entry, transfer.number), []).append(transfer)
        self.owned: dict[tuple[int, int, int], list[tuple[int, int]]] = {}  # (m, n, ns_steps) -> matrices
        for (index, b), owner in self.owner.items():
            if owner == self.rank:
                owned = self.entries[index]
                assert owned.layout is not None
                key = (owned.layout.matrices[1], owned.layout.matrices[2], owned.slot.ns_steps)
                self.owned.setdefault(key, []).append((index, b))

    def bytes_sent(self) -> dict[str, int]:
        """Bytes that this rank gives to each kind of collective in a step; an all-to-all's part for itself left out.

        With ZeRO-1 `all-gather` is what it gives when all parameters have gradients.
        """
        away = sum(self.send_counts) - self.send_counts[self.rank]
        back = sum(self.receive_counts) - self.receive_counts[self.rank]
        lengths = self.lengths if self.shares_directions else self.lengths[:2]
        found = {"all-reduce": 4 * sum(lengths), "all-to-all": self.comm_dtype.itemsize * (away + back)}
        gathered = [entry.slot.parameter for entry in self.entries if entry.slot.spec and entry.slot.spec.zero1]
        if gathered:
            found["all-gather"] = sum(
                -(-p.shape[0] // self.ranks) * p.shape[1:].numel() * p.dtype.itemsize for p in gathered
            )
        return found
