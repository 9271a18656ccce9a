"""Which ranks run Newton-Schulz on which matrices: whole ones by load, and large ones shared by columns.

A matrix is iterated by one rank, or by several neighbours, each with a block of its long axis: they add up their Gram
matrices (`celo2.newton_schulz.orthogonalize_part`), and each does the m x m products for itself. That is more work
in all and less for the rank with most, and each of them receives a part of the matrix alone. What pays is decided
here, by a model of both, from shapes and numbers of ranks: every rank comes to the same result.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator, Sequence

from celo2.newton_schulz import newton_schulz_flops, summed_grams, takes_one_program
from celo2.shard_layout import Slice, chunk
from celo2.stochastic_rounding import mix64

# In FLOPs of the same time, on an H100 at 40% of its peak with links at 80% of theirs: what a float16 element of a
# direction takes to its owner and back over a network of 400 Gbit/s, the same inside of a node over NVLink, and what an
# element of a float32 Gram matrix takes to be added up there. Only their order of magnitude matters.
BETWEEN_NODES, INSIDE_NODE, GRAM_SUM = 40_000, 4_400, 9_000
# elements that a rank passes on inside of its node, in float16 there and back, in the time that one more peer of an
# all-to-all costs
PEER = 90_000
# a matrix is shared for at least so many percent of the time of the rank with most
WORTHWHILE = 5


def block_of(m: int, n: int, parts: int, rank: int, turn: int) -> Slice:
    """Return what of a matrix one of the ranks that share it iterates, as a slice: rows of a tall one, else columns.

    The last block may be empty. Which rank takes which turns with the group of ranks (of a first replica, so that all
    replicas add up alike): rows of all layers that lie on one node would else go to ranks of one place.
    """
    number = (rank + turn) % parts
    start, stop = chunk(max(m, n), parts, number)
    return Slice(0, 1, start, stop - start, 0, n) if m > n else Slice(0, 1, 0, m, start, stop - start)


def shares_of(piece: Slice, m: int, n: int, owners: range, turn: int) -> Iterator[tuple[int, Slice]]:
    """Yield what each of the ranks that share matrices [m, n] takes of a slice of them; nothing for one without."""
    for owner in owners:
        block = block_of(m, n, len(owners), owner, turn)
        row, row_stop = max(piece.row, block.row), min(piece.row + piece.rows, block.row + block.rows)
        column = max(piece.column, block.column)
        column_stop = min(piece.column + piece.columns, block.column + block.columns)
        if row < row_stop and column < column_stop:
            yield owner, Slice(piece.matrix, piece.count, row, row_stop - row, column, column_stop - column)


def assign_owners(
    shapes: Sequence[tuple[int, int]],
    holders: Sequence[Sequence[int]],
    candidates: Sequence[Sequence[int]],
    ranks: int,
    steps: int,
    parts: Sequence[int] | None = None,
    *,
    scatter: bool = False,
    kept: tuple[Sequence[int], Sequence[int]] | None = None,
) -> list[int]:
    """Return which of its candidates runs Newton-Schulz on each matrix: one that has it whole if any has, else by load.

    A matrix of `parts` above 1 goes to so many neighbours, all of them candidates, and the first of them is returned.
    Longest processing time first, the shared ones before all others, ties by number; or with `scatter` in an order that
    looks random: heads of all layers that lie on one node would else have owners with one place in their nodes, and
    all pass through one rank on their way. `kept` is what `keep_whole` returns, where it is known.
    """
    parts = [1] * len(shapes) if parts is None else parts
    owners, loads = map(list, keep_whole(shapes, holders, candidates, ranks, steps) if kept is None else kept)
    costs = [newton_schulz_flops(m, n, steps, p) for (m, n), p in zip(shapes, parts, strict=True)]
    heaps: dict[tuple[tuple[int, ...], int], list[tuple[int, int, int]]] = {}

    def entry(first: int, count: int) -> tuple[int, int, int]:
        load = max(loads[first : first + count])
        return load, mix64(first ^ mix64(load)) if scatter else first, first

    for matrix in sorted(range(len(shapes)), key=lambda matrix: (parts[matrix] == 1, -costs[matrix], matrix)):
        if owners[matrix] >= 0:
            continue
        able, count = tuple(candidates[matrix]), parts[matrix]
        if (able, count) not in heaps:
            heap = [entry(first, count) for first in groups_among(able, count)]
            heapq.heapify(heap)
            heaps[able, count] = heap
        heap = heaps[able, count]
        while heap[0] != entry(heap[0][2], count):
            # one that another heap has given something
            heapq.heapreplace(heap, entry(heap[0][2], count))
        owner = owners[matrix] = heap[0][2]
        for rank in range(owner, owner + count):
            loads[rank] += costs[matrix]
        heapq.heapreplace(heap, entry(owner, count))
    return owners


def keep_whole(
    shapes: Sequence[tuple[int, int]],
    holders: Sequence[Sequence[int]],
    candidates: Sequence[Sequence[int]],
    ranks: int,
    steps: int,
) -> tuple[list[int], list[int]]:
    """Return the owners of matrices that a candidate has whole, -1 for others, and the loads of ranks."""
    owners, loads, sets = [-1] * len(shapes), [0] * ranks, dict[int, frozenset[int]]()
    for matrix, having in enumerate(holders):
        # many matrices have one tuple of candidates
        key = id(candidates[matrix])
        if having and key not in sets:
            sets[key] = frozenset(candidates[matrix])
        keepers = [rank for rank in having if rank in sets[key]]
        if keepers:
            owners[matrix] = min(keepers, key=lambda rank: (loads[rank], rank))
            loads[owners[matrix]] += newton_schulz_flops(*shapes[matrix], steps)
    return owners, loads


def sums_of_shared(m: int, n: int, steps: int, count: int) -> list[int]:
    """Return the elements of each all-reduce for `count` matrices that ranks share: of squares, of Gram matrices.

    In float16 and exact float32; bfloat16 and rounded products take the standard form, with a Gram matrix an iteration.
    """
    return [count, *[count * min(m, n) ** 2] * summed_grams(m, n, steps), count]


def pays_two_levels(elements: int, ranks: int, ranks_per_node: int) -> bool:
    """Whether all-to-alls, of so many elements from a rank, go through its node's other ranks: they save peers."""
    width, nodes = ranks_per_node, ranks // ranks_per_node
    return elements < PEER * (width - 1) * (nodes - 1)


