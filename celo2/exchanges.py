"""The messages that bring directions to their owners and back: parts of matrices, their order, and over which ranks.

Arithmetic on numbers of elements; what a rank has, and who owns what, comes from `celo2.plan`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from celo2.shard_layout import Slice

# elements of which all parts of a message are multiples, so that each begins at 16 bytes
UNIT = 16


def padded(length: int) -> int:
    """Round up to a multiple of `UNIT` elements."""
    return -(-length // UNIT) * UNIT


class Transfer(NamedTuple):
    """Elements of an all-to-all that are a part of a matrix: of a slice of an entry, what one owner takes of it."""

    entry: int
    matrix: int  # of the parameter
    piece: Slice
    number: int  # of the slice among its rank's
    offset: int

    @property
    def stop(self) -> int:
        return self.offset + padded(self.piece.rows * self.piece.columns)


class Exchange(NamedTuple):
    """An all-to-all: among which ranks, elements for each of them and from each, and how what arrives goes on.

    `among` is "all", the ranks of the plan; "node", those of this rank's node; or "rail", those of its place in each
    node. `order` has of what arrives, in units of `UNIT` elements, what goes on first, second, ...; None as it is.
    """

    among: str
    place: int
    """This rank's."""
    sends: list[int]
    receives: list[int]
    order: NDArray[np.int64] | None = None

    @property
    def sent(self) -> int:
        """Elements that leave this rank."""
        return sum(self.sends) - self.sends[self.place]


class Owned(NamedTuple):
    """Matrices that this rank iterates, or the same block of each: all of one shape and number of iterations."""

    m: int
    n: int
    ns_steps: int
    parts: int  # ranks that share each of them
    turn: int  # of the blocks: the same on all of those ranks, so that they have the same keys
    block: Slice


def lay_out(
    parts: list[list[tuple[int, int, Slice, int]]], order: Sequence[int]
) -> tuple[list[list[Transfer]], list[int]]:
    """Give the parts of a message their offsets, one rank after the other; return each rank's, and its elements."""
    offset = 0
    transfers: list[list[Transfer]] = [[] for _ in parts]
    counts = [0] * len(parts)
    for rank in order:
        start = offset
        for part in parts[rank]:
            transfers[rank].append(Transfer(*part, offset))
            offset = transfers[rank][-1].stop
        counts[rank] = offset - start
    return transfers, counts


def reordered(chunks: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return the order in units of `UNIT` elements by which chunks [i][j], that lie i by i, go on j by j."""
    sizes = chunks // UNIT
    starts = (np.cumsum(sizes) - sizes.ravel()).reshape(sizes.shape)
    ranges = [np.arange(start, start + size) for start, size in zip(starts.T.ravel(), sizes.T.ravel(), strict=True)]
    return np.concatenate(ranges)


def by_node(counts: Sequence[Any], width: int) -> NDArray[np.int64]:
    """Return counts of all ranks, [..., ranks], as [..., nodes, ranks of each]."""
    array = np.array(counts, dtype=np.int64)
    return array.reshape(*array.shape[:-1], -1, width)


def joined(ranges: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """Join ranges [start, stop) that follow each other."""
    joined: list[tuple[int, int]] = []
    for start, stop in ranges:
        if joined and joined[-1][1] == start:
            joined[-1] = joined[-1][0], stop
        else:
            joined.append((start, stop))
    return joined
