"""What the ranks of a sharded step tell each other: their parts of sums into messages, and directions out of them.

A matrix may be cut along its rows, its columns or both (`CUT` in the table); each rank has a part of it. Sums along a
cut axis are a rank's own part of a sum over the whole matrix, those along another axis are whole. The parts go to where
the table looks for the sums of whole matrices, a message of float32 that an all-reduce then adds up: the sums of g^2 by
the two kernels here, all others by those of `reductions`. What no rank has stays zero. `move_parts_kernel` puts the
directions that arrive at a matrix's owner together, and takes them apart again. All read and write what is small beside
the matrices, but for the last: two times the direction.
"""

from __future__ import annotations

import triton
import triton.language as tl

from celo2.kernels import layout
from celo2.kernels.gradient_moments import chunk_of, square_of


@triton.jit
def share_gradient_sums_kernel(
    table_ptr,
    chunks_ptr,
    sums_ptr,  # float32: partial sums of rows and columns
    ALIGNED: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
    PARTS: tl.constexpr,
):
    """Add up this rank's sums of g^2 along the cut axis, a chunk of the other axis a program."""
    chunk = tl.program_id(0)
    matrix, of_columns, length, offset, inside, own = chunk_of(table_ptr, chunks_ptr, chunk, ALIGNED, BLOCK_COLUMNS)
    cut = layout.entry(table_ptr, matrix, layout.CUT)
    parts_ptr = sums_ptr + layout.entry(table_ptr, matrix, layout.ROW_SUMS)
    parts = tl.cdiv(layout.entry(table_ptr, matrix, layout.COLS), BLOCK_COLUMNS)
    total_ptr = layout.sums_at(table_ptr, matrix, layout.ROW_TOTALS)
    is_shared = (cut & layout.CUT_COLS) != 0
    if of_columns:
        parts_ptr = sums_ptr + layout.entry(table_ptr, matrix, layout.COLUMN_SUMS)
        parts = tl.cdiv(layout.entry(table_ptr, matrix, layout.ROWS), BLOCK_ROWS)
        total_ptr = layout.sums_at(table_ptr, matrix, layout.COLUMN_TOTALS)
        is_shared = (cut & layout.CUT_ROWS) != 0
    if is_shared:
        total = tl.zeros([PARTS, BLOCK_COLUMNS], tl.float32)
        for part in range(0, parts, PARTS):
            o_part = part + tl.arange(0, PARTS).to(tl.int64)
            mask = (o_part < parts)[:, None] & inside[None, :]
            total += tl.load(parts_ptr + o_part[:, None] * length + offset[None, :], mask=mask, other=0.0)
        tl.store(total_ptr + offset, tl.sum(total, axis=0), mask=inside & own)


@triton.jit(do_not_specialize=["matrices", "others", "whole_matrices", "whole_others", "members"])
def share_norm_kernel(
    totals_ptr,  # float32 [matrices]: sums of squares of this rank's parts of sharded matrices, unscaled
    matrices,
    norms_ptr,  # float32 [others]: norms of all other sharded gradients, as they came
    others,
    whole_totals_ptr,  # the same of what every rank has whole
    whole_matrices,
    whole_norms_ptr,
    whole_others,
    unscale_ptr,
    found_inf_ptr,
    flags_ptr,  # float32 [members]: 1 for each sharded parameter that has a gradient here
    members,
    message_ptr,  # float32, the first FLAGS + members are written
    BLOCK: tl.constexpr,
):
    """Write the head of the first message."""
    unscale = tl.load(unscale_ptr)
    tl.store(message_ptr, square_of(totals_ptr, matrices, norms_ptr, others, unscale, BLOCK).to(tl.float32))
    # what is not sharded may differ between ranks: all must skip when one has to
    whole = square_of(whole_totals_ptr, whole_matrices, whole_norms_ptr, whole_others, unscale, BLOCK)
    is_finite = tl.sqrt(whole).to(tl.float32) < float("inf")
    skips = (tl.load(found_inf_ptr) != 0) | (is_finite == 0)
    tl.store(message_ptr + 1, tl.where(skips, 1.0, 0.0))
    for first in range(0, members, BLOCK):
        offset = first + tl.arange(0, BLOCK)
        flag = tl.load(flags_ptr + offset, mask=offset < members, other=0.0)
        tl.store(message_ptr + layout.FLAGS + offset, flag, mask=offset < members)