def groups_among(candidates: Sequence[int], count: int) -> list[int]:
    """Return the first rank of each group of `count` neighbours, cut from 0 on, that are all candidates."""
    if count == 1:
        return list(candidates)
    among = set(candidates)
    firsts = sorted({rank // count * count for rank in among})
    return [first for first in firsts if all(rank in among for rank in range(first, first + count))]


def choose_parts(
    shapes: Sequence[tuple[int, int]],
    holders: Sequence[Sequence[int]],
    candidates: Sequence[Sequence[int]],
    limits: Sequence[int],
    ranks: int,
    ranks_per_node: int,
    steps: int,
) -> list[int]:
    """Return by how many ranks each matrix is shared: 1, or for all that are shared the same divisor of a node's ranks.

    `limits` of a matrix must be a multiple of that (0 for any). The largest shapes are shared, as far as the rank with
    most then has less to do and to receive.
    """
    whole = [1] * len(shapes)
    if ranks_per_node == 1 or not shapes:
        return whole
    kept = keep_whole(shapes, holders, candidates, ranks, steps)
    element = BETWEEN_NODES if ranks > ranks_per_node else INSIDE_NODE

    def cost(m: int, n: int, parts: int) -> int:
        sums = 0 if parts == 1 else summed_grams(m, n, steps) * GRAM_SUM * min(m, n) ** 2
        return newton_schulz_flops(m, n, steps, parts) + sums + element * m * n // parts

    def most(parts: Sequence[int]) -> int:
        loads = [0] * ranks
        owners = assign_owners(shapes, holders, candidates, ranks, steps, parts, kept=kept)
        for (m, n), first, count in zip(shapes, owners, parts, strict=True):
            for rank in range(first, first + count):
                loads[rank] += cost(m, n, count)
        return max(loads)

    is_free = [
        owner < 0 and not takes_one_program(min(shape), steps) for shape, owner in zip(shapes, kept[0], strict=True)
    ]
    kinds = sorted({shape for shape, free in zip(shapes, is_free, strict=True) if free})
    kinds.sort(key=lambda shape: -cost(shape[0], shape[1], 1))
    best, least = whole, most(whole)
    for count in (count for count in range(2, ranks_per_node + 1) if ranks_per_node % count == 0):
        able = {group: bool(groups_among(group, count)) for group in {tuple(group) for group in candidates}}
        for number in range(1, len(kinds) + 1):
            shared = set(kinds[:number])
            parts = [
                count if shape in shared and free and limit % count == 0 and able[tuple(group)] else 1
                for shape, free, limit, group in zip(shapes, is_free, limits, candidates, strict=True)
            ]
            if parts == whole:
                continue
            load = most(parts)
            if 100 * load <= (100 - WORTHWHILE) * least:
                best, least = parts, load
    return best