# columns of `parts`, int64: what a rank has of a matrix, and where it lies in the message and at the matrix's owner
PART_OFFSET = tl.constexpr(0)  # in the message, [rows, columns] without gaps
PART_TARGET = tl.constexpr(1)  # first element among the owner's matrices
PART_ROWS = tl.constexpr(2)
PART_COLS = tl.constexpr(3)
PART_STRIDE = tl.constexpr(4)  # from row to row of the matrix
PART_MATRIX = tl.constexpr(5)  # number of the matrix
PART_SIZE = tl.constexpr(6)  # of the whole matrix
PART_COLUMNS = tl.constexpr(7)


@triton.jit
def part_entry(parts_ptr, part, COLUMN: tl.constexpr):
    return tl.load(parts_ptr + part.to(tl.int64) * PART_COLUMNS + COLUMN)


@triton.jit
def move_parts_kernel(
    parts_ptr,  # int64 [parts, PART_COLUMNS]
    tiles_ptr,  # int32 [tiles, 3]: part, first row, first column
    directions_ptr,
    matrices_ptr,
    squares_ptr,  # float32 [matrices]: sums of squares of what is taken back; the message gets it with an RMS of 1
    BACK: tl.constexpr,  # from the matrices to the message
    SCALED: tl.constexpr,  # then by the sums of squares
    ALIGNED: tl.constexpr,  # offsets, lengths and strides are multiples of 16
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
):
    """Copy a tile of a part between the message and the matrix that it is a part of."""
    tile = tl.program_id(0)
    part = tl.load(tiles_ptr + 3 * tile)
    o_row = tl.load(tiles_ptr + 3 * tile + 1) + tl.arange(0, BLOCK_ROWS)
    column0 = tl.multiple_of(tl.load(tiles_ptr + 3 * tile + 2), 16)
    o_column = column0 + tl.arange(0, BLOCK_COLUMNS)
    rows = part_entry(parts_ptr, part, PART_ROWS)
    p_part = parts_ptr + part.to(tl.int64) * PART_COLUMNS
    if ALIGNED:
        columns = tl.multiple_of(tl.load(p_part + PART_COLS), 16)
        stride = tl.multiple_of(tl.load(p_part + PART_STRIDE), 16)
        directions_ptr += tl.multiple_of(tl.load(p_part + PART_OFFSET), 16)
        matrices_ptr += tl.multiple_of(tl.load(p_part + PART_TARGET), 16)
    else:
        columns = tl.load(p_part + PART_COLS)
        stride = tl.load(p_part + PART_STRIDE)
        directions_ptr += tl.load(p_part + PART_OFFSET)
        matrices_ptr += tl.load(p_part + PART_TARGET)
    mask = (o_row < rows)[:, None] & (o_column < columns)[None, :]
    directions_ptr += o_row[:, None].to(tl.int64) * columns + o_column[None, :]
    matrices_ptr += o_row[:, None].to(tl.int64) * stride + o_column[None, :]
    if BACK:
        value = tl.load(matrices_ptr, mask=mask, other=0.0).to(tl.float32)
        if SCALED:
            square = tl.load(squares_ptr + part_entry(parts_ptr, part, PART_MATRIX))
            value *= tl.rsqrt(square / part_entry(parts_ptr, part, PART_SIZE).to(tl.float32) + layout.NORM_EPS)
        tl.store(directions_ptr, value.to(directions_ptr.dtype.element_ty), mask=mask)
    else:
        value = tl.load(directions_ptr, mask=mask, other=0.0).to(tl.float32)
        if matrices_ptr.dtype.element_ty == tl.float16:
            value = tl.clamp(value, -layout.HALF_MAX, layout.HALF_MAX)
        tl.store(matrices_ptr, value.to(matrices_ptr.dtype.element_ty), mask=mask)
